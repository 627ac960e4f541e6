"""Compare forecasters on the same windows with the same budget, over several seeds.

    python scripts/compare.py --demo
    python scripts/compare.py --data ETTh1 --llm_model QWEN --load_in_4bit --seeds 3
    python scripts/compare.py --data ETTh1 ... --way TimeLLM --way "full map=--mapping full" --way DLinear

    python scripts/compare.py --rank checkpoints/compare-ETTh1-96-96 checkpoints/compare-ETTm1-96-96

All flags but those of this script go to run_main.py. A way to forecast is a name and the flags that make it, which
come last and win; without --way it is TimeLLM and its two ablations, each without and with a linear residual, PatchTST,
DLinear, the last season and the last value. Prints a table and writes it as compare.md, every run's figures as
compare.csv and a picture, compare.png. What is done is not done again, what was cut short goes on, and a way that fails
leaves the others alone. --rank sets comparisons that are done side by side, with the average rank of each way.
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from utils.cli.checks import check_options, check_paths
from utils.cli.command import OneLineParser, command_line, exit_code_of, run_child
from utils.cli.options import RESERVED_BY_COMPARE, flags_of_repetition, flags_tagged, get_parser
from utils.cli.places import csv_path, is_demo_default, run_folder
from utils.cli.signals import leave
from utils.errors import UserError
from utils.runs.finished import is_finished, is_of
from utils.runs.pictures import Validation, draw_comparison
from utils.system.files import back_up, write_text

RUN_MAIN = Path(__file__).resolve().parents[1] / "run_main.py"

WAYS = {
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

# The demo again, but three times ten ways in a few minutes.
DEMO_FLAGS = ("--max_steps", "60", "--eval_steps", "20", "--eval_windows", "256")

UNTRAINED = ("SeasonalNaive", "LastValue")


@dataclass
class Variant:
    """A way to forecast, and what came of it.

    Attributes:
        name: of the table's row.
        argv: run_main's whole command line.
        args: the same, parsed.
        problem: why there are no figures, empty if there are.
        runs: the figures of each seed.
    """

    name: str
    argv: list[str]
    args: argparse.Namespace
    problem: str = ""
    runs: list[dict] = field(default_factory=list)

    def folders(self) -> list[Path]:
        """Return the run folder of each seed."""
        return [run_folder(self.args, repetition) for repetition in range(self.args.itr)]

    def repetitions(self) -> list[argparse.Namespace]:
        """Return the flags of each seed."""
        return [flags_of_repetition(self.args, repetition) for repetition in range(self.args.itr)]


def plan_ways(asked: Sequence[str], seeds: int, flags: Sequence[str], out: str) -> list[Variant]:
    """Return the ways to compare, their flags checked.

    Args:
        asked: `NAME` of a known way or `NAME=FLAGS`; none for all known ones.
        seeds: how many, from --seed on. A way without anything to train needs one.
        flags: run_main's, of all ways.
        out: the folder of all runs, empty for one under checkpoints/ that is named by the data.

    Raises:
        UserError: if a way is not known or its flags are wrong.
        SystemExit: if run_main.py would not know a flag.
    """
    flags = [*DEMO_FLAGS, *flags] if "--demo" in flags else list(flags)
    if not asked:
        asked = [name for name in WAYS if name != "last season" or _holds_a_season(flags)]
    out = out or _default_folder(get_parser().parse_args(flags))
    ways = []
    for words in asked:
        name, has_flags, own = words.partition("=")
        if not has_flags and name not in WAYS:
            raise UserError(f'--way {name} is none of {", ".join(WAYS)}: give it flags, --way "{name}=--flag value"')
        argv = [*flags, *(split_flags(own) if has_flags else shlex.split(WAYS[name]))]
        slug = re.sub(r"[^\w.]+", "-", name).strip("-")
        if any(way.args.des.casefold() == slug.casefold() for way in ways):  # a file system may not tell them apart
            raise UserError(f"two ways are named {name}: give them different names")
        ways.append(_plan_way(name, slug, argv, seeds, out))
    return ways


def _plan_way(name: str, slug: str, argv: list[str], seeds: int, out: str) -> Variant:
    for flag in {word.partition("=")[0] for word in argv} & {f"--{name}" for name in flags_tagged(RESERVED_BY_COMPARE)}:
        raise UserError(f"{flag} is not for a comparison: leave it out (--out, --seeds and --way are)")
    args = get_parser().parse_args(argv)
    count = 1 if args.model in UNTRAINED else seeds
    argv = [*argv, "--des", slug, "--itr", str(count), "--checkpoints", out]
    args = get_parser().parse_args(argv)
    check_options(args)
    check_paths(args)
    return Variant(name, argv, args)


def _default_folder(args: argparse.Namespace) -> str:
    return f"./checkpoints/compare-{Path(args.data_path).stem}-{args.seq_len}-{args.pred_len}"


def _holds_a_season(flags: Sequence[str]) -> bool:
    """Return whether a window is as long as a season; if not, say that there is no such way."""
    from data_provider.reading import read_table

    args = get_parser().parse_args(flags)
    if is_demo_default(args, "data_path") and not csv_path(args).is_file():
        return True  # hours, and windows of days
    check_paths(args)
    season = args.season or read_table(args).rows_of_a_season()
    if season > args.seq_len:
        print(f"No last season: it has {season} rows, more than --seq_len {args.seq_len}")
    return season <= args.seq_len


def split_flags(flags: str) -> list[str]:
    """Return the words of a way's flags; under Windows a backslash is part of a path."""
    try:
        return shlex.split(flags.replace("\\", "/") if os.name == "nt" else flags)
    except ValueError as problem:
        raise UserError(f"--way ...={flags}: {problem}") from problem


