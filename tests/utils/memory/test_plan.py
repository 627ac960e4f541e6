import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Qwen2Config

import utils.memory.plan
import utils.memory.trial_step
import utils.training.batch_size
from base_models.make_tiny_llm import make_tiny_llm
from layers.FrozenLLM import FrozenLLM
from tests.conftest import SHARED, largest_difference, needs_shared
from utils.cli.options import get_parser
from utils.memory.plan import memory_warning, plan_memory, savings
from utils.system.gpu import forbid_host_fallback
from utils.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[3]
QWEN = SHARED / "qwen2.5-3b"
USERS_COMMAND = [
    *("--data", "ETTm1", "--seq_len", "512", "--pred_len", "96", "--d_model", "32", "--d_ff", "32"),
    *("--batch_size", "8", "--load_in_4bit", "--llm_model_path", str(QWEN)),
]


def plan(*argv):
    return plan_memory(get_parser().parse_args([str(word) for word in argv]))


def test_the_plan_needs_the_config_alone(run, flags, tiny_llm, tmp_path):
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(Path(tiny_llm("qwen2")) / "config.json", folder)
    done = run(*flags, "--llm_model_path", folder, "--plan")
    assert (done.code, done.err, done.folders) == (0, "", [])
    for part in ("LLM, frozen layers", "trained layers", "optimizer", "activations", "peak of a step", "It fits"):
        assert part in done.out


def test_a_plan_that_does_not_fit_says_what_helps(run, flags, monkeypatch):
    monkeypatch.setattr(utils.memory.plan, "free_bytes", lambda device: 10_000_000)
    done = run(*flags, "--mapping", "full", "--plan")
    assert done.code == 0
    assert "It does not fit: try " in done.out
    assert "--batch_size 8 --grad_accum 2 (saves " in done.out
    assert "to spare that may be too much: try " in run(*flags).out


