"""Train, test and compare forecasters that reprogram a frozen large language model.

    python run_main.py --demo                                        nothing to download
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit  train, then test
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit --is_training 0
    accelerate launch run_main.py --data ETTm1 ...                   on several processes

--help lists the flags, README.md explains them. The story is told by `run`.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.checks import check_options, check_paths
from utils.cli.command import exit_code_of, is_first_process
from utils.cli.demo import farewell, introduction
from utils.cli.environment import check_environment
from utils.cli.options import flags_of_final_test, flags_of_repetition, get_parser, has_llm, headline_target
from utils.cli.places import csv_path, demo_makes, hint_after_interrupt, run_folder, trained_folder
from utils.cli.signals import Interrupts, leave
from utils.errors import UserError
from utils.runs.finished import is_finished

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.nn import Module

    from data_provider.series import Series
    from data_provider.tables import Table
    from data_provider.to_come import LastWindow
    from utils.runs.checkpoint import Checkpoint, Run
    from utils.runs.intervals import Calibration
    from utils.training.evaluation import Split

__all__ = ["get_parser", "main"]

# torch and transformers take seconds to import: functions import what needs them, so that --help and a wrong flag are
# answered at once.

# Rows of other data may have the same date and value by chance; this many are no chance.
LEAST_SHARE = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = get_parser().parse_args(argv)
    except SystemExit as leave:  # argparse's way to end after --help or a flag it does not know
        return int(leave.code or 0)
    interrupts = Interrupts()
    return exit_code_of(lambda: carry_out(args, argv, interrupts), lambda: hint_after_interrupt(args), interrupts)


def carry_out(args: argparse.Namespace, argv: Sequence[str], interrupts: Interrupts) -> None:
    """Do what the flags ask for: a plan, or all repetitions of a run."""
    check_environment()
    check_options(args)
    check_paths(args)
    if args.demo:
        prepare_demo(args)
    if args.plan:
        from models import build_around
        from utils.memory.plan import full_report
        from utils.system.processes import refused_environment

        with refused_environment():
            print(full_report(args, build_around))
        return
    speaks_of_demo = args.demo and is_first_process()
    if speaks_of_demo:
        print(introduction(args))
    run_all(args, argv, interrupts)
    if speaks_of_demo:
        print(farewell(argv))


def run_all(args: argparse.Namespace, argv: Sequence[str], interrupts: Interrupts) -> None:
    """Run every repetition; if the device is full, say in one line what helps."""
    from accelerate.utils.memory import should_reduce_batch_size

    from data_provider.reading import read_table
    from data_provider.series import series_of
    from models import build_around
    from utils.memory.plan import memory_error
    from utils.system.processes import spawn_missing_ranks

    forecasts_alone = args.predict and not args.is_training
    table = series = None
    try:
        with spawn_missing_ranks(Path(__file__), argv):
            for repetition in range(args.itr):
                flags = flags_of_repetition(args, repetition)
                if is_done_among_others(flags, repetition):
                    if is_first_process():
                        print(f"Seed {flags.seed} is done: {run_folder(args, repetition)}", flush=True)
                    continue
                table = table or read_table(args)  # once: what happens to the file later does not reach the run
                if forecasts_alone:
                    run_forecast(flags, repetition, table)
                else:
                    series = series or series_of(table, args)
                    run(flags, repetition, series, interrupts)
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem):
            raise
        raise memory_error(args, build_around) from problem


def is_done_among_others(args: argparse.Namespace, repetition: int) -> bool:
    """Return whether a repetition has all that is asked for, its scores, so that --resume auto goes on to the next."""
    asks_more = args.predict or args.level or args.save_predictions
    goes_on = args.is_training and args.resume == "auto" and args.itr > 1 and not asks_more
    return goes_on and is_finished(run_folder(args, repetition), args)


def run(args: argparse.Namespace, repetition: int, series: "Series", interrupts: Interrupts) -> None:
    """Train, test and, if asked for, forecast; or test a trained model. `args` has the seed of this repetition."""
    from data_provider.to_come import last_window
    from models import build_seasonal_naive, season_of
    from utils.runs.checkpoint import read_checkpoint
    from utils.runs.compatibility import differing, load_checkpoint
    from utils.runs.records import open_run_folder, origin_of
    from utils.runs.run_lock import RunLock
    from utils.runs.watchers import units_of
    from utils.system.processes import seed_rank
    from utils.training.calibrating import calibrate
    from utils.training.testing import Examination, test

    table = series.table
    window = last_window(table, args.seq_len, args.pred_len) if args.predict else None  # what it lacks is said first
    accelerator, model, splits, this_run, saved = set_up(args, repetition, series)
    folder = this_run.folder
    if not args.is_training:
        load_checkpoint(saved, model, vars(args), this_run.data)  # before anything is written
        seconds_per_step = saved.contents["progress"].get("seconds_per_step")
        say_what_was_trained_on(accelerator, series, saved)
    if list(model.parameters()):  # torch's data parallelism refuses models without
        model = accelerator.prepare(model)
    seed_rank(accelerator, args.seed)
    with RunLock(folder) if args.is_training and accelerator.is_main_process else nullcontext():
        if args.is_training:
            seconds_per_step = train(accelerator, args, model, splits, this_run, table.sha256, interrupts, saved)
            saved = read_checkpoint(folder / "checkpoint")
            load_checkpoint(saved, accelerator.unwrap_model(model), vars(args), this_run.data)
        elif accelerator.is_main_process:
            open_run_folder(folder, vars(args), table.sha256, str(accelerator.device), resumes=False)
        # A calibration on other data must not take the place of the run's own.
        tests_itself = not args.is_training and folder.resolve() == saved.path.parent.resolve()
        keep_in = None if tests_itself and differing(saved.contents, this_run.data) else folder
        windows = flags_of_final_test(args).eval_windows
        ended = state_of_ended_training(accelerator, folder)
        examination = Examination(
            splits["last test"],
            units_of(this_run.data, series.seasonal_errors(season_of(args, table))),
            headline_target(args),
            build_seasonal_naive(args, table),
            origin_of(saved, vars(args), csv_path(args), table.sha256, windows, ended),
            calibrate(accelerator, model, splits["val"], saved.sha256, keep_in) if args.level else None,
            args.level,
        )
        test(accelerator, model, examination, folder, seconds_per_step, args.save_predictions)
        if window:
            bare_model = accelerator.unwrap_model(model)
            forecast(accelerator, args, bare_model, saved, window, folder, examination.calibration)


def set_up(
    args: argparse.Namespace, repetition: int, series: "Series"
) -> "tuple[Accelerator, Module, dict[str, Split], Run, Checkpoint | None]":
    """Return device and processes, the model, the splits, the run, and the file that it begins with.

    That is `last` if training goes on from there, `checkpoint` for a test, else None.
    """
    from data_provider.series import SPLITS
    from models import build_around, build_model
    from utils.memory.plan import memory_in_short
    from utils.runs.checkpoint import Run, read_checkpoint, read_last
    from utils.runs.prediction import check_columns
    from utils.system.processes import check_same_on_all_ranks, exists_on_all_ranks
    from utils.training.batch_size import choose_batch_size
    from utils.training.calibrating import check_levels
    from utils.training.introduction import introduce
    from utils.training.optimizers import check_optimizer
    from utils.training.reporting import check_reporting

    accelerator = start_run(args)
    check_same_on_all_ranks(series.table.sha256, str(series.source))
    check_optimizer(args.optimizer, accelerator.device)
    check_reporting(args.report_to)
    splits = all_splits(accelerator, args, series)
    check_levels(args.level, splits["val"])
    check_columns(series.channels, series.is_long, args.level)
    warn(accelerator, series.notes)
    for line in series.explainer.lines() if series.explainer else ():
        accelerator.print(line)
    last, saved = run_folder(args, repetition) / "last", None
    if not args.is_training:
        saved = read_checkpoint(trained_folder(args, repetition) / "checkpoint")
    elif args.resume and exists_on_all_ranks(last):
        saved = read_last(last)
    if has_llm(args):
        accelerator.print(memory_in_short(args, build_around))
    model = build_model(args, saved.basis if saved else None, series.table)
    if args.is_training and args.auto_batch_size and list(model.parameters()):
        choose_batch_size(args, accelerator, model, saved)
        splits = all_splits(accelerator, args, series)
    introduce(accelerator, model, {name: splits[name] for name in SPLITS}, args.eval_windows)
    if args.is_training and not saved and args.residual == "linear":
        error = model.start_from(splits["train"].windows, splits["val"].windows)
        accelerator.print(
            f"Linear residual: fitted to the training windows; its MSE on all validation windows is {error:.7f}"
        )
    return accelerator, model, splits, Run(last.parent, vars(args), series.facts(args.percent)), saved


def start_run(args: argparse.Namespace) -> "Accelerator":
    """Return device, precision and processes; every random generator is seeded."""
    from utils.system.processes import start_processes

    shares_buffers = not has_llm(args)
    return start_processes(args.seed, args.grad_accum, args.use_amp, args.deterministic, shares_buffers)


def all_splits(accelerator: "Accelerator", args: argparse.Namespace, series: "Series") -> "dict[str, Split]":
    """Return train, val and test, and the windows of the last test, which may be others of the test's."""
    from data_provider.data_factory import windows_and_loader
    from data_provider.series import SPLITS
    from utils.training.evaluation import share_out

    splits = {name: share_out(accelerator, *windows_and_loader(series, args, name)) for name in SPLITS}
    last_test = windows_and_loader(series, flags_of_final_test(args), "test")
    return {**splits, "last test": share_out(accelerator, *last_test)}


