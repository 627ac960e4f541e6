"""Compare forecasters on the same windows with the same budget, over several seeds.

    python scripts/compare.py --demo
    python scripts/compare.py --data ETTh1 --llm_model QWEN --load_in_4bit --seeds 3
    python scripts/compare.py --data ETTh1 ... --way TimeLLM --way "full map=--mapping full" --way DLinear
    python scripts/compare.py --rank checkpoints/compare-ETTh1-96-96 checkpoints/compare-ETTm1-96-96

Flags that this script does not define go to run_main.py. Each --way is a name and its own flags of run_main.py, which
take priority. The default ways are TimeLLM and its two ablations, each without and with a linear residual, PatchTST,
DLinear, the seasonal naive forecast (last season) and the naive forecast (last value); with flags that name covariates
or notes, the flags' own forecaster with what is known, without its LLM (which still reads notes), with a random one,
and without what is known (TimeLLM always with a linear residual), PatchTST, DLinear and the last season. A way that
fails does not stop the others. The results are printed and written to compare.md, compare.csv (one row per run) and
compare.png. The same command skips finished runs and resumes interrupted ones. --rank ranks the ways of finished
comparisons.
"""

import csv
import os
import re
import shlex
import statistics
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from scripts.launch import repetitions
from utils.cli.checks import check_options, check_paths
from utils.cli.command import OneLineParser, command_line, exit_code_of, run_child
from utils.cli.options import RESERVED_BY_COMPARE, flags_tagged, get_parser, has_llm
from utils.cli.places import csv_path, is_demo_default
from utils.cli.signals import leave
from utils.errors import UserError, first_line
from utils.runs.finished import is_finished, is_of
from utils.runs.pictures import Validation, draw_comparison
from utils.system.files import back_up, read_json, write_text
from utils.system.plotting import check_backend

RUN_MAIN = Path(__file__).resolve().parents[1] / "run_main.py"

VARIANTS = {
    "TimeLLM": "--model TimeLLM --ablation none --residual none",
    "TimeLLM + linear": "--model TimeLLM --ablation none --residual linear",
    "without LLM": "--model TimeLLM --ablation no_llm --residual none",
    "without LLM + linear": "--model TimeLLM --ablation no_llm --residual linear",
    "random LLM": "--model TimeLLM --ablation random_llm --residual none",
    "random LLM + linear": "--model TimeLLM --ablation random_llm --residual linear",
    "PatchTST": "--model PatchTST",
    "DLinear": "--model DLinear",
    "last season": "--model SeasonalNaive",
    "last value": "--model LastValue",
}

# The default variants where the flags name covariates or notes. Of TimeLLM's, the first three differ in the LLM alone,
# the first and the fourth in what is known alone.
KNOWN_AHEAD_VARIANTS = {
    "with what is known": "",
    "the same without LLM": "--ablation no_llm",
    "the same with a random LLM": "--ablation random_llm",
    "without what is known": "--covariate_model none",
    "PatchTST": "--model PatchTST --residual none",
    "DLinear": "--model DLinear --residual none",
    "last season": "--model SeasonalNaive --residual none --covariate_model none",
}

# Shorter training than run_main.py --demo: ten variants with three seeds each take a few minutes.
DEMO_FLAGS = "--max_steps 60 --eval_steps 20 --eval_windows 256"


@dataclass
class Variant:
    """A `--way` of the command line; `runs` holds the results of each seed, `problem` says why there are none."""

    name: str
    argv: list[str]
    args: Namespace
    problem: str = ""
    runs: list[dict] = field(default_factory=list)


def plan_variants(ways: Sequence[str], seeds: int, flags: Sequence[str], out: str) -> list[Variant]:
    """Plan the variants to compare and check their flags.

    Args:
        ways: `NAME` of a default variant or `NAME=FLAGS` of a new one; empty for all default variants.
        seeds: the number of runs, from --seed on; a variant without training has one run.
        out: the folder of all runs; if empty, a folder under checkpoints/ that is named after the data.

    Raises:
        UserError: if a variant is unknown or its flags are invalid.
    """
    flags = [*DEMO_FLAGS.split(), *flags] if "--demo" in flags else list(flags)
    given = get_parser().parse_args(flags)
    defaults = _default_variants(given)
    if not ways:
        ways = [name for name in defaults if name != "last season" or _fits_a_season(given)]
    if not out:
        out = f"./checkpoints/compare-{Path(given.data_path).stem}-{given.seq_len}-{given.pred_len}"
    reserved = {f"--{name}" for name in flags_tagged(RESERVED_BY_COMPARE)}
    variants = []
    for way in ways:
        name, has_flags, own = way.partition("=")
        if not has_flags and name not in defaults:
            known = ", ".join(map(repr, defaults))
            raise UserError(f'--way {name!r} is not one of {known}: give it flags, --way "{name}=--flag value"')
        argv = [*flags, *split_flags(own if has_flags else defaults[name])]
        slug = re.sub(r"[^\w.]+", "-", name).strip("-")
        # A file system may not distinguish upper and lower case.
        if any(variant.args.des.casefold() == slug.casefold() for variant in variants):
            raise UserError(f"two ways are named {name}: give them different names")
        for flag in reserved & {word.partition("=")[0] for word in argv}:
            remedy = "leave it out (--out, --seeds and --way are allowed)"
            raise UserError(f"{flag} cannot be used in a comparison: {remedy}")
        runs = 1 if get_parser().parse_args(argv).model in ("SeasonalNaive", "LastValue") else seeds
        argv += ["--des", slug, "--itr", str(runs), "--checkpoints", out]
        args = get_parser().parse_args(argv)
        check_options(args)
        check_paths(args)
        variants.append(Variant(name, argv, args))
    return variants


