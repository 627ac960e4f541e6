"""Run run_main.py for one horizon after another; the .bat and .sh scripts call this file.

    python scripts/launch.py ETTh1                       horizons 96, 192, 336 and 720
    python scripts/launch.py ETTh1 96 192 --seed 1       these horizons; later flags go to run_main.py and take priority
    python scripts/launch.py ETTh1 --model DLinear       a forecaster without an LLM
    python scripts/launch.py smoke                       synthetic data and a tiny LLM: train, test, forecast in seconds

    --again      also run horizons that are done; by default they are skipped
    --dry_run    print the command lines without running them

The first run that fails ends the script, with its exit code. After Ctrl-C, the same command with --resume auto resumes.
Relative paths start at the repository's folder.

The LLM is that of --llm_model_path or --llm_model, else the folder or Hub id in the environment variable
TIME_LLM_PATH, else Qwen2.5-3B in 4 bits. To load another LLM in 4 bits, add --load_in_4bit. The recipe is that of
docs/results.md: 64 windows per optimizer step, and validation on 2000 windows; the final test scores all windows.
"""

import argparse
import contextlib
import itertools
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
from utils.errors import UserError, listed
from utils.runs.finished import is_finished

ROOT = Path(__file__).resolve().parents[1]
HORIZONS = ("96", "192", "336", "720")
LLM_VARIABLE = "TIME_LLM_PATH"

# The best settings on validation windows (docs/results.md); the batch size fits an LLM of 3 billion weights in 6 GB.
FLAGS = (
    "--seq_len 336 --d_model 32 --batch_size 8 --grad_accum 8 --lradj TST --grad_clip 1 --mapping_rate 0.003"
    " --prompt_domain 1 --eval_windows 2000 --test_windows 0 --skip_epoch_test"
)
# For data with little to learn beyond a linear forecast: a small model, strongly regularized and briefly trained.
SMALL_RECIPE = (
    "--patch_len 24 --stride 24 --n_heads 4 --d_ff 32 --dropout 0.3 --learning_rate 0.0003 --prompt_decimals 0"
    " --max_steps 400 --eval_steps 100"
)
# For ETTm1, with more to learn.
LARGE_RECIPE = "--stride 16 --d_ff 64 --learning_rate 0.0005 --prompt_decimals 1 --max_steps 1200 --eval_steps 200"
SMOKE_FLAGS = "--demo --model_id smoke --max_steps 3 --eval_windows 32 --predict"


class Run(NamedTuple):
    """One run of run_main.py: its name in messages, its flags, and the parsed flags."""

    name: str
    flags: list[str]
    args: argparse.Namespace


def plan_runs(name: str, words: Sequence[str]) -> list[Run]:
    """Plan the runs for a data set or "smoke" and check their flags; `words` are horizons, then flags of run_main.py.

    Raises:
        UserError: if a horizon or the value of a flag is invalid.
    """
    horizons = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    user_flags = words[len(horizons) :]
    for word in horizons:
        if name == "smoke" or not re.fullmatch("[0-9]+", word):
            raise UserError(f"{word} is not a horizon of {name}: whole numbers come first, then flags with --")
    if name == "smoke":
        planned = {name: [*SMOKE_FLAGS.split(), *user_flags]}
    else:
        for flag in {word.partition("=")[0] for word in user_flags} & {"--data", "--pred_len"}:
            raise UserError(f"this script sets {flag}: leave it out; horizons come first, without a flag")
        recipe = LARGE_RECIPE if name == "ETTm1" else SMALL_RECIPE
        shared = [*FLAGS.split(), *recipe.split(), *_timellm_flags(name, user_flags), *user_flags]
        horizons = horizons or HORIZONS
        planned = {f"{name} {horizon}": ["--data", name, "--pred_len", horizon, *shared] for horizon in horizons}
    runs = [Run(label, flags, get_parser().parse_args(flags)) for label, flags in planned.items()]
    for run in runs:
        check_options(run.args)
    return runs


def _timellm_flags(data: str, user_flags: Sequence[str]) -> list[str]:
    """List the flags for Time-LLM only: its recipe, an LLM unless the user names one, a name for the run folder."""
    parser = get_parser()
    parser.set_defaults(llm_model="")  # to distinguish an explicit --llm_model from the default
    given = parser.parse_args(["--data", data, *user_flags])
    if not has_llm(given):
        return []
    flags = ["--residual", "linear", "--normalize_prototypes"]
    if not given.llm_model_path and not given.llm_model:
        path = os.environ.get(LLM_VARIABLE)
        flags += ["--llm_model_path", path] if path else ["--llm_model", "QWEN", "--load_in_4bit"]
    llm = parser.parse_args(["--data", data, *flags, *user_flags])
    layers = f"{llm.llm_layers}layers" if llm.llm_layers else ""
    ablation = llm.ablation if llm.ablation != "none" else ""
    parts = [Path(llm.llm_model_path or llm.llm_model).name, layers, "nf4" if llm.load_in_4bit else "", ablation]
    comment = re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts))).strip("-._")
    return [*flags, "--model_comment", comment]


def repetitions(args: argparse.Namespace) -> list[tuple[Path, argparse.Namespace]]:
    """List the run folder and the flags of each repetition of a run."""
    return [(run_folder(args, number), flags_of_repetition(args, number)) for number in range(args.itr)]


def is_done(args: argparse.Namespace) -> bool:
    """Return whether every repetition of a training run has finished with these flags and data."""
    if args.plan or not args.is_training:
        return False
    with contextlib.chdir(ROOT):
        runs = repetitions(args)
        # access() also returns False for a path that is too long; run_main.py then reports the error.
        return all(os.access(folder / "metrics.json", os.F_OK) and is_finished(folder, run) for folder, run in runs)


def launch(runs: Sequence[Run], again: bool, dry_run: bool) -> int:
    """Start the runs in turn until one fails, and return the last exit code; `again` repeats finished runs."""
    for place, run in enumerate(runs):
        if not again and is_done(run.args):
            done = f"{run.name}: skipped, already done in {run_folder(run.args, 0)}"
            print(f"{done} (--again repeats it, --des NAME runs it in another folder)", file=sys.stderr)
            continue
        words = ["run_main.py", *run.flags]
        print(command_line(["python", *words]), flush=True)
        code = 0 if dry_run else run_child([sys.executable, *words], ROOT)
        if code:
            remaining = listed([later.name for later in runs[place + 1 :]]) or "none"
            problem = f"error: {run.name} failed with exit code {code}; not started: {remaining}"
            interrupted = f"interrupted: at {run.name}; add --resume auto to the same command to resume"
            print(interrupted if code == 130 else problem, file=sys.stderr)
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 2 invalid input, 130 interrupted, else that of the failed run."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    name, *rest = [word for word in words if word not in ("--again", "--dry_run")] or [""]
    again, dry_run = "--again" in words or name == "smoke", "--dry_run" in words
    return exit_code_of(lambda: launch(plan_runs(name, rest), again, dry_run), "nothing was started")


if __name__ == "__main__":
    leave(main)