def train(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    splits: "dict[str, Split]",
    this_run: "Run",
    data_sha256: str,
    interrupts: Interrupts,
    last: "Checkpoint | None",
) -> float | None:
    """Train, from the start or from a `last`; return the seconds of a step."""
    from utils.runs.compatibility import load_last
    from utils.runs.records import open_run_folder
    from utils.system.processes import exists_on_all_ranks
    from utils.training.reporting import start_reporting, stop_reporting
    from utils.training.trainer import Recipe, Trainer

    state = load_last(last, this_run, accelerator.unwrap_model(model)) if last else None
    if state:
        accelerator.print(f"Resuming at step {state['steps']}, epoch {state['epoch']}")
    if accelerator.is_main_process:
        open_run_folder(this_run.folder, this_run.flags, data_sha256, str(accelerator.device), bool(last))
    accelerator.print(f"Run folder: {this_run.folder}")
    target = headline_target(args)
    start_reporting(accelerator, args.report_to, this_run.folder, this_run.flags)
    trainer = Trainer(Recipe.of(args), accelerator, model, splits, target, this_run, interrupts, state)
    try:
        trainer.fit()
    finally:
        stop_reporting(accelerator)
    accelerator.wait_for_everyone()
    exists_on_all_ranks(this_run.folder / "checkpoint")
    return trainer.seconds_per_step