def test_an_llm_without_a_plan_runs_all_the_same(run, flags, monkeypatch):
    def looks_at_values(*_):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(utils.memory.trial_step, "try_step", looks_at_values)
    done = run(*flags)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Memory: no plan for this LLM (qwen2: Tensor.item() cannot be called")
    refused = run(*flags, "--plan")
    assert refused.code == 2 and "run without --plan" in refused.err
    monkeypatch.setattr(Trainer, "fit", full_device)
    assert run(*flags).err.startswith("error: out of memory: try --gradient_checkpointing")


def test_planning_draws_no_random_numbers(flags):
    before = torch.get_rng_state()
    plan(*flags)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_says_at_its_start_what_it_needs(run, flags):
    assert "Memory: about 0.1" in run(*flags).out.splitlines()[0]


@needs_shared("qwen2.5-3b")
def test_the_plan_of_the_users_command_agrees_with_arithmetic():
    whole = plan(*USERS_COMMAND)
    assert whole.llm == pytest.approx(1.43e9, rel=0.01)  # 2.77 billion numbers at 0.516 bytes
    assert whole.embedding == 151936 * 2048 * 4  # float32 on a CPU
    full = plan(*USERS_COMMAND, "--mapping", "full")
    assert 2 * full.trainable + full.optimizer == pytest.approx(2.43e9, rel=0.02)
    small = plan(*USERS_COMMAND, "--gradient_checkpointing")
    assert small.activations < whole.activations / 10
    assert small.total < whole.total / 1.5


@needs_shared("qwen2.5-3b")
def test_what_is_advised_is_what_it_saves():
    args = get_parser().parse_args([*USERS_COMMAND, "--mapping", "full"])
    before = plan_memory(args)
    saved = dict(savings(args, before))
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert {"--mapping compact", "--llm_layers 18", "--batch_size 4 --grad_accum 2"} < set(saved)
    after = plan(*USERS_COMMAND, "--mapping", "full", "--gradient_checkpointing")
    assert saved["--gradient_checkpointing"] == before.total - after.total > 0


def test_further_layers_are_counted_as_if_all_were_tried(flags, tmp_path, monkeypatch):
    flags = [*flags, "--llm_model_path", str(make_tiny_llm("llama", tmp_path / "six", layers=6))]
    by_few = plan(*flags)
    monkeypatch.setattr(utils.memory.trial_step, "trial_layers", lambda choice: (6,))
    assert plan(*flags).total == pytest.approx(by_few.total, rel=0.02)


@pytest.fixture(scope="session")
def reduced_qwen(tmp_path_factory):
    """Qwen2.5 with its real vocabulary and tokenizer, but 8 layers of width 512, random, in float16."""
    folder = tmp_path_factory.mktemp("reduced-qwen")
    config = json.loads((QWEN / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2752, "num_attention_heads": 8}
    torch.manual_seed(0)
    AutoModel.from_config(Qwen2Config.from_dict(config), dtype=torch.float16).save_pretrained(folder)
    for file in QWEN.glob("*"):
        if file.name != "config.json":
            shutil.copy(file, folder)
    return folder


# Run in a process of its own: the most memory it has ever had cannot be reset.
_MEASURE = """
import json, sys
from resource import RUSAGE_SELF, getrusage
import bitsandbytes, models.TimeLLM, run_main, utils.training.batch_size, utils.training.trainer
from transformers.models.qwen2 import modeling_qwen2
from utils.memory.plan import plan_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

planned = plan_memory(run_main.get_parser().parse_args(sys.argv[1:])).total
before = resident()
code = run_main.main(sys.argv[1:])
print(json.dumps([code, planned, 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)]))
"""


@needs_shared("ETT-small")
@needs_shared("qwen2.5-3b")
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.slow  # twenty seconds each
@pytest.mark.parametrize(
    "extra",
    [
        ["--batch_size", "16"],
        ["--batch_size", "8", "--load_in_4bit"],
        ["--batch_size", "8", "--load_in_4bit", "--mapping", "full"],
        ["--batch_size", "16", "--load_in_4bit", "--gradient_checkpointing"],
        ["--batch_size", "8", "--no_prefix_cache"],
        ["--batch_size", "24", "--llm_layers", "4"],
    ],
    ids=" ".join,
)
def test_the_plan_is_within_15_percent_of_what_a_run_uses(extra, reduced_qwen, tmp_path):
    argv = [
        *("--data", "ETTm1", "--root_path", SHARED / "ETT-small", "--seq_len", "512", "--pred_len", "96"),
        *("--d_model", "32", "--d_ff", "32", "--llm_model_path", reduced_qwen, "--checkpoints", tmp_path),
        *("--max_steps", "3", "--eval_windows", "8", "--skip_epoch_test", *extra),
    ]
    words = [sys.executable, "-c", _MEASURE, *map(str, argv)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    code, planned, used = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    print(f"planned {planned / 1e6:.0f} MB, used {used / 1e6:.0f} MB")
    assert planned == pytest.approx(used, rel=0.15)


def full_device(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_full_device_gets_one_line_with_what_helps(run, flags, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", full_device)
    done = run(*flags)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: out of memory on cpu: a training step needs about ")
    assert "--batch_size 8 --grad_accum 2 (saves " in done.err


def test_other_errors_of_torch_are_not_taken_for_a_full_device(run, flags, monkeypatch):
    def broken(batch_size, args, model):
        raise RuntimeError("shapes")

    monkeypatch.setattr(utils.training.batch_size, "_try_step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(*flags, "--auto_batch_size")


def only_up_to(windows, monkeypatch):
    try_step = utils.training.batch_size._try_step

    def limited(batch_size, args, model):
        return try_step(batch_size, args, model) if batch_size <= windows else full_device()

    monkeypatch.setattr(utils.training.batch_size, "_try_step", limited)


def test_auto_batch_size_keeps_the_windows_of_an_optimizer_step(run, flags, monkeypatch):
    flags = [*flags, "--eval_batch_size", "4"]
    given = run(*flags, "--batch_size", "4", "--grad_accum", "4")
    only_up_to(4, monkeypatch)
    found = run(*flags, "--auto_batch_size", "--des", "found")
    assert found.code == 0
    assert "Memory is short: --batch_size 4 --grad_accum 4 from here on" in found.out
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in found.folders)
    assert (second["mse"], given.code) == (first["mse"], 0)
    flags_kept = json.loads((found.folders[0] / "args.json").read_text())
    assert (flags_kept["batch_size"], flags_kept["grad_accum"], flags_kept["eval_batch_size"]) == (4, 4, 4)


def test_auto_batch_size_changes_nothing_where_there_is_room(run, flags):
    plain = run(*flags)
    again = run(*flags, "--auto_batch_size", "--des", "auto")
    assert "Memory is short" not in again.out
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in again.folders)
    assert (plain.code, first["mse"]) == (0, second["mse"])


def test_auto_batch_size_gives_up_in_one_line(assert_refused, flags, monkeypatch):
    only_up_to(0, monkeypatch)
    assert_refused([*flags, "--auto_batch_size"], "out of memory", "try --batch_size 8")


class Processes:
    """Stands for an accelerator of two processes; the other one can do with so many windows."""

    device = torch.device("cpu")
    gradient_accumulation_steps = 1

    def __init__(self, other):
        self.other = other
        self.gathered = []

    def gather(self, fitting):
        self.gathered.append(fitting.item())
        return torch.tensor([fitting.item(), self.other])

    def print(self, *_):
        pass


def test_where_nothing_fits_into_one_process_all_give_up(flags, monkeypatch):
    args = get_parser().parse_args(flags)
    for here, other in ((16, 0), (0, 16)):
        monkeypatch.setattr(utils.training.batch_size, "_largest_fitting", lambda *_, here=here: here)
        processes = Processes(other)
        with pytest.raises(torch.OutOfMemoryError):
            utils.training.batch_size.fit_batch_size(args, processes, None)
        assert processes.gathered == [here], "else the other waits for ever"
    monkeypatch.setattr(utils.training.batch_size, "_largest_fitting", lambda *_: 16)
    fitted = utils.training.batch_size.fit_batch_size(args, Processes(4), None)
    assert (fitted.batch_size, fitted.grad_accum) == (4, 4)


def test_the_trial_may_not_spill_into_host_memory(monkeypatch):
    class Card:
        total_memory = 100

    shares = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    with pytest.raises(ValueError, match="stop"), forbid_host_fallback(torch.device("cuda")):
        assert shares == [0.8]
        raise ValueError("stop")
    assert shares == [0.8, 1.0]


def test_a_plan_fits_with_room_to_spare(flags):
    needed = plan(*flags)
    assert not replace(needed, free=round(1.05 * needed.total)).fits
    assert replace(needed, free=round(1.15 * needed.total)).fits


@pytest.mark.parametrize(("size", "tried"), [(8, [8, 4, 2, 1]), (6, [6, 3, 1]), (7, [7, 1]), (1, [1])])
def test_batch_sizes_that_are_tried(size, tried):
    assert list(utils.training.batch_size._sizes(size)) == tried


def test_a_warning_before_the_driver_spills(monkeypatch):
    class Card:
        total_memory = 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    for used, warned in ((94, False), (96, True)):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, used=used: used)
        assert bool(memory_warning(torch.device("cuda"))) == warned
    assert memory_warning(torch.device("cpu")) == ""


def test_optimizers_for_a_gpu_are_refused_without_one(assert_refused, flags):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("adamw8bit", "paged_adamw8bit"):
        assert_refused([*flags, "--optimizer", name], f"--optimizer {name}", "adamw")


def test_adamw_decays_the_weights(run, flags):
    for number, name in enumerate(("adam", "adamw")):
        assert run(*flags, "--optimizer", name, "--des", str(number)).code == 0
    adam, adamw = (
        torch.load(folder / "checkpoint", weights_only=True)["weights"]
        for folder in sorted(Path("checkpoints").iterdir())
    )
    name = "mapping_layer.weight"
    assert adamw[name].norm() < adam[name].norm()


def test_a_model_without_blocks_cannot_be_recomputed(assert_refused, flags, monkeypatch):
    monkeypatch.setattr(FrozenLLM, "blocks", staticmethod(lambda backbone: []))
    assert_refused([*flags, "--gradient_checkpointing"], "leave out --gradient_checkpointing")


@pytest.mark.parametrize("more", [[], ["--load_in_4bit"], ["--mapping", "full"]], ids=" ".join)
def test_a_run_with_recomputed_blocks_learns_the_same(run, flags, more):
    for number, extra in enumerate(([], ["--gradient_checkpointing"])):
        assert run(*flags, *more, *extra, "--des", str(number)).code == 0
    plain, again = (torch.load(folder / "checkpoint", weights_only=True) for folder in run(*flags, "--plan").folders)
    for name, tensor in plain["weights"].items():
        assert largest_difference(again["weights"][name], tensor) < 1e-5, name


def test_half_precision_trains_as_float32_does(run, flags):
    losses = []
    for dtype in ("float32", "float16"):
        assert run(*flags, "--llm_dtype", dtype, "--des", dtype, "--max_steps", "20").code == 0
    for folder in sorted(Path("checkpoints").iterdir()):
        losses.append(json.loads((folder / "metrics.json").read_text())["mse"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
