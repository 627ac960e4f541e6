"""Check this project on a GPU: its GPU tests, the memory of an LLM of 3 billion weights, the speed, waits in the loop.

    python scripts/check_gpu.py --json gpu.json

Each part runs in a process of its own and may take 4 minutes, so that one that fails does not stop the others. Without
--llm_model_path it makes an LLM of Qwen2.5-3B's shape with random weights; for a folder with a config.json but no
weights, one of that shape. Accepts flags of run_main.py; the data are synthetic.

The parts:

    tests       the tests with the marker `gpu`
    memory      50 training steps and an evaluation of the README's command (NF4, batch size 8, 512 -> 96): planned and
                measured memory under a limit of 5 GiB, how often a step waits for the GPU, and the speed
    recomputed  the same with --gradient_checkpointing, under a limit of 3 GiB
    original    the same the original Time-LLM's way, without a limit
    nf4         scripts/benchmark.py with the LLM in NF4
    bfloat16    the same in bfloat16
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import PartialState
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, Qwen2Config

from base_models.make_tiny_llm import make_tiny_llm
from data_provider.data_factory import data_provider
from dataset.demo import write_demo_csv
from models.TimeLLM import Model
from scripts.benchmark import seconds
from utils.cli.checks import check_options, check_paths
from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.options import get_parser
from utils.cli.signals import leave
from utils.errors import UserError
from utils.memory.plan import plan_memory
from utils.system.files import write_text
from utils.system.gpu import is_gpu, limit_memory, peak_allocated, peak_reserved, reset_peak_memory
from utils.training.optimization import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--seq_len 512 --pred_len 96 --d_model 32 --d_ff 32 --batch_size 8"
GIB = 2**30
STEPS, WARM_UP, EVALUATED = 50, 5, 40
MOST_SECONDS = 240  # of a part

# Flags and limit in GiB of each part that measures memory.
MEMORY = {
    "memory": ("--load_in_4bit", 5.0),
    "recomputed": ("--load_in_4bit --gradient_checkpointing", 3.0),
    "original": ("--load_in_4bit --prompt_padding right --no_prefix_cache --mapping full", None),
}
SPEED = {"nf4": "--load_in_4bit", "bfloat16": "--llm_dtype bfloat16"}
PARTS = ("tests", *MEMORY, *SPEED)

_QWEN_3B = {
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def measure_memory(args: Namespace, limit: float | None) -> dict[str, object]:
    """Train for `STEPS` steps and evaluate `EVALUATED` batches with at most `limit` GiB; return memory (GiB) and speed.

    Raises:
        torch.OutOfMemoryError: if the limit is too low.
    """
    device = PartialState().device
    planned = plan_memory(args).total / GIB
    if limit:
        limit_memory(device, round(limit * GIB))
    model = Model(args)
    loading = peak_allocated(device) / GIB
    reset_peak_memory(device)
    optimizer = build_optimizer(args.optimizer, model.parameters(), args.learning_rate)
    batches, losses = iter(data_provider(args, "train")[1]), []

    def train(steps: int) -> None:
        for _ in range(steps):
            context, target, *_ = next(batches)
            loss = functional.mse_loss(model(context), target[:, -args.pred_len :].to(device, non_blocking=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())

    model.train()
    train(WARM_UP)
    waits = _count_waits(lambda: train(1), device)
    steps_per_second = (STEPS - WARM_UP) / seconds(lambda: train(STEPS - WARM_UP), device)
    windows_per_second = _evaluate(model, args)
    memory = {"loading": loading, "peak": peak_allocated(device) / GIB, "reserved": peak_reserved(device) / GIB}
    speed = {"steps_per_second": steps_per_second, "evaluation_windows_per_second": windows_per_second}
    return {"limit": limit, "planned": planned, **memory, "waits": waits, **speed, "last_loss": losses[-1].item()}


def _count_waits(step: Callable[[], None], device: torch.device) -> int | None:
    """Count how often a step waits for a CUDA device; None on another one, which cannot tell."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


@torch.inference_mode()
def _evaluate(model: Model, args: Namespace) -> float:
    """Forecast `EVALUATED` validation batches and return the windows per second."""
    model.eval()
    batches = iter(data_provider(args, "val")[1])

    def forecast() -> None:
        for _ in range(EVALUATED):
            model(next(batches)[0])

    return EVALUATED * args.batch_size / seconds(forecast, model.device)