def _default_variants(args: Namespace) -> dict[str, str]:
    """Choose the default variants: where covariates or notes are named, those that differ in what is known."""
    if not (args.covariates or args.past_covariates or args.notes):
        return VARIANTS
    variants = dict(KNOWN_AHEAD_VARIANTS)
    if has_llm(args):
        # Without the residual only DLinear would start from the line that the effect was fitted with.
        return {name: flags if "--model" in flags else f"{flags} --residual linear" for name, flags in variants.items()}
    del variants["the same without LLM"]
    if not args.notes:
        del variants["the same with a random LLM"]
    return variants


def _fits_a_season(args: Namespace) -> bool:
    """Return whether a context contains a whole season; if not, say that the seasonal naive forecast is left out."""
    from data_provider.reading import read_table

    if is_demo_default(args, "data_path") and not csv_path(args).is_file():
        return True  # the demo data are hourly, and a context contains days
    check_paths(args)
    season = args.season or read_table(args).rows_of_a_season()
    if season > args.seq_len:
        print(f"Leaving out last season: a season has {season} rows, more than --seq_len {args.seq_len}")
    return season <= args.seq_len


def split_flags(flags: str) -> list[str]:
    """Split a variant's flags into words; on Windows, a backslash is part of a path."""
    try:
        return shlex.split(flags.replace("\\", "/") if os.name == "nt" else flags)
    except ValueError as problem:
        raise UserError(f"--way NAME={flags}: {problem}") from problem


def run_variants(variants: Sequence[Variant]) -> None:
    """Run all unfinished variants; record a failure and continue with the next variant."""
    for variant in variants:
        if all(is_finished(folder, args) for folder, args in repetitions(variant.args)):
            print(f"== {variant.name}: done already, in {variant.args.checkpoints}", flush=True)
            continue
        # Resume only if all saved states are from runs with the same flags.
        resumable = [is_of(folder, args) for folder, args in repetitions(variant.args) if (folder / "last").is_file()]
        resume = ["--resume", "auto"] if resumable and all(resumable) else []
        command = [sys.executable, str(RUN_MAIN), *variant.argv, *resume]
        print(f"== {variant.name}: {command_line(['python', 'run_main.py', *command[2:]])}", flush=True)
        code = run_child(command)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            variant.problem = f"failed with exit code {code}"
            print(f"== {variant.name} {variant.problem}, continuing with the others", flush=True)


def collect(variants: Sequence[Variant]) -> None:
    """Read the results of every run of the variants that did not fail; a damaged file makes a variant fail."""
    for variant in variants:
        runs = () if variant.problem else repetitions(variant.args)
        try:
            for folder, args in runs:
                variant.runs.append(_read_run(variant.name, args.seed, folder))
        except Exception as problem:  # the contents of a damaged file can be anything
            variant.problem = f"{folder} is damaged ({first_line(problem)})"
            variant.runs.clear()


def _read_run(name: str, seed: int, folder: Path) -> dict:
    """Read the results of one run."""
    metrics = read_json(folder / "metrics.json")
    with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    cost, mase = metrics["cost"], metrics.get("mase")  # earlier versions did not write the MASE
    seconds, steps = cost["seconds_per_step"], [int(row["steps"]) for row in rows]
    trained = [step * (seconds or 0.0) for step in steps]  # no seconds without training
    vali = [float(row["vali_loss"]) for row in rows]
    test = [float(row["test_loss"]) if row["test_loss"] else None for row in rows]
    return {
        "way": name,
        "seed": seed,
        "mse": float(metrics["mse"]),
        "mae": float(metrics["mae"]),
        "mase": None if mase is None else float(mase),
        "windows": int(metrics["windows"]),
        "vali_mse": min(vali),
        "steps": steps[-1],
        "trainable_parameters": int(cost["trainable_parameters"]),
        "seconds_per_step": None if seconds is None else float(seconds),
        "peak_memory": int(cost["peak_memory"]),
        "validations": list(map(Validation, steps, trained, vali, test)),
        "setup": read_json(folder / "args.json"),
    }


