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
from utils.cli.options import flags_of_final_test, flags_of_repetition, get_parser, has_llm, headline_target
from utils.cli.places import csv_path, demo_makes, hint_after_interrupt, run_folder, trained_folder
from utils.errors import UserError
from utils.runs.finished import is_finished

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.nn import Module

    from utils.runs.checkpoint import Run
    from utils.runs.intervals import Calibration
    from utils.system.interrupts import Interrupts
    from utils.training.evaluation import Split

__all__ = ["get_parser", "main"]

# torch and transformers take seconds to import: functions import what needs them, so that --help and a wrong flag are
# answered at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = get_parser().parse_args(argv)
    except SystemExit as leave:  # argparse's way to end after --help or a flag it does not know
        return int(leave.code or 0)
    return exit_code_of(lambda: carry_out(args, argv), lambda: hint_after_interrupt(args))


def carry_out(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Do what the flags ask for: a plan, or all repetitions of a run."""
    check_options(args)
    check_paths(args)
    if args.demo:
        prepare_demo(args)
    if args.plan:
        from models import build_around
        from utils.memory.plan import full_report

        print(full_report(args, build_around))
        return
    speaks_of_demo = args.demo and is_first_process()
    if speaks_of_demo:
        print(introduction(args))
    run_all(args, argv)
    if speaks_of_demo:
        print(farewell(argv))


def run_all(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run every repetition; if the device is full, say in one line what helps."""
    from accelerate.utils.memory import should_reduce_batch_size

    from models import build_around
    from utils.memory.plan import memory_error
    from utils.system.interrupts import Interrupts
    from utils.system.processes import spawn_missing_ranks

    try:
        with spawn_missing_ranks(Path(__file__), argv), Interrupts() as interrupts:
            for repetition in range(args.itr):
                flags = flags_of_repetition(args, repetition)
                if is_done_among_others(flags, repetition):
                    if is_first_process():
                        print(f"Seed {flags.seed} is done: {run_folder(args, repetition)}", flush=True)
                elif args.predict and not args.is_training:
                    run_forecast(flags, repetition)
                else:
                    run(flags, repetition, interrupts)
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem):
            raise
        raise memory_error(args, build_around) from problem


def is_done_among_others(args: argparse.Namespace, repetition: int) -> bool:
    """Return whether a repetition has all that is asked for, its scores, so that --resume auto goes on to the next."""
    asks_more = args.predict or args.level or args.save_predictions
    goes_on = args.is_training and args.resume == "auto" and args.itr > 1 and not asks_more
    return goes_on and is_finished(run_folder(args, repetition), args)


def run(args: argparse.Namespace, repetition: int, interrupts: "Interrupts") -> None:
    """Train, test and, if asked for, forecast; or test a trained model. `args` has the seed of this repetition."""
    from models import build_seasonal_naive, seasonal_errors
    from utils.runs.checkpoint import differing, load_checkpoint
    from utils.runs.records import open_run_folder, origin_of
    from utils.runs.run_lock import RunLock
    from utils.runs.watchers import units_of
    from utils.system.processes import seed_rank
    from utils.training.calibrating import calibrate
    from utils.training.testing import Examination, test

    accelerator, model, splits, this_run, resumes = set_up(args, repetition)
    flags, csv = vars(args), csv_path(args)
    folder, checkpoint = this_run.folder, trained_folder(args, repetition) / "checkpoint"
    if not args.is_training:
        contents = load_checkpoint(checkpoint, model, flags, this_run.data)  # before anything is written
        seconds_per_step = contents["progress"].get("seconds_per_step")
    if list(model.parameters()):  # torch's data parallelism refuses models without
        model = accelerator.prepare(model)
    seed_rank(accelerator, args.seed)
    with RunLock(folder) if args.is_training and accelerator.is_main_process else nullcontext():
        if args.is_training:
            seconds_per_step = train(accelerator, args, model, splits, this_run, interrupts, resumes)
            contents = load_checkpoint(checkpoint, accelerator.unwrap_model(model), flags, this_run.data)
        elif accelerator.is_main_process:
            open_run_folder(folder, flags, csv, str(accelerator.device), resumes)
        # A calibration on other data must not take the place of the run's own.
        is_own = args.is_training or folder.resolve() != checkpoint.parent.resolve()
        keep_in = folder if is_own or not differing(contents, this_run.data) else None
        examination = Examination(
            splits["last test"],
            units_of(this_run.data, seasonal_errors(args)),
            headline_target(args),
            build_seasonal_naive(args),
            origin_of(checkpoint, csv, flags_of_final_test(args).eval_windows),
            calibrate(accelerator, model, splits["val"], checkpoint, keep_in) if args.level else None,
            args.level,
        )
        test(accelerator, model, examination, folder, seconds_per_step, args.save_predictions)
        if args.predict:
            bare_model = accelerator.unwrap_model(model)
            forecast(accelerator, args, bare_model, checkpoint, folder, examination.calibration)


