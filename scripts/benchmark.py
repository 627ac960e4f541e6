"""Time a training step and an evaluation: the original Time-LLM's computation and ours, side by side.

    python scripts/benchmark.py --llm_model_path base_models/SmolLM2-135M --seq_len 512 --batch_size 8

All variants run alternately in one process, with the same LLM, weights and windows. The times are medians over the
rounds, the ratios medians of each round's ratio. If the quickest step is much faster than the median, other load slowed
the variants, and not equally: repeat the benchmark on an idle machine. Accepts the flags of run_main.py; without
--data, it uses the demo data.

The first variant is the original Time-LLM's computation: pad tokens (its end-of-text token) without an attention mask,
prompt and patches in one forward pass, the mapping layer over the whole vocabulary, all attention maps and hidden
states requested (transformers then uses eager attention), torch's own CPU kernels, and unfused Adam.
"""

import contextlib
import itertools
import json
import statistics
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from data_provider.data_factory import data_provider
from data_provider.windows import Spans, WindowDataset, WindowSizes
from dataset.demo import demo_frame
from layers.FrozenLinear import frozen_product
from models import build
from utils.cli.checks import check_options
from utils.cli.command import exit_code_of
from utils.cli.options import get_parser
from utils.cli.signals import leave
from utils.llm.choice import LLMFlags
from utils.llm.loading import LoadedLLM, load_llm
from utils.system.gpu import is_gpu, peak_allocated, reset_peak_memory, synchronize
from utils.system.heap import keep_freed_memory


@dataclass(frozen=True)
class Variant:
    """One configuration of the model's computation: a name, three flags of run_main.py, and two settings.

    `attention_maps`: the LLM returns attention maps and hidden states; `onednn`: oneDNN multiplies in float32 on a CPU.
    """

    name: str
    prompt_padding: str
    no_prefix_cache: bool
    mapping: str
    attention_maps: bool = False
    onednn: bool = True


VARIANTS = (
    Variant("Time-LLM's way", "right", True, "full", attention_maps=True, onednn=False),
    Variant("no attention maps, fused Adam", "right", True, "full", onednn=False),
    Variant("oneDNN's products", "right", True, "full"),
    Variant("masked pads", "left", True, "full"),
    Variant("prefix cache", "left", False, "full"),
    Variant("compact map", "left", False, "compact"),
    Variant("pads seen", "right", False, "compact"),
)
# Added on a CPU, where the others compute in float32.
IN_BFLOAT16 = Variant("compact map, bfloat16", "left", False, "compact")
OUTPUTS = ("output_attentions", "output_hidden_states")