def table(variants: Sequence[Variant]) -> str:
    """Format the comparison as an aligned Markdown table."""
    head = ("", "seeds", "test MSE", "test MAE", "MASE", "validation MSE", "trainable parameters", "s/step", "peak MB")
    rows = [head]
    for variant in variants:
        if variant.problem:
            rows.append((variant.name, variant.problem, *[""] * (len(head) - 2)))
            continue
        runs = variant.runs
        seconds = [run["seconds_per_step"] for run in runs if run["seconds_per_step"]]
        step = f"{statistics.mean(seconds):.3f}" if seconds else ""
        peak = f"{max(run['peak_memory'] for run in runs) / 1e6:.0f}"
        errors = [_mean_and_deviation([run[name] for run in runs]) for name in ("mse", "mae", "mase", "vali_mse")]
        rows.append((variant.name, str(len(runs)), *errors, f"{runs[0]['trainable_parameters']:,}", step, peak))
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the first of which is the header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    """Format the mean and, of several values, the standard deviation."""
    if None in values:  # the MASE of a constant channel is undefined
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def write_results(folder: Path, variants: Sequence[Variant], command: str) -> None:
    """Write compare.md, compare.csv and compare.png; keep those of a different comparison as *.old."""
    done = [variant for variant in variants if variant.runs]
    machine = done[0].runs[0]["setup"]
    seeds = f"seed{'s from' if any(len(variant.runs) > 1 for variant in done) else ''} {variants[0].args.seed}"
    setup = f"{date.today()}, {machine.get('device')}, torch {machine.get('versions', {}).get('torch')}, {seeds}"
    files = [folder / f"compare.{ending}" for ending in ("csv", "md", "png")]
    runs = pd.DataFrame(run for variant in done for run in variant.runs).drop(columns=["validations", "setup"])
    results = runs.to_csv(index=False, lineterminator="\n")
    if files[0].is_file() and files[0].read_text(encoding="utf-8") != results:
        back_up(files)
    write_text(files[0], results)
    write_text(files[1], f"{table(variants)}\n\n{setup}; mean ± deviation over the seeds\n\n    {command}\n")
    errors = {variant.name: [run["mse"] for run in variant.runs] for variant in done}
    validations = {variant.name: [run["validations"] for run in variant.runs] for variant in done}
    draw_comparison(files[2], errors, validations)


def rank(folders: Sequence[Path]) -> str:
    """Build a table of the ways that all comparisons share: each test MSE, mean MASE and average rank.

    Raises:
        UserError: if a folder contains no comparison, or the comparisons share no way.
    """
    for folder in folders:
        if not (folder / "compare.csv").is_file():
            raise UserError(f"no compare.csv in {folder}: --rank takes folders that compare.py has written to")
    # Earlier versions did not write the MASE.
    results = [pd.DataFrame({"mase": float("nan"), **pd.read_csv(folder / "compare.csv")}) for folder in folders]
    mse, mase = (
        pd.concat([result.groupby("way", sort=False)[name].mean() for result in results], axis=1, join="inner")
        for name in ("mse", "mase")
    )
    if mse.empty:
        raise UserError(f"{' and '.join(map(str, folders))} share no way: there is nothing to rank")
    titles = [f"{folder.name.removeprefix('compare-')} test MSE" for folder in folders]
    rows = [("", *titles, "mean MASE", "average rank")]
    for way, average_rank in mse.rank().mean(axis=1).sort_values(kind="stable").items():
        mean_mase = mase.loc[way].mean(skipna=False)
        errors = [f"{error:.4f}" for error in mse.loc[way]]
        rows.append((way, *errors, "" if pd.isna(mean_mase) else f"{mean_mase:.4f}", f"{average_rank:.2f}"))
    return _markdown(rows)


def compare(argv: Sequence[str]) -> int:
    """Run the comparison that the command line describes; return 1 if a way failed."""
    parser = OneLineParser(allow_abbrev=False, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--way", action="append", default=[], metavar="NAME[=FLAGS]", help="a forecaster; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each way, from run_main's --seed on")
    parser.add_argument("--out", default="", help="folder for all runs and results")
    parser.add_argument("--rank", nargs="+", default=[], metavar="OUT", help="folders of finished comparisons")
    options, flags = parser.parse_known_args(argv)
    if options.rank:
        if flags or options.way or options.out:
            raise UserError("--rank reads finished comparisons: leave out all other flags")
        print(rank([Path(folder) for folder in options.rank]))
        return 0
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds} must be at least 1")
    check_backend()
    variants = plan_variants(options.way, options.seeds, flags, options.out)
    run_variants(variants)
    collect(variants)
    print(f"\n{table(variants)}")
    if any(variant.runs for variant in variants):
        folder = Path(variants[0].args.checkpoints)
        write_results(folder, variants, command_line(["python", "scripts/compare.py", *argv]))
        print(f"\nWritten: compare.md, compare.csv and compare.png in {folder}")
    return 1 if any(variant.problem for variant in variants) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 1 a way failed, 2 invalid input, 130 interrupted."""
    return exit_code_of(lambda: compare(sys.argv[1:] if argv is None else argv), "run the same command again to resume")


if __name__ == "__main__":
    leave(main)
