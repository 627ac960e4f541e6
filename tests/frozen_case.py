"""A small case of our own, kept with its figures, which every clone on every machine must find again.

    python -m tests.frozen_case     makes it anew: only where its figures are meant to change, and then say why

`tests/frozen/` holds a tiny Qwen2, trainable parameters, windows, and what they gave: prompts, token ids, forecasts
and six training losses, padded on either side. Weights and windows are float16-exact.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from base_models.make_tiny_llm import make_tiny_llm
from models.TimeLLM import Model
from utils.cli.options import get_parser
from utils.training.optimization import build_optimizer

FOLDER = Path(__file__).parent / "frozen"
SEQ_LEN, PRED_LEN, BATCH, STEPS = 64, 12, 8, 6
FLAGS = [
    *("--data", "custom", "--seq_len", str(SEQ_LEN), "--pred_len", str(PRED_LEN), "--d_model", "8", "--n_heads", "2"),
    *("--d_ff", "16", "--dropout", "0", "--content", "Made-up readings of an hour each. "),
]
PADDINGS = ("left", "right")


def build(*more: str) -> Model:
    """Return the model of the case with its parameters, and further flags."""
    model = Model(get_parser().parse_args([*FLAGS, "--llm_model_path", str(FOLDER / "llm"), *more]))
    weights = load_file(FOLDER / "trainable.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows (16, SEQ_LEN, 1) and what follows them (16, PRED_LEN, 1)."""
    values = load_file(FOLDER / "windows.safetensors")["values"].float()[..., None]
    return values.split([SEQ_LEN, PRED_LEN], dim=1)


def figures() -> dict:
    """Return what was kept: prompts, token ids, and forecasts and losses by padding."""
    return json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))


def forecasts(model: Model) -> torch.Tensor:
    """Return the forecasts of all windows, (16, PRED_LEN)."""
    with torch.inference_mode():
        return model.eval()(windows()[0])[..., 0]


def losses(model: Model) -> list[float]:
    """Train on the two halves of the windows in turn and return the losses."""
    context, target = windows()
    optimizer = build_optimizer("adam", model.parameters(), 1e-3)
    found = []
    for step in range(STEPS):
        rows = slice(step % 2 * BATCH, (step % 2 + 1) * BATCH)
        loss = functional.mse_loss(model.train()(context[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def _made_up_values() -> torch.Tensor:
    """Return walks, cycles with noise, and windows whose statistics tie, (16, SEQ_LEN + PRED_LEN)."""
    random, time = np.random.default_rng(0), np.arange(SEQ_LEN + PRED_LEN)
    rows = [random.normal(0, 1, len(time)).cumsum() for _ in range(6)]
    rows += [np.sin(time * random.uniform(0.1, 1)) * 3 + random.normal(20, 0.3, len(time)) for _ in range(6)]
    rows += [np.resize([0, 1, 5, 2], len(time)), time % 7, (time == 20) * 9.0, np.full(len(time), 2.5)]
    return torch.tensor(np.stack(rows)).half()


def _make() -> None:
    make_tiny_llm("qwen2", FOLDER / "llm", hidden_size=32)
    save_file({"values": _made_up_values()}, FOLDER / "windows.safetensors")
    torch.manual_seed(0)
    drawn = Model(get_parser().parse_args([*FLAGS, "--llm_model_path", str(FOLDER / "llm")])).state_dict()
    save_file({name: tensor.half() for name, tensor in drawn.items()}, FOLDER / "trainable.safetensors")
    context = windows()[0][..., 0]
    kept = {"prompts": build().prompts.texts(context), "tokens": build().tokenize(context)}
    for padding in PADDINGS:
        flags = ("--prompt_padding", padding)
        kept[padding] = {"forecasts": forecasts(build(*flags)).tolist(), "losses": losses(build(*flags))}
    (FOLDER / "figures.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _make()