def state_of_ended_training(accelerator: "Accelerator", folder: Path) -> str:
    """Return the hash of a run's `last` if training has ended by it; a damaged one is told, and holds up no test."""
    from utils.runs.checkpoint import ended_state

    try:
        return ended_state(folder)
    except UserError as problem:
        accelerator.print(f"Note: {problem}")
        return ""


def say_what_was_trained_on(accelerator: "Accelerator", series: "Series", saved: "Checkpoint") -> None:
    """Print if test rows were among those that a checkpoint was trained on: its errors there mean nothing."""
    share = series.share_trained_on(saved.contents["trained_rows"], saved.contents["one_in"])
    if share > LEAST_SHARE:
        accelerator.print(
            f"Note: {saved.path} was trained on about {share:.0%} of these test rows: their errors say nothing of new"
            " data"
        )


def run_forecast(args: argparse.Namespace, repetition: int, table: "Table") -> None:
    """Forecast beyond the CSV with a trained checkpoint; the CSV needs no more rows than a window has."""
    from data_provider.to_come import last_window
    from models import build_model
    from utils.runs.checkpoint import read_checkpoint
    from utils.runs.compatibility import check_channels, load_checkpoint
    from utils.runs.intervals import load_calibration
    from utils.runs.prediction import check_columns
    from utils.runs.records import open_run_folder

    accelerator = start_run(args)
    warn(accelerator, table.notes(args.seq_len))
    folder = run_folder(args, repetition)
    saved = read_checkpoint(trained_folder(args, repetition) / "checkpoint")
    check_channels(saved.contents, table.channels, table.is_long, csv_path(args))
    check_columns(table.channels, table.is_long, args.level)
    window = last_window(table, args.seq_len, args.pred_len)
    window.explained_to_come(saved.contents["explainer"])  # what it lacks is said before the LLM is loaded
    calibration = load_calibration(folder, saved, table.channels, args.level) if args.level else None
    model = build_model(args, saved.basis, table)
    load_checkpoint(saved, model, vars(args), None)
    if accelerator.is_main_process:
        open_run_folder(folder, vars(args), table.sha256, str(accelerator.device), resumes=False)
    forecast(accelerator, args, model, saved, window, folder, calibration)


def forecast(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    saved: "Checkpoint",
    window: "LastWindow",
    folder: Path,
    calibration: "Calibration | None",
) -> None:
    """Write forecast.csv and forecast.png, with intervals if --level asks; the model has the checkpoint's weights."""
    from utils.runs.prediction import forecast_beyond, write_forecast

    batch_size = args.eval_batch_size or args.batch_size
    with accelerator.autocast():  # as in training and testing, whether accelerate has prepared the model or not
        made = forecast_beyond(model, window, saved.contents, batch_size, calibration, args.level)
    warn(accelerator, made.warnings)
    if accelerator.is_main_process:
        write_forecast(folder, made)
    first, last = min(dates[0] for dates in window.dates_to_come), max(dates[-1] for dates in window.dates_to_come)
    accelerator.print(f"Forecast | {first} to {last}, {len(window.channels)} channels: {folder / 'forecast.csv'}")


def warn(accelerator: "Accelerator", notes: Sequence[str]) -> None:
    """Print what the user should know of the data."""
    for note in notes:
        accelerator.print(f"Warning: {note}")


def prepare_demo(args: argparse.Namespace) -> None:
    """Make the data and the LLM of --demo, where they are not there yet."""
    from base_models.make_tiny_llm import make_tiny_llm
    from dataset.demo import write_demo_csv

    try:
        if demo_makes(args, "data_path"):
            write_demo_csv(csv_path(args))
        if has_llm(args) and demo_makes(args, "llm_model_path"):
            make_tiny_llm("qwen2", args.llm_model_path)
    except OSError as problem:
        raise UserError(f"cannot write the demo's data and LLM: {problem}") from problem


if __name__ == "__main__":
    leave(main)