def run_ways(ways: Sequence[Variant]) -> None:
    """Run what is not done; note a failure and go on."""
    for way in ways:
        runs = list(zip(way.folders(), way.repetitions(), strict=True))
        if all(is_finished(folder, args) for folder, args in runs):
            print(f"== {way.name}: done already, in {way.args.checkpoints}", flush=True)
            continue
        # What was begun with other flags is not gone on with.
        begun = [is_of(folder, args) for folder, args in runs if (folder / "last").is_file()]
        command = [sys.executable, str(RUN_MAIN), *way.argv, *(["--resume", "auto"] if begun and all(begun) else [])]
        print(f"== {way.name}: {command_line(['python', 'run_main.py', *command[2:]])}", flush=True)
        code = run_child(command)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            way.problem = f"failed with exit code {code}"
            print(f"== {way.name} {way.problem}, going on with the others", flush=True)


def collect(ways: Sequence[Variant]) -> None:
    """Read the figures of each run."""
    for way in ways:
        for repetition, folder in enumerate(way.folders() if not way.problem else ()):
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
                history = list(csv.DictReader(file))
            way.runs.append(
                {
                    "way": way.name,
                    "seed": way.args.seed + repetition,
                    "mse": metrics["mse"],
                    "mae": metrics["mae"],
                    "mase": metrics.get("mase"),  # of an earlier version: none
                    "windows": metrics["windows"],
                    "vali_mse": min(float(row["vali_loss"]) for row in history),
                    "steps": int(history[-1]["steps"]),
                    **metrics["cost"],
                    "history": history,
                }
            )


def table(ways: Sequence[Variant]) -> str:
    """Return the comparison as a Markdown table, which is readable as it is."""
    rows = [
        ("", "seeds", "test MSE", "test MAE", "MASE", "validation MSE", "trainable parameters", "s/step", "peak MB"),
    ]
    for way in ways:
        if way.problem:
            rows.append((way.name, way.problem, *[""] * (len(rows[0]) - 2)))
            continue
        runs, steps = way.runs, [run["seconds_per_step"] for run in way.runs if run["seconds_per_step"]]
        rows.append(
            (
                way.name,
                str(len(runs)),
                *(_mean_and_deviation([run[name] for run in runs]) for name in ("mse", "mae", "mase", "vali_mse")),
                f"{runs[0]['trainable_parameters']:,}",
                f"{statistics.mean(steps):.3f}" if steps else "",
                f"{max(run['peak_memory'] for run in runs) / 1e6:.0f}",
            )
        )
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first the head, as a Markdown table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    if None in values:  # MASE of a channel that never changes
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def write_results(folder: Path, ways: Sequence[Variant], command: str) -> None:
    """Write compare.md, compare.csv and compare.png; those of another comparison are kept as *.old."""
    done = [way for way in ways if way.runs]
    machine = json.loads((done[0].folders()[0] / "args.json").read_text(encoding="utf-8"))
    seeds = f"{ways[0].args.seed} and on" if max(len(way.runs) for way in done) > 1 else str(ways[0].args.seed)
    where = f"{date.today()}, {machine['device']}, torch {machine['versions']['torch']}, seeds {seeds}"
    files = [folder / f"compare.{ending}" for ending in ("csv", "md", "png")]
    if files[0].is_file() and files[0].read_text(encoding="utf-8") != _as_csv(done):
        back_up(files)
    write_text(files[0], _as_csv(done))
    write_text(files[1], f"{table(ways)}\n\n{where}; mean ± deviation over the seeds\n\n    {command}\n")

    draw_comparison(
        files[2],
        {way.name: [run["mse"] for run in way.runs] for way in done},
        {way.name: [_course(run) for run in way.runs] for way in done},
    )


