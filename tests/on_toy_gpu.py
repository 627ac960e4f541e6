"""What must go on a GPU as it does on the CPU, on the toy GPU; test_toy_device.py runs this in a process of its own."""

import contextlib
import gc
import json
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import layers.FrozenLinear
import models
import utils.runs.pictures
import utils.training.evaluation
import utils.training.experiment
import utils.training.trainer
from scripts import check_gpu
from scripts.benchmark import peak_bytes, seconds
from tests.conftest import largest_difference
from tests.toy_device import GPU, DeviceWaitError, MixedDevicesError, set_up
from utils.cli.options import get_parser
from utils.runs import load_run
from utils.system.gpu import limit_memory
from utils.system.processes import build_accelerator
from utils.training.batch_size import fit_batch_size
from utils.training.optimization import build_optimizer
from utils.training.trainer import Trainer

LIBRARIES = set_up()
ON_CPU, ON_GPU = "cpu", str(GPU.device)

# What else would differ: a GPU of 16 bits computes in them, and draws dropout by another kernel.
ALIKE = ["--llm_dtype", "float32", "--dropout", "0"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test begins on the CPU, with an empty record of waits; pictures and plans are made on the CPU anyway."""
    monkeypatch.setattr(utils.runs.pictures, "save_picture", lambda *_: None)
    monkeypatch.setattr(utils.training.experiment, "memory_summary", lambda *_: "")
    use(ON_CPU, monkeypatch)
    GPU.reset()
    yield
    PartialState._reset_state()


def use(device, monkeypatch):
    """Let accelerate, and so all that asks it, take a device."""
    PartialState._reset_state()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)


@pytest.fixture
def same_kernels(monkeypatch):
    """Let the CPU leave out the kernels that are for its own tensors: what is compared is not their rounding."""
    monkeypatch.setattr(layers.FrozenLinear, "_is_float32_on_cpu", lambda tensor: False)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def on_gpu(*sizes):
    return torch.ones(*sizes, device=GPU.device)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda: on_gpu(3).sum().item(),
        lambda: bool(on_gpu(1)),
        lambda: on_gpu(3).cpu(),
        lambda: on_gpu(3).to("cpu", non_blocking=True),
        lambda: torch.zeros(3).copy_(on_gpu(3)),
        lambda: on_gpu(3).nonzero(),
        lambda: on_gpu(3)[on_gpu(3) > 0],
        lambda: on_gpu(3)[[0, 1]],
        lambda: on_gpu(3)[torch.tensor([0, 1])],
        lambda: on_gpu(3).masked_select(on_gpu(3) > 0),
        lambda: torch.equal(on_gpu(3), on_gpu(3)),
        lambda: torch.tensor([1.0, 2.0], device=GPU.device),
        lambda: torch.zeros(3).to(GPU.device, non_blocking=True),  # of memory that is not pinned
        lambda: torch.zeros(3).pin_memory().to(GPU.device),
    ],
)
def test_each_wait_is_noticed(waiting):
    waiting()
    assert len(GPU.waits) == 1
    with GPU.never_waited_for(), pytest.raises(DeviceWaitError):
        waiting()


def test_what_a_gpu_does_by_itself_is_no_wait():
    with GPU.never_waited_for():
        values = torch.zeros(3).pin_memory()[1:].to(GPU.device, non_blocking=True) + torch.tensor(1.0)
        values = torch.where(values > 0, values, 0.0)[torch.arange(2, device=GPU.device)]
        torch.full((3,), 2.0, device=GPU.device).masked_fill_(on_gpu(3) > 0, 3.0)
    assert values.cpu().tolist() == [1, 1]


def test_devices_do_not_mix():
    for mixed in (lambda: on_gpu(3) + torch.ones(3), lambda: torch.ones(3)[on_gpu(1).long()]):
        with pytest.raises(MixedDevicesError):
            mixed()


def test_its_memory_is_counted_and_can_be_short():
    before = GPU.memory_allocated()
    held = on_gpu(1000)
    view = held[10:]
    assert GPU.memory_allocated() == before + 4000
    del held
    assert GPU.memory_allocated() == before + 4000
    GPU.capacity = before + 5000
    with pytest.raises(torch.OutOfMemoryError):
        view.exp()
    del view
    assert GPU.memory_allocated() == before


@pytest.fixture
def forecaster_on(monkeypatch):
    """Return a function that builds a forecaster on a device, from the same random numbers each time."""

    def build(device, *argv):
        use(device, monkeypatch)
        words = ["--data", "ETTh1", "--seq_len", "48", "--pred_len", "8", "--d_model", "8", "--n_heads", "2"]
        args = get_parser().parse_args([*words, "--d_ff", "8", *ALIKE, *argv])
        torch.manual_seed(0)
        return models.build(args)

    return build


def windows(count=5):
    """Windows whose prompts differ in length, in pinned memory, as a loader gives them; and what follows them."""
    walks = np.random.default_rng(3).normal(size=(count, 56)).cumsum(-1) * np.logspace(-2, 3, count)[:, None]
    values = torch.tensor(walks, dtype=torch.float32)[..., None].pin_memory()
    return values[:, :48], values[:, 48:]


def trained(model, allowed=()):
    """Return what two steps make: forecasts, gradients and weights.

    In the second step nobody may wait, but below functions of the names that are `allowed`.
    """
    optimizer = build_optimizer("adam", model.parameters(), 1e-3)
    context, target = windows()

    def step():
        optimizer.zero_grad()
        forecast = model.train()(context)
        functional.mse_loss(forecast, target.to(forecast.device, non_blocking=True)).backward()
        optimizer.step()
        with torch.inference_mode():
            return forecast.detach(), model.eval()(context)

    step()
    GPU.waits.clear()
    with GPU.never_waited_for(allowed):
        forecast, evaluated = step()
    assert bool(GPU.waits) == bool(allowed and forecast.device == GPU.device)
    assert len(GPU.waits) <= 2 * 2, "one or two each time that the LLM is run"
    results = {"forecast": forecast, "evaluation": evaluated}
    for name, weights in model.named_parameters():
        results |= {name: weights.detach(), f"gradient of {name}": weights.grad}
    return {name: values.cpu() for name, values in results.items()}


CASES = {
    "qwen2": [],
    "qwen2 one pass": ["--no_prefix_cache", "--prompt_padding", "right", "--mapping", "full"],
    "llama float16": ["--llm_dtype", "float16"],
    "llama right": ["--prompt_padding", "right", "--mapping", "full", "--gradient_checkpointing"],
    "gpt2": ["--mapping", "full", "--gradient_checkpointing"],
    "gpt2 one pass": ["--no_prefix_cache"],
    "gpt2 sees pads": [],
    "bert": [],
    "bert right": ["--prompt_padding", "right", "--mapping", "full", "--gradient_checkpointing"],
}


@pytest.mark.parametrize("case", CASES)
def test_training_makes_what_it_makes_on_the_cpu(forecaster_on, tiny_llm, same_kernels, case):
    results = []
    for device in (ON_CPU, ON_GPU):
        model = forecaster_on(device, "--llm_model_path", tiny_llm(case.split()[0]), *CASES[case])
        assert not model.llm.padding_leaks
        assert model.llm.uses_prefix == (not {"bert", "pass"} & set(case.split())), model.llm.limitations()
        model.llm.padding_leaks = "sees pads" in case
        # transformers looks at masks and positions of a causal model, unless it is shown its keys and values.
        results.append(trained(model, ("_run_in_one_pass",) if "one pass" in case else ()))
    words = model.llm_info.backbone.get_input_embeddings().weight
    assert words.device == (GPU.device if "full" in CASES[case] else torch.device("cpu"))
    assert {weights.device for weights in model.parameters()} == {GPU.device}
    expected, made = results
    for name, values in expected.items():
        # Attention does not notice this one: its gradient is rounding alone.
        if not name.endswith("key_projection.bias"):
            assert largest_difference(made[name], values) < 1e-6, name


@pytest.fixture
def run_on(run, monkeypatch):
    """Return a function that runs the command line on a device and returns its run folder."""

    def run_there(device, name, *argv):
        use(device, monkeypatch)
        finished = run("--skip_epoch_test", "--des", name, *argv)
        assert finished.code == 0, finished.err
        run_there.out = finished.out
        return next(folder for folder in finished.folders if f"_{name}_" in folder.name)

    return run_there


def written(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def same_metrics(one, other):
    return all(largest_difference(one[name], other[name]) < 1e-6 for name in ("mse", "mae", "smape", "mse_by_step"))


def test_train_test_and_predict_give_what_they_give_on_the_cpu(run_on, same_kernels, flags, csv_folder):
    words = [*flags, *ALIKE, "--max_steps", "2", "--eval_windows", "21", "--level", "50"]
    metrics, forecasts = [], []
    for device in (ON_CPU, ON_GPU):
        name = device.partition(":")[0]
        folder = run_on(device, name, *words, "--predict")
        at_once = written(folder, "metrics.json")
        run_on(device, name, *words, "--is_training", "0")
        metrics.append(written(folder, "metrics.json"))
        forecasts.append(pd.read_csv(folder / "forecast.csv").drop(columns="date"))
        assert same_metrics(metrics[-1], at_once)
        assert written(folder, "args.json")["device"] == device
    assert same_metrics(*reversed(metrics))
    assert largest_difference(*reversed(forecasts)) < 1e-6
    assert metrics[1]["cost"]["peak_memory"] == GPU.max_memory_allocated()
    in_python = load_run(folder, device=ON_GPU).predict(pd.read_csv(csv_folder / "small.csv"), level=50)
    assert largest_difference(in_python.drop(columns="date"), forecasts[1]) < 1e-6


def test_notes_are_read_and_covariates_help_as_on_the_cpu(run_on, same_kernels, flags, tmp_path):
    drawn, rows = np.random.default_rng(0), 500
    sale, heat = np.repeat(drawn.random(rows // 10) < 0.3, 10), drawn.normal(size=rows)
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq="h"), "heat": heat})
    frame["sold"] = 20 + 8 * sale + np.abs(2 * heat)
    frame.loc[rows - 8 :, "sold"] = np.nan
    frame["note"] = np.where(sale, "A big sale begins.", "An ordinary day.")
    frame.to_csv(tmp_path / "shop.csv", index=False)
    words = [*flags, *ALIKE, "--root_path", str(tmp_path), "--data_path", "shop.csv", "--max_steps", "2"]
    words += ["--covariates", "heat", "--notes", "note", "--covariate_model", "boosted", "--predict"]
    metrics, forecasts = [], []
    for device in (ON_CPU, ON_GPU):
        folder = run_on(device, device.partition(":")[0], *words)
        assert "2 of them read" in run_on.out
        (store,) = folder.parent.glob("notes-*.safetensors")
        store.unlink()  # so that each device reads
        metrics.append(written(folder, "metrics.json"))
        forecasts.append(pd.read_csv(folder / "forecast.csv").drop(columns="date"))
    assert same_metrics(*metrics)
    assert largest_difference(*forecasts) < 1e-5


def test_a_run_goes_on_with_the_random_numbers_of_the_gpu(run_on, flags):
    GPU.draws_its_own_numbers()
    words = [*flags, "--ablation", "no_llm"]
    whole = run_on(ON_GPU, "whole", *words)
    run_on(ON_GPU, "parts", *words, "--max_steps", "2")
    parts = run_on(ON_GPU, "parts", *words, "--resume")
    weights, resumed = (torch.load(folder / "last", weights_only=True)["weights"] for folder in (whole, parts))
    for name, values in weights.items():
        assert torch.equal(resumed[name], values), name


def test_a_batch_that_does_not_fit_is_halved(run_on, same_kernels, flags):
    words = [*flags, *ALIKE, "--ablation", "no_llm", "--max_steps", "2"]
    halves = [*words, "--batch_size", "8", "--grad_accum", "2"]
    gc.collect()
    GPU.reset_peak_memory_stats()
    run_on(ON_GPU, "fits", *halves)
    gc.collect()  # its model
    GPU.capacity = round(1.2 * GPU.max_memory_allocated())
    halved = run_on(ON_GPU, "halved", *words, "--auto_batch_size")
    assert "Memory is short: --batch_size 8 --grad_accum 2" in run_on.out
    expected = run_on(ON_CPU, "cpu", *halves)
    assert same_metrics(written(halved, "metrics.json"), written(expected, "metrics.json"))


def test_a_trial_of_a_batch_leaves_the_random_numbers_of_the_gpu_alone(forecaster_on, tiny_llm):
    GPU.draws_its_own_numbers()
    model = forecaster_on(ON_GPU, "--llm_model_path", tiny_llm("qwen2"), "--ablation", "no_llm", "--dropout", "0.5")
    args = Namespace(batch_size=4, eval_batch_size=0, grad_accum=1, seq_len=48, optimizer="adam")
    before = GPU.get_rng_state()
    fit_batch_size(args, build_accelerator(0, 1, False, shares_buffers=False), model)
    assert torch.equal(GPU.get_rng_state(), before)
    model(windows()[0])
    assert not torch.equal(GPU.get_rng_state(), before), "dropout draws there"


class WatchedBar:
    """A progress bar in a loop that, from its second batch on, may not wait, but in some functions."""

    disable = True

    def __init__(self, bar, allowed):
        self.bar, self.allowed = bar, allowed

    def __iter__(self):
        with contextlib.ExitStack() as stack:
            for number, batch in enumerate(self.bar):
                if number == 1:
                    stack.enter_context(GPU.never_waited_for(self.allowed))
                yield batch


# What the documentation says of waiting: a line now and then; and who looks at forecasts must read them back.
ALLOWED = {utils.training.trainer: ("_report_progress",), utils.training.evaluation: ("_gather_forecasts",)}


@pytest.fixture
def watched_loops(monkeypatch):
    """Let no loop wait for the device; return the counts of their batches."""
    batches = []
    for module, allowed in ALLOWED.items():

        def bar(loader, *rest, made=module.windows_bar, allowed=allowed, **options):
            batches.append(len(loader))
            return WatchedBar(made(loader, *rest, **options), allowed)

        monkeypatch.setattr(module, "windows_bar", bar)
    monkeypatch.setattr(utils.training.trainer, "REPORT_EVERY", 5)
    return batches


def test_no_batch_waits_for_the_gpu(run_on, flags, watched_loops, monkeypatch):
    lines = []
    said = Trainer._report_progress
    monkeypatch.setattr(Trainer, "_report_progress", lambda *given: (lines.append(given), said(*given)))
    more = ["--grad_clip", "1", "--grad_accum", "2", "--residual", "linear", "--level", "50"]
    size = ["--batch_size", "8", "--eval_windows", "21", "--max_steps", "0", "--percent", "8"]
    run_on(ON_GPU, "watched", *flags, *more, *size)
    assert sum(count > 2 for count in watched_loops) >= 4, "training, validation, calibration, test"
    in_lines = [wait for wait in GPU.waits if ":_report_progress " in wait]
    assert len(in_lines) == len(lines) > 0, "a wait a line"


def test_a_benchmark_sees_the_memory_above_what_was_there():
    kept = on_gpu(1000)
    assert peak_bytes(lambda: on_gpu(250).sum(), GPU.device) >= 1000
    assert peak_bytes(lambda: kept.sum(), GPU.device) < 1000
    assert seconds(lambda: kept.sum(), GPU.device) > 0


def test_the_check_of_a_gpu_measures_memory_and_speed(flags, monkeypatch):
    use(ON_GPU, monkeypatch)
    for name, few in (("STEPS", 6), ("WARM_UP", 2), ("EVALUATED", 2)):
        monkeypatch.setattr(check_gpu, name, few)
    monkeypatch.setattr(check_gpu, "plan_memory", lambda args: Namespace(total=check_gpu.GIB))
    args = get_parser().parse_args([*flags, "--llm_dtype", "float32"])
    found = check_gpu.measure_memory(args, 0.5)
    assert 0 < found["peak"] < 0.5 and found["planned"] == 1
    assert found["steps_per_second"] > 0 and found["evaluation_windows_per_second"] > 0
    GPU.reset()
    with pytest.raises(torch.OutOfMemoryError):
        check_gpu.measure_memory(args, 1e-5)
    limit_memory(GPU.device, 2**40)


def test_mixed_precision_leaves_the_llm_in_its_own(run_on, flags):
    GPU.has_bfloat16 = True
    folder = run_on(ON_GPU, "amp", *flags, "--use_amp", "--max_steps", "1", "--eval_windows", "7")
    metrics = written(folder, "metrics.json")
    assert np.isfinite(metrics["mse"])
    assert metrics["llm"]["dtype"] == "bfloat16"


def test_products_with_weights_of_4_bits_are_those_of_the_cpu():
    """By bitsandbytes' functions.

    Its `Linear4bit.to()` writes a GPU's tensor into one of the CPU, for which the toy GPU's are too foreign. That an
    LLM is loaded in 4 bits, and a model around it runs, only the tests marked `gpu` show.
    """
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn(64, 128, generator=generator), torch.randn(3, 128, generator=generator)
    results = []
    for device in (ON_CPU, ON_GPU):
        packed, state = quantize_4bit(weights.to(device), quant_type="nf4", compress_statistics=True)
        there = inputs.detach().to(device).requires_grad_()
        with GPU.never_waited_for():
            product = matmul_4bit(there, packed.t(), state)
            product.square().sum().backward()
        assert {packed.device, state.absmax.device, product.device} == {torch.device(device)}
        results.append(
            [tensor.detach().cpu() for tensor in (packed, dequantize_4bit(packed, state), product, there.grad)]
        )
    for expected, made in zip(*results, strict=True):
        assert largest_difference(made, expected) < 1e-6
