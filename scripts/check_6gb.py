"""Check on a CUDA device that Time-LLM with an LLM of 3 billion weights trains in 6 GB of GPU memory.

    python scripts/check_6gb.py --llm_model_path base_models/Qwen2.5-3B --root_path dataset

Runs the README's command (NF4, batch size 8, 512 -> 96, ETTm1) under a limit of 5 GiB, then with gradient checkpointing
under 3 GiB, then the original Time-LLM's computation without a limit: 50 training steps and an evaluation each. Prints
the peak memory, the planned memory and the speed of each case. Accepts flags of run_main.py; without --llm_model_path,
it creates an LLM of that size with random weights.
"""

import gc
import json
import sys
import tempfile
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, Qwen2Config

from base_models.make_tiny_llm import make_tiny_llm
from data_provider.data_factory import data_provider
from models.TimeLLM import Model
from scripts.benchmark import seconds
from utils.cli.checks import check_options, check_paths
from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.options import get_parser
from utils.cli.signals import leave
from utils.errors import UserError
from utils.memory.plan import plan_memory
from utils.training.optimization import build_optimizer

FLAGS = "--data ETTm1 --seq_len 512 --pred_len 96 --d_model 32 --d_ff 32 --batch_size 8 --load_in_4bit"
GIB = 2**30
# Each case: name, flags, limit in GiB.
CASES = (
    ("ours", "", 5.0),
    ("ours, recomputed", "--gradient_checkpointing", 3.0),
    ("Time-LLM's way", "--prompt_padding right --no_prefix_cache --mapping full", None),
)
STEPS, WARM_UP, EVALUATED = 50, 5, 40


def check(name: str, args: Namespace, limit: float | None) -> dict[str, object]:
    """Train for `STEPS` steps and evaluate `EVALUATED` batches with at most `limit` GiB; return memory (GiB) and speed.

    Raises:
        torch.OutOfMemoryError: if the limit is too low.
    """
    gc.collect()  # free the previous case's model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit * GIB / total, 1.0) if limit else 1.0)
    planned = plan_memory(args).total / GIB
    model = Model(args)
    loading = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    optimizer = build_optimizer(args.optimizer, model.parameters(), args.learning_rate)
    batches, losses = iter(data_provider(args, "train")[1]), []

    def train(steps: int) -> None:
        for _ in range(steps):
            context, target, *_ = next(batches)
            loss = functional.mse_loss(model(context), target[:, -args.pred_len :].to(model.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

    model.train()
    train(WARM_UP)
    steps_per_second = (STEPS - WARM_UP) / seconds(lambda: train(STEPS - WARM_UP), model.device)
    windows_per_second = _evaluate(model, args)
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    outcome = {"name": name, "limit": limit, "planned": planned, "loading": loading, "peak": peak, "reserved": reserved}
    speed = {"steps_per_second": steps_per_second, "evaluation_windows_per_second": windows_per_second}
    return outcome | speed | {"last_loss": losses[-1]}


@torch.inference_mode()
def _evaluate(model: Model, args: Namespace) -> float:
    """Forecast `EVALUATED` validation batches and return the windows per second."""
    model.eval()
    batches = iter(data_provider(args, "val")[1])

    def forecast() -> None:
        for _ in range(EVALUATED):
            model(next(batches)[0])

    return EVALUATED * args.batch_size / seconds(forecast, model.device)


def make_random_llm(folder: Path) -> None:
    """Write an LLM with Qwen2.5-3B's architecture, random weights and a small tokenizer."""
    sizes = {"num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008, "vocab_size": 151936}
    config = Qwen2Config(**sizes, num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)
    model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)  # on the CPU: it needs 6 GB
    model.save_pretrained(folder)
    tokenizer = make_tiny_llm("qwen2", folder / "tokenizer")
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(folder)


def check_all(argv: list[str] | None) -> int:
    """Run all cases and return 0 if they stayed within their limits, else 1."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device: this check needs one")
    outcomes, within_limits = [], True
    with tempfile.TemporaryDirectory() as folder:
        if "--llm_model_path" not in rest:
            make_random_llm(Path(folder))
            rest = [*rest, "--llm_model_path", folder]
        for name, flags, limit in CASES:
            args = get_parser().parse_args([*FLAGS.split(), *rest, *flags.split()])
            check_options(args)
            check_paths(args)
            try:
                outcomes.append(check(name, args, limit))
            except torch.OutOfMemoryError as problem:
                within_limits = within_limits and limit is None  # the last case may need more than the device has
                outcomes.append({"name": name, "limit": limit, "out_of_memory": str(problem)})
            print(json.dumps(outcomes[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return 0 if within_limits else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 0 all cases within limits, 1 over a limit, 2 invalid input, 130 interrupted."""
    return exit_code_of(lambda: check_all(argv), "nothing was written")


if __name__ == "__main__":
    leave(main)