def _course(run: dict) -> list[Validation]:
    """Return the validations of a run; their seconds are those of training alone."""
    seconds = run["seconds_per_step"] or 0.0  # none: nothing to train
    return [
        Validation(
            steps=int(row["steps"]),
            seconds=int(row["steps"]) * seconds,
            vali_mse=float(row["vali_loss"]),
            test_mse=float(row["test_loss"]) if row["test_loss"] else None,
        )
        for row in run["history"]
    ]


def _as_csv(ways: Sequence[Variant]) -> str:
    text = io.StringIO()
    names = [name for name in ways[0].runs[0] if name != "history"]
    rows = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    rows.writerows(run for way in ways for run in way.runs)
    return text.getvalue()


def rank(folders: Sequence[Path]) -> str:
    """Return a table of the ways that several comparisons share: test MSE of each, mean MASE, average rank.

    Raises:
        UserError: if a folder holds no comparison, or they share no way.
    """
    for folder in folders:
        if not (folder / "compare.csv").is_file():
            raise UserError(f"no compare.csv in {folder}: --rank takes folders that compare.py has written to")
    # A comparison of an earlier version has no MASE.
    figures = [pd.DataFrame({"mase": None, **pd.read_csv(folder / "compare.csv")}) for folder in folders]
    figures = [one.astype({"mase": float}) for one in figures]
    mse, mase = (
        pd.concat([one.groupby("way", sort=False)[name].mean() for one in figures], axis=1, join="inner")
        for name in ("mse", "mase")
    )
    if mse.empty:
        raise UserError(f"{' and '.join(map(str, folders))} share no way to forecast: there is nothing to rank")
    names = [folder.name.removeprefix("compare-") for folder in folders]
    rows = [("", *(f"{name} test MSE" for name in names), "mean MASE", "average rank")]
    averages = mse.rank().mean(axis=1).sort_values(kind="stable")
    for way, average in averages.items():
        scaled = mase.loc[way].mean(skipna=False)
        figures_of_way = (*(f"{error:.4f}" for error in mse.loc[way]), "" if pd.isna(scaled) else f"{scaled:.4f}")
        rows.append((way, *figures_of_way, f"{average:.2f}"))
    return _markdown(rows)


def compare(argv: Sequence[str]) -> int:
    """Compare what the command line names; return 1 if some way failed."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--way", action="append", default=[], metavar="NAME[=FLAGS]", help="what to compare; repeat it")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way, from run_main's --seed on")
    parser.add_argument("--out", default="", help="folder of all runs and results")
    parser.add_argument("--rank", nargs="+", default=[], metavar="OUT", help="folders of comparisons that are done")
    options, flags = parser.parse_known_args(argv)
    if options.rank:
        if flags or options.way or options.out:
            raise UserError("--rank compares what is done: leave out all other flags")
        print(rank([Path(folder) for folder in options.rank]))
        return 0
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds} must be at least 1")
    ways = plan_ways(options.way, options.seeds, flags, options.out)
    run_ways(ways)
    collect(ways)
    print(f"\n{table(ways)}")
    if any(way.runs for way in ways):
        folder = Path(ways[0].args.checkpoints)
        write_results(folder, ways, command_line(["python", "scripts/compare.py", *argv]))
        print(f"\nWritten: compare.md, compare.csv and compare.png in {folder}")
    return 1 if any(way.problem for way in ways) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 some way failed, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code_of(lambda: compare(argv), "the same command goes on where it was")


if __name__ == "__main__":
    leave(main)