def set_up(args: argparse.Namespace, repetition: int) -> "tuple[Accelerator, Module, dict[str, Split], Run, bool]":
    """Return device and processes, the model, the splits, the run, and whether it goes on from its last state."""
    from data_provider.series import SPLITS, load_series
    from data_provider.to_come import last_window
    from models import build_around, build_model
    from utils.memory.plan import memory_in_short
    from utils.runs.checkpoint import Run, facts_of, saved_basis
    from utils.system.processes import exists_on_all_ranks, start_processes
    from utils.training.batch_size import choose_batch_size
    from utils.training.calibrating import check_levels
    from utils.training.introduction import introduce
    from utils.training.optimizers import check_optimizer
    from utils.training.reporting import check_reporting

    accelerator = start_processes(
        args.seed, args.grad_accum, args.use_amp, args.deterministic, shares_buffers=not has_llm(args)
    )
    check_optimizer(args.optimizer, accelerator.device)
    check_reporting(args.report_to)
    splits = all_splits(accelerator, args)
    check_levels(args.level, splits["val"])
    series = load_series(args)
    warn(accelerator, series.notes)
    for line in series.explainer.lines() if series.explainer else ():
        accelerator.print(line)
    if args.predict:
        last_window(args)  # what it lacks is said before training
    if has_llm(args):
        accelerator.print(memory_in_short(args, build_around))
    last = run_folder(args, repetition) / "last"
    resumes = bool(args.resume) and exists_on_all_ranks(last)
    begun = last if resumes else None if args.is_training else trained_folder(args, repetition) / "checkpoint"
    model = build_model(args, saved_basis(begun, vars(args)) if begun else None)
    if args.is_training and args.auto_batch_size and list(model.parameters()):
        choose_batch_size(args, accelerator, model, begun)
        splits = all_splits(accelerator, args)
    introduce(accelerator, model, {name: splits[name] for name in SPLITS}, args.eval_windows)
    if args.is_training and not resumes and args.residual == "linear":
        error = model.start_from(splits["train"].windows, splits["val"].windows)
        accelerator.print(
            f"Linear residual: fitted to the training windows; its MSE on all validation windows is {error:.7f}"
        )
    return accelerator, model, splits, Run(last.parent, vars(args), facts_of(series)), resumes


def all_splits(accelerator: "Accelerator", args: argparse.Namespace) -> "dict[str, Split]":
    """Return train, val and test, and the windows of the last test, which may be others of the test's."""
    from data_provider.data_factory import data_provider
    from data_provider.series import SPLITS
    from utils.training.evaluation import share_out

    splits = {name: share_out(accelerator, *data_provider(args, name)) for name in SPLITS}
    splits["last test"] = share_out(accelerator, *data_provider(flags_of_final_test(args), "test"))
    return splits


def train(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    splits: "dict[str, Split]",
    this_run: "Run",
    interrupts: "Interrupts",
    resumes: bool,
) -> float | None:
    """Train, from the start or from the state in the run folder; return the seconds of a step."""
    from utils.runs.checkpoint import load_last
    from utils.runs.records import open_run_folder
    from utils.system.processes import exists_on_all_ranks
    from utils.training.reporting import start_reporting, stop_reporting
    from utils.training.trainer import Recipe, Trainer

    state = load_last(this_run, accelerator.unwrap_model(model)) if resumes else None
    if state:
        accelerator.print(f"Resuming at step {state['steps']}, epoch {state['epoch']}")
    if accelerator.is_main_process:
        open_run_folder(this_run.folder, this_run.flags, csv_path(args), str(accelerator.device), resumes)
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


def run_forecast(args: argparse.Namespace, repetition: int) -> None:
    """Forecast beyond the CSV with a trained checkpoint; the CSV needs no more rows than a window has."""
    from data_provider.reading import read_table
    from data_provider.to_come import last_window
    from models import build_model
    from utils.runs.checkpoint import check_channels, read_checkpoint, saved_basis
    from utils.runs.intervals import load_calibration
    from utils.runs.records import open_run_folder
    from utils.system.processes import start_processes

    accelerator = start_processes(
        args.seed, args.grad_accum, args.use_amp, args.deterministic, shares_buffers=not has_llm(args)
    )
    table = read_table(args)  # before the LLM: a wrong CSV is found sooner
    warn(accelerator, table.notes(args.seq_len))
    folder, checkpoint = run_folder(args, repetition), trained_folder(args, repetition) / "checkpoint"
    contents = read_checkpoint(checkpoint, {"progress"})
    check_channels(contents, table.channels, table.is_long, csv_path(args))
    last_window(args).explained_to_come(contents.get("explainer"))  # what it lacks is said before anything is written
    calibration = load_calibration(folder, checkpoint, table.channels, args.level) if args.level else None
    model = build_model(args, saved_basis(checkpoint, vars(args)))
    if accelerator.is_main_process:
        open_run_folder(folder, vars(args), csv_path(args), str(accelerator.device), resumes=False)
    forecast(accelerator, args, model, checkpoint, folder, calibration)


def forecast(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    checkpoint: Path,
    folder: Path,
    calibration: "Calibration | None",
) -> None:
    """Write forecast.csv and forecast.png with the weights of a checkpoint, and with intervals if --level asks."""
    from data_provider.to_come import last_window
    from utils.runs.checkpoint import load_checkpoint
    from utils.runs.prediction import forecast_beyond, write_forecast

    contents = load_checkpoint(checkpoint, model, vars(args), None)
    window = last_window(args)
    batch_size = args.eval_batch_size or args.batch_size
    with accelerator.autocast():  # as in training and testing, whether accelerate has prepared the model or not
        made = forecast_beyond(model, window, contents, batch_size, calibration, args.level)
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
    sys.exit(main())