def make_random_llm(folder: Path, config: PretrainedConfig, tokenizer: Path | None, device: torch.device) -> None:
    """Write an LLM with random weights in bfloat16, and a tokenizer: that of a folder, or a small one."""
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    source = tokenizer or make_tiny_llm("qwen2", folder / "tokenizer")
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def _prepare_llm(given: str, folder: Path, device: torch.device) -> str:
    """Choose the LLM: the given one, or one with random weights of its config, or of Qwen2.5-3B's shape."""
    source = Path(given) if given else None
    if source and not source.is_dir():
        return given  # a Hub id, or a wrong path, which is reported
    if source and any(file.suffix in (".safetensors", ".bin") for file in source.iterdir()):
        return given
    config = AutoConfig.from_pretrained(source, trust_remote_code=False) if source else Qwen2Config(**_QWEN_3B)
    has_tokenizer = source is not None and (source / "tokenizer.json").is_file()
    make_random_llm(folder, config, source if has_tokenizer else None, device)
    return str(folder)


def run_part(part: str, flags: Sequence[str]) -> dict[str, object]:
    """Run a part in this process and return what it found."""
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", str(ROOT / "tests")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}
    if part in SPEED:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *flags, *SPEED[part].split()]
            done = subprocess.run(
                [*command, "--rounds", "3", "--json", str(results)], capture_output=True, encoding="utf-8", check=False
            )
            if done.returncode:
                raise RuntimeError(f"benchmark.py failed: {done.stderr.strip().splitlines()[-1:]}")
            return json.loads(results.read_text(encoding="utf-8"))
    more, limit = MEMORY[part]
    args = get_parser().parse_args([*flags, *more.split()])
    check_options(args)
    check_paths(args)
    return measure_memory(args, limit)


def _in_own_process(part: str, flags: Sequence[str]) -> dict[str, object]:
    """Run a part in a process of its own; an error becomes part of its result."""
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, *flags]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=MOST_SECONDS, check=False
        )
        lines = done.stdout.strip().splitlines()
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        found = json.loads(lines[-1]) if done.returncode == 0 else {"error": problem}
    except subprocess.TimeoutExpired:
        found = {"error": f"took more than {MOST_SECONDS} seconds"}
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def table(results: dict[str, dict]) -> str:
    """Format the results as Markdown tables, one of memory and speed, one of the benchmark's variants."""
    head = [
        "| part | limit | planned | peak | loading | waits a step | steps/s | windows/s in a test |",
        "|" + "---|" * 8,
    ]
    for part in MEMORY:
        found = results.get(part, {})
        if "peak" in found:
            limit = f"{found['limit']:.0f} GiB" if found["limit"] else "none"
            sizes = " | ".join(f"{found[name]:.2f} GiB" for name in ("planned", "peak", "loading"))
            speed = f"{found['steps_per_second']:.2f} | {found['evaluation_windows_per_second']:.1f}"
            head.append(f"| {part} | {limit} | {sizes} | {found['waits']} | {speed} |")
    lines = ["", "| part | variant | step, s | faster | eval, windows/s | faster | peak, MB |", "|" + "---|" * 7]
    lines += [
        f"| {part} | {one['variant']} | {one['step_seconds']:.3f} | {one['step_ratio']:.2f}x |"
        f" {one['windows_per_second']:.1f} | {one['evaluation_ratio']:.2f}x | {one['peak_bytes'] / 1e6:.0f} |"
        for part in SPEED
        for one in results.get(part, {}).get("variants", ())
    ]
    failed = [f"{part}: {found['error']}" for part, found in results.items() if "error" in found]
    tests = results.get("tests", {}).get("summary", [])
    return "\n".join([*head, *lines, "", *tests, *failed])


def check(argv: Sequence[str] | None) -> int:
    """Run all parts and return 0 if each succeeded, else 1."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process and print its result as JSON")
    parser.add_argument("--llm_model_path", default="", help="as in run_main.py")
    options, rest = parser.parse_known_args(argv)
    device = PartialState().device
    if not is_gpu(device):
        raise UserError("there is no GPU: this check needs one")
    if options.part:
        print(json.dumps(run_part(options.part, [*rest, "--llm_model_path", options.llm_model_path])))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llm = _prepare_llm(options.llm_model_path, folder / "llm", device)
        csv = write_demo_csv(folder / "check.csv", rows=10_000)
        flags = [*FLAGS.split(), "--data", "custom", "--root_path", str(csv.parent), "--data_path", csv.name]
        for part in options.parts:
            results[part] = _in_own_process(part, [*flags, *rest, "--llm_model_path", llm])
            print(f"{part}: {json.dumps(results[part])}", flush=True)
    print(table(results))
    if options.json:
        write_text(options.json, json.dumps(results, indent=1) + "\n")
    has_failed = any("error" in found or found.get("exit_code") for found in results.values())
    return int(has_failed)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 0 all parts succeeded, 1 one failed, 2 invalid input, 130 interrupted."""
    return exit_code_of(lambda: check(argv), "nothing was written")


if __name__ == "__main__":
    leave(main)
