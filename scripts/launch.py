"""What the launch scripts share: they run run_main.py for one horizon after the other.

    python scripts/launch.py ETTh1                       horizons 96, 192, 336 and 720
    python scripts/launch.py ETTh1 96 192 --seed 1       these; flags of run_main.py come behind them, and win
    python scripts/launch.py ETTh1 --model DLinear       a forecaster without an LLM
    python scripts/launch.py smoke                       made-up data and a tiny LLM: train, test, forecast, in seconds

ETTh1.bat and ETTh1.sh are the first line, smoke.bat and smoke.sh the last, and so on.

    --again      run the horizons, too, that are done; else they are skipped
    --dry_run    print the command lines, run nothing

The first run that fails ends the script, with its exit code. After Ctrl-C, --resume auto goes on.

The LLM is that of --llm_model_path or --llm_model, else the folder or Hub id in the environment variable
TIME_LLM_PATH, else Qwen2.5-3B in 4 bits. Beside an LLM of your own, add --load_in_4bit if you want that.

Relative paths count from the repository's folder. The recipe is that of docs/results.md, 64 windows an optimiser step;
while training, 2000 evenly spaced validation windows are scored, and at the end all windows of the test.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli.checks import check_options
from utils.cli.command import command_line, exit_code_of, run_child
from utils.cli.options import flags_of_repetition, get_parser, has_llm
from utils.cli.places import run_folder
from utils.cli.signals import leave
from utils.errors import UserError
from utils.runs.finished import is_finished

ROOT = Path(__file__).resolve().parents[1]
HORIZONS = ("96", "192", "336", "720")
LLM_VARIABLE = "TIME_LLM_PATH"

# What did best on validation windows (docs/results.md), in batches for a GPU of 6 GB and an LLM of 3 billion weights.
FLAGS = (
    *("--seq_len", "336", "--d_model", "32", "--batch_size", "8", "--grad_accum", "8"),
    *("--lradj", "TST", "--grad_clip", "1", "--mapping_rate", "0.003", "--prompt_domain", "1"),
    *("--eval_windows", "2000", "--test_windows", "0", "--skip_epoch_test"),
)
# Where there is little to learn beyond the fitted line: fewer weights, more dropout, fewer and smaller steps; longer
# patches, of a day if rows are hours.
SMALL_RECIPE = (
    *("--patch_len", "24", "--stride", "24", "--n_heads", "4", "--d_ff", "32", "--dropout", "0.3"),
    *("--learning_rate", "0.0003", "--prompt_decimals", "0", "--max_steps", "400", "--eval_steps", "100"),
)
# ETTm1 has more to give.
LARGE_RECIPE = (
    *("--stride", "16", "--d_ff", "64", "--learning_rate", "0.0005", "--prompt_decimals", "1"),
    *("--max_steps", "1200", "--eval_steps", "200"),
)
LARGE_DATA = ("ETTm1",)
FLAGS_OF_TIMELLM = ("--residual", "linear", "--normalize_prototypes")
SMOKE_FLAGS = ("--demo", "--model_id", "smoke", "--max_steps", "3", "--eval_windows", "32", "--predict")


class Run(NamedTuple):
    """One run of run_main.py: what messages call it, its flags, and what they parse to."""

    name: str
    flags: list[str]
    args: argparse.Namespace


def plan_runs(name: str, words: Sequence[str]) -> list[Run]:
    """Return the runs that a script stands for.

    Args:
        name: of a data set, or smoke.
        words: horizons, then flags of run_main.py.

    Raises:
        UserError: if a horizon or the value of a flag makes no sense.
        SystemExit: if run_main.py would not know a flag.
    """
    count = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    horizons, further = words[:count], words[count:]
    for word in horizons:
        if name == "smoke" or not re.fullmatch("[0-9]+", word):
            raise UserError(f"{word} is no horizon of {name}: first come whole numbers, then flags with --")
    if name == "smoke":
        lines = {name: [*SMOKE_FLAGS, *further]}
    else:
        for flag in {word.partition("=")[0] for word in further} & {"--data", "--pred_len"}:
            raise UserError(f"{flag} is what this script sets: leave it out, horizons come first and without a flag")
        of_data = LARGE_RECIPE if name in LARGE_DATA else SMALL_RECIPE
        chosen = [*FLAGS, *of_data, *_timellm_flags(name, further), *further]
        lines = {
            f"{name} {horizon}": ["--data", name, "--pred_len", horizon, *chosen] for horizon in horizons or HORIZONS
        }
    runs = [Run(label, flags, get_parser().parse_args(flags)) for label, flags in lines.items()]
    for run in runs:
        check_options(run.args)
    return runs


def _timellm_flags(data: str, further: Sequence[str]) -> list[str]:
    """Return flags of Time-LLM alone: its recipe's; an LLM, unless `further` names one; a name for the run folder."""
    parser = get_parser()
    parser.set_defaults(llm_model="")  # its default cannot be told from the same name given
    asked = parser.parse_args(["--data", data, *further])
    if not has_llm(asked):
        return []
    flags = [*FLAGS_OF_TIMELLM]
    if not asked.llm_model_path and not asked.llm_model:
        path = os.environ.get(LLM_VARIABLE)
        flags += ["--llm_model_path", path] if path else ["--llm_model", "QWEN", "--load_in_4bit"]
    llm = parser.parse_args(["--data", data, *flags, *further])
    parts = [
        Path(llm.llm_model_path or llm.llm_model).name,
        f"{llm.llm_layers}layers" if llm.llm_layers else "",
        "nf4" if llm.load_in_4bit else "",
        llm.ablation if llm.ablation != "none" else "",
    ]
    comment = re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts))).strip("-._")
    return [*flags, "--model_comment", comment]


def is_done(args: argparse.Namespace) -> bool:
    """Return whether every repetition of a training run has ended and has its scores, of these flags and data."""
    if args.plan or not args.is_training:
        return False
    with contextlib.chdir(ROOT):
        return all(
            # access() says no to a name that is too long, too: run_main.py tells the user.
            os.access(run_folder(args, repetition) / "metrics.json", os.F_OK)
            and is_finished(run_folder(args, repetition), flags_of_repetition(args, repetition))
            for repetition in range(args.itr)
        )


def launch(runs: Sequence[Run], again: bool, dry_run: bool) -> int:
    """Run one after the other until one fails, and return the last exit code.

    Args:
        runs: what to run.
        again: also those that are done.
        dry_run: only print the command lines.
    """
    for place, run in enumerate(runs):
        if not again and is_done(run.args):
            done = f"{run.name}: skipped, it is done in {run_folder(run.args, 0)}"
            print(f"{done} (--again runs it anew, --des NAME in a folder of its own)", file=sys.stderr)
            continue
        words = ["run_main.py", *run.flags]
        print(command_line(["python", *words]), flush=True)
        code = 0 if dry_run else run_child([sys.executable, *words], ROOT)
        if code == 130:
            print(f"interrupted: at {run.name}; the same command with --resume auto goes on", file=sys.stderr)
            return code
        if code:
            left = ", ".join(later.name for later in runs[place + 1 :])
            print(f"error: {run.name} failed with exit code {code}; not started: {left or 'none'}", file=sys.stderr)
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong input, 130 interrupted, else what the run that failed returned."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    own = {"--again", "--dry_run"} & set(words)
    name, *rest = [word for word in words if word not in own] or [""]

    def work() -> int:
        return launch(plan_runs(name, rest), again="--again" in own or name == "smoke", dry_run="--dry_run" in own)

    return exit_code_of(work, "nothing was started")


if __name__ == "__main__":
    leave(main)