class Runner:
    """The model of one variant with a fixed batch of windows."""

    def __init__(self, variant: Variant, args: Namespace, llm: LoadedLLM, windows: tuple[Tensor, Tensor]):
        self.variant = variant
        self.model = build(Namespace(**vars(args) | vars(variant)), llm)
        fused = not variant.attention_maps  # as in our training; the original Time-LLM's Adam is not fused
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=fused)
        self.context, self.target = windows[0], windows[1].to(self.model.device)

    @contextlib.contextmanager
    def as_configured(self) -> Iterator[None]:
        """Apply the variant's settings to the shared LLM and to oneDNN, and restore the defaults afterwards."""
        backbone = self.model.llm.backbone
        before = backbone.config._attn_implementation
        # Our oneDNN products are for float32; in half precision torch itself calls oneDNN, in every variant.
        torch.backends.mkldnn.enabled = self.variant.onednn or backbone.dtype != torch.float32
        if self.variant.attention_maps:
            backbone.set_attn_implementation("eager")  # the only implementation that returns attention maps
        backbone.config.update(dict.fromkeys(OUTPUTS, self.variant.attention_maps))
        try:
            yield
        finally:
            torch.backends.mkldnn.enabled = True
            backbone.set_attn_implementation(before)
            backbone.config.update(dict.fromkeys(OUTPUTS, False))

    def step(self) -> None:
        """Take one optimizer step on the batch."""
        self.model.train()
        nn.functional.mse_loss(self.model(self.context), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        """Forecast the batch; the original Time-LLM recomputes the prototypes for every batch."""
        self.model.eval()
        with torch.inference_mode():
            if self.variant.attention_maps:
                self.model.mapping_layer.bias.add_(0)  # an in-place change invalidates the cached prototypes
            self.model(self.context)

    def forecast_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return the forecasts and the loss's gradient with respect to the reprogrammed patches."""
        outputs = []
        handle = self.model.reprogramming_layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        self.model.eval()
        forecast = self.model(self.context)
        handle.remove()
        loss = nn.functional.mse_loss(forecast, self.target)
        return forecast.detach(), torch.autograd.grad(loss, outputs[0])[0]

    def tokens(self) -> tuple[int, int]:
        """Count the tokens that pass through the LLM for one batch, without and with gradient."""
        lengths = [len(prompt) for prompt in self.model.tokenize(self.context[..., 0])]
        patches = self.model.prompts.patches * len(lengths)
        if not self.model.llm.uses_prefix:
            return 0, max(lengths) * len(lengths) + patches
        return (max(lengths) - len(self.model.llm.shared_prefix)) * len(lengths), patches


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Measure the peak memory allocated during `run`, minus the memory allocated before, in bytes."""
    if is_gpu(device):
        synchronize(device)
        reset_peak_memory(device)
        before = peak_allocated(device)
        run()
        return peak_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Measure the wall time of `run`, including the device's queued work."""
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def floor_seconds(runner: Runner) -> dict[str, float]:
    """Estimate the lower bound of a training step: its matrix products at this machine's measured rate.

    Counts the LLM's linear layers for the variant's tokens (the forward pass, and the backward pass to the inputs for
    tokens with gradient) and the mapping layer (the forward pass and the backward pass to its weights).
    """
    model, backbone = runner.model, runner.model.llm.backbone
    config = backbone.config.get_text_config()
    dtype, width = model.llm.token_embeddings.dtype, config.hidden_size
    weights = backbone.num_parameters() - backbone.get_input_embeddings().weight.numel()
    without_gradient, with_gradient = runner.tokens()
    passes = without_gradient * (1 - 1 / config.num_hidden_layers) + 2 * with_gradient
    operations = 2 * weights * passes + 4 * model.mapping_layer.weight.numel() * width
    left = torch.randn(max(with_gradient, 1), width, device=model.device, dtype=dtype)
    right = torch.randn(4 * width, width, device=model.device, dtype=dtype)
    times = [seconds(lambda: frozen_product(left, right), model.device) for _ in range(20)]
    rate = 2 * left.shape[0] * width * 4 * width / statistics.median(times)
    return {"operations": operations, "operations_per_second": rate, "seconds": operations / rate}


def measure(runners: list[Runner], rounds: int) -> list[dict]:
    """Measure all variants alternately, for a number of rounds; times are in seconds, memory in bytes."""
    device = runners[0].model.device
    results, references = [], {}
    for runner in runners:
        with runner.as_configured():
            forecast, gradient = runner.forecast_and_gradient()
            # Unmasked pad tokens change the model: compare each kind of padding with its own first variant.
            reference = references.setdefault(runner.variant.prompt_padding, (forecast, gradient))
            without_gradient, with_gradient = runner.tokens()
            result = {
                "variant": runner.variant.name,
                "tokens_without_gradient": without_gradient,
                "tokens_with_gradient": with_gradient,
                "peak_bytes": peak_bytes(runner.step, device),
                "forecast_difference": _difference(forecast, reference[0]),
                "gradient_difference": _difference(gradient, reference[1]),
            }
            results.append({**result, "steps": [], "evaluations": []})
            runner.evaluate()
    for runner, result in [*zip(runners, results, strict=True)] * rounds:
        with runner.as_configured():
            result["steps"].append(seconds(runner.step, device))
            runner.evaluate()  # the first evaluation after a step computes the prototypes: do not time it
            result["evaluations"].append(seconds(runner.evaluate, device))
    for result in results:
        result["step_seconds"] = statistics.median(result["steps"])
        result["quickest_step_seconds"] = min(result["steps"])
        result["step_ratio"] = _ratio(results[0]["steps"], result["steps"])
        result["windows_per_second"] = len(runners[0].context) / statistics.median(result["evaluations"])
        result["evaluation_ratio"] = _ratio(results[0]["evaluations"], result["evaluations"])
        result["peak_share"] = result["peak_bytes"] / results[0]["peak_bytes"]
    return results


def _ratio(reference: list[float], times: list[float]) -> float:
    """Compute the median speedup over a reference."""
    return statistics.median(before / after for before, after in zip(reference, times, strict=True))


def _difference(values: Tensor, reference: Tensor) -> float:
    """Compute the largest absolute difference, relative to the reference's largest value."""
    return ((values - reference).abs().max() / reference.abs().max()).item()


def table(results: list[dict], floor: dict[str, float]) -> str:
    """Format the results as a Markdown table."""
    head = (
        "| variant | step, s | quickest | faster | eval, windows/s | faster | tokens no grad + grad | peak, MB |"
        " share | forecasts differ | gradients differ |"
    )
    row = (
        "| {variant} | {step_seconds:.3f} | {quickest_step_seconds:.3f} | {step_ratio:.2f}x |"
        " {windows_per_second:.2f} | {evaluation_ratio:.2f}x | {tokens_without_gradient} + {tokens_with_gradient} |"
        " {megabytes:.0f} | {peak_share:.0%} | {forecast_difference:.1e} | {gradient_difference:.1e} |"
    )
    rows = [row.format(megabytes=result["peak_bytes"] / 1e6, **result) for result in results]
    bound = f"Lower bound of a step with the compact map: {floor['seconds']:.3f} s"
    rate = f"{floor['operations'] / 1e9:.0f} GFLOP at {floor['operations_per_second'] / 1e9:.0f} GFLOP/s"
    return "\n".join([head, "|" + "---|" * 11, *rows, f"\n{bound} ({rate})"])


def load_windows(args: Namespace) -> tuple[Tensor, Tensor]:
    """Load a batch of evenly spaced training windows: contexts and targets."""
    if args.demo:
        table = demo_frame(rows=4 * (args.seq_len + args.pred_len)).iloc[:, 1:].to_numpy("float32")
        values = table.T.ravel()
        sizes = WindowSizes(args.seq_len, 0, args.pred_len)
        dataset = WindowDataset(values, values, table, Spans.of_table(*table.shape), range(7), sizes)
    else:
        dataset, _ = data_provider(args, "train")
    indices = torch.linspace(0, len(dataset) - 1, args.batch_size).long().tolist()
    context, target, *_ = dataset.__getitems__(indices)
    return context, target[:, -args.pred_len :]


def benchmark(argv: list[str]) -> None:
    """Run the benchmark that the command line describes and print the results."""
    parser = get_parser()
    parser.prog, parser.description = "benchmark.py", __doc__
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5, help="number of repetitions; more give steadier medians")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv if "--data" in argv else ["--demo", *argv])
    check_options(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    # Load the LLM as the first variant needs it, with its pad token and all embeddings on the device; this suits all.
    llm = load_llm(replace(LLMFlags.of(args), prompt_padding="right", mapping="full"))
    windows = load_windows(args)
    runners = [Runner(variant, args, llm, windows) for variant in VARIANTS]
    if llm.device.type == "cpu" and llm.dtype == "float32":
        half = load_llm(replace(LLMFlags.of(args), llm_dtype="bfloat16"))
        runners.append(Runner(IN_BFLOAT16, args, half, windows))
    for runner in runners[1:]:
        runner.model.load_state_dict(runners[0].model.state_dict())
    print(f"{llm.describe()}; {len(windows[0])} windows, {args.seq_len} -> {args.pred_len}; on {llm.device}")
    results = measure(runners, args.rounds)
    floor = floor_seconds(next(runner for runner in runners if runner.variant.name == "compact map"))
    print(table(results, floor))
    if args.json:
        report = {"llm": llm.as_dict(), "variants": results, "floor": floor}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 2 invalid input (one line), 130 interrupted."""
    return exit_code_of(lambda: benchmark(sys.argv[1:] if argv is None else argv), "nothing was written")


if __name__ == "__main__":
    leave(main)
