"""An experiment, from the flags to its files: load the data and the model, train, calibrate, test, forecast."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn import Module

from base_models.make_tiny_llm import make_tiny_llm
from data_provider.data_factory import windows_and_loader
from data_provider.reading import read_table
from data_provider.series import SPLITS, Series, series_of
from data_provider.tables import Table
from dataset.demo import write_demo_csv
from models import build
from models.forecaster import Forecaster
from utils.cli.command import is_first_process
from utils.cli.options import flags_of_final_test, flags_of_repetition, has_llm, headline_target
from utils.cli.places import csv_path, is_demo_default, run_folder, trained_folder
from utils.cli.signals import Interrupts
from utils.errors import UserError
from utils.memory.plan import full_report, memory_error, memory_in_short
from utils.runs.checkpoint import Checkpoint, Run, ended_state, read_checkpoint, read_last
from utils.runs.compatibility import load_checkpoint, load_last
from utils.runs.finished import is_finished
from utils.runs.intervals import Calibration
from utils.runs.prediction import check_columns, write_forecast
from utils.runs.records import open_run_folder, origin_of
from utils.runs.run_lock import RunLock
from utils.runs.trained import TrainedRun
from utils.system.files import hash_of
from utils.system.plotting import check_backend
from utils.system.processes import (
    check_same_on_all_ranks,
    exists_on_all_ranks,
    refused_environment,
    seed_rank,
    start_processes,
)
from utils.training.batch_size import fit_batch_size, with_batches
from utils.training.evaluation import Split, prepare_split
from utils.training.optimizers import check_optimizer
from utils.training.reporting import check_reporting, start_reporting, stop_reporting
from utils.training.testing import TestSetup, calibrate, check_levels, test
from utils.training.trainer import TrainConfig, Trainer

# Rows of other data may have the same date and value by chance; a larger share of them may not.
_SHARE_BY_CHANCE = 0.01


def run_experiment(args: argparse.Namespace, interrupts: Interrupts) -> None:
    """Run every repetition, on data that are read once; if the device is full, say in one line what helps."""
    table = series = None
    try:
        for repetition in range(args.itr):
            flags = flags_of_repetition(args, repetition)
            if _can_skip(flags, repetition):
                if is_first_process():
                    print(f"Seed {flags.seed} is done: {run_folder(args, repetition)}", flush=True)
                continue
            table = table or read_table(args)  # once: later changes of the file do not reach the run
            if args.predict and not args.is_training:
                _forecast_only(flags, repetition, table)
            else:
                series = series or series_of(table, args)
                _run_repetition(flags, repetition, series, interrupts)
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem):
            raise
        raise memory_error(args) from problem


def print_plan(args: argparse.Namespace) -> None:
    """Print the memory that the run needs."""
    with refused_environment():
        print(full_report(args))


def prepare(args: argparse.Namespace) -> None:
    """Check what libraries read of the environment, and make the data and the LLM of --demo, where they are missing.

    Raises:
        UserError: if a variable is wrong, or the files cannot be written.
    """
    check_backend()
    try:
        if is_demo_default(args, "data_path"):
            write_demo_csv(csv_path(args))
        if has_llm(args) and is_demo_default(args, "llm_model_path"):
            make_tiny_llm("qwen2", args.llm_model_path)
    except OSError as problem:
        raise UserError(f"cannot write the demo's data and LLM: {problem}") from problem


def _can_skip(args: argparse.Namespace, repetition: int) -> bool:
    """Return whether --resume auto skips a repetition, since it has all that is asked for, its scores."""
    needs_more_outputs = args.predict or args.level or args.save_predictions
    can_skip = args.is_training and args.resume == "auto" and args.itr > 1 and not needs_more_outputs
    return can_skip and is_finished(run_folder(args, repetition), args)


@dataclass(frozen=True)
class _Setup:
    """A repetition that is ready to train or to test.

    Attributes:
        args: its flags, with the batch size that fits.
        accelerator: device and processes.
        model: not prepared yet.
        splits: train, val, test and `final test`, the windows of the test at the end.
        run: its folder, flags and data.
        prompt_sha256: the hash of --prompt_file when the model read it; empty without one.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    model: Forecaster
    splits: dict[str, Split]
    run: Run
    prompt_sha256: str


def _run_repetition(args: argparse.Namespace, repetition: int, series: Series, interrupts: Interrupts) -> None:
    """Train, test and, if asked for, forecast; or test a trained model."""
    if args.predict:
        series.last_window()  # what it lacks is said first
    setup, saved = _set_up(args, repetition, series)
    accelerator, run, bare_model = setup.accelerator, setup.run, setup.model
    if not args.is_training:
        load_checkpoint(saved, bare_model, run.flags, run.data)  # before anything is written
        _say_if_trained_on(accelerator, series, saved)
        seconds_per_step = saved.contents["progress"].get("seconds_per_step")
    # torch's data parallelism refuses models without parameters.
    model = accelerator.prepare(bare_model) if list(bare_model.parameters()) else bare_model
    seed_rank(accelerator, args.seed)
    with RunLock(run.folder) if args.is_training and accelerator.is_main_process else nullcontext():
        if args.is_training:
            trainer = _prepare_training(setup, model, saved, series.table.sha256, interrupts)
            del saved  # its weights and optimizer state would take memory during training
            seconds_per_step = _train(setup, trainer)
            del trainer  # and the optimizer's state during the test
            saved = read_checkpoint(run.folder / "checkpoint")
            load_checkpoint(saved, bare_model, run.flags, run.data)
        elif accelerator.is_main_process:
            open_run_folder(run.folder, run.flags, series.table.sha256, str(accelerator.device), resumes=False)
        calibration = _calibrate(setup, model, saved) if args.level else None
        test_setup = _test_setup(setup, series, saved, calibration)
        test(accelerator, model, test_setup, run.folder, seconds_per_step)
        if args.predict:
            trained = TrainedRun(saved, setup.args, accelerator.mixed_precision, bare_model)
            _write_forecast(accelerator, trained, series.table, args.level, calibration, run.folder)


def _set_up(args: argparse.Namespace, repetition: int, series: Series) -> tuple[_Setup, Checkpoint | None]:
    """Start the processes, check what can be checked, and build the model; return what it begins with, too.

    That is `last` where training continues, `checkpoint` for a test, else None.
    """
    accelerator = _start(args)
    check_same_on_all_ranks(series.table.sha256, str(series.table.source))
    check_optimizer(args.optimizer, accelerator.device)
    check_reporting(args.report_to)
    splits = _splits(accelerator, args, series)
    check_levels(args.level, splits["val"])
    check_columns(series.channels, series.table.is_long, args.level)
    _warn(accelerator, series.notes)
    for line in series.explainer.lines() if series.explainer else ():
        accelerator.print(line)
    folder, saved = run_folder(args, repetition), None
    if not args.is_training:
        saved = read_checkpoint(trained_folder(args, repetition) / "checkpoint")
    elif args.resume and exists_on_all_ranks(folder / "last"):
        saved = read_last(folder / "last")
    if has_llm(args):
        accelerator.print(memory_in_short(args))
    prompt_sha256 = hash_of(Path(args.prompt_file))
    model = build(args, basis=saved.basis if saved else None, season=_season(args, series.table))
    if args.is_training and args.auto_batch_size and list(model.parameters()):
        if saved:
            args = with_batches(args, accelerator, saved.flags["batch_size"], saved.flags["grad_accum"])
        else:
            args = fit_batch_size(args, accelerator, model)
        splits = _splits(accelerator, args, series)
    _introduce(accelerator, model, splits, args.eval_windows)
    if args.is_training and not saved:
        error = model.fit_residual(splits["train"].windows, splits["val"].windows)
        if error is not None:
            accelerator.print(
                f"Linear residual: fitted to the training windows; its MSE on all validation windows is {error:.7f}"
            )
    run = Run(folder, vars(args), series.facts())
    return _Setup(args, accelerator, model, splits, run, prompt_sha256), saved


def _start(args: argparse.Namespace) -> Accelerator:
    return start_processes(
        args.seed, args.grad_accum, args.use_amp, args.deterministic, shares_buffers=not has_llm(args)
    )


def _season(args: argparse.Namespace, table: Table) -> int:
    return args.season or table.rows_of_a_season()


def _splits(accelerator: Accelerator, args: argparse.Namespace, series: Series) -> dict[str, Split]:
    """Return train, val and test, and the windows of the final test, which may be others than the test's."""
    splits = {name: prepare_split(accelerator, *windows_and_loader(series, args, name)) for name in SPLITS}
    final_test = windows_and_loader(series, flags_of_final_test(args), "test")
    return {**splits, "final test": prepare_split(accelerator, *final_test)}


def _introduce(accelerator: Accelerator, model: Forecaster, splits: dict[str, Split], eval_windows: int) -> None:
    """Print the LLM, the parameters, the windows and one prompt.

    Raises:
        UserError: if a prompt and the patches do not fit into the LLM.
    """
    for line in model.describe():
        accelerator.print(line)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    frozen = model.llm_info.backbone.num_parameters() if model.llm_info else 0
    accelerator.print(f"Parameters: {trainable:,} trainable, {frozen:,} frozen")
    windows = splits["train"].windows
    counts = ", ".join(f"{name} {len(splits[name].windows)}" for name in SPLITS)
    accelerator.print(f"Windows: {counts}, of {len(windows.channels)} channels")
    if eval_windows:
        accelerator.print(f"Evaluating on at most {eval_windows} evenly spaced windows (--eval_windows)")
    for line in model.describe_prompt(windows.__getitems__([0])[0][..., 0]):
        accelerator.print(line)


def _prepare_training(
    setup: _Setup, model: Module, last: Checkpoint | None, data_sha256: str, interrupts: Interrupts
) -> Trainer:
    """Open the run folder and return a trainer at the start, or where a `last` continues."""
    accelerator, run = setup.accelerator, setup.run
    training = load_last(last, run, setup.model) if last else None
    if training:
        accelerator.print(f"Resuming at step {training['steps']}, epoch {training['epoch']}")
    if accelerator.is_main_process:
        open_run_folder(run.folder, run.flags, data_sha256, str(accelerator.device), bool(last))
    accelerator.print(f"Run folder: {run.folder}")
    config, target = TrainConfig.of(setup.args), headline_target(setup.args)
    return Trainer(config, accelerator, model, setup.splits, target, run, interrupts, training)


def _train(setup: _Setup, trainer: Trainer) -> float | None:
    """Train; return the seconds of a step."""
    start_reporting(setup.accelerator, setup.args.report_to, setup.run.folder, setup.run.flags)
    try:
        trainer.fit()
    finally:
        stop_reporting(setup.accelerator)
    setup.accelerator.wait_for_everyone()
    exists_on_all_ranks(setup.run.folder / "checkpoint")
    return trainer.state.seconds_per_step


def _calibrate(setup: _Setup, model: Module, saved: Checkpoint) -> Calibration:
    """Calibrate the intervals; a calibration on other data does not take the place of the run's own."""
    folder, args = setup.run.folder, setup.args
    tests_itself = not args.is_training and folder.resolve() == saved.path.parent.resolve()
    keep_in = None if tests_itself and saved.data.changed_fields(setup.run.data) else folder
    return calibrate(setup.accelerator, model, setup.splits["val"], saved.sha256, keep_in)


def _test_setup(setup: _Setup, series: Series, saved: Checkpoint, calibration: Calibration | None) -> TestSetup:
    args, season = setup.args, _season(setup.args, series.table)
    naive = None
    if season <= args.seq_len:
        naive = build(argparse.Namespace(**{**vars(args), "model": "SeasonalNaive"}), season=season)
    last = setup.run.folder / "last"
    # Training that has just returned has ended; the state that an earlier one left must say so.
    ended = hash_of(last) if args.is_training else _ended_state(setup.accelerator, last.parent)
    windows = flags_of_final_test(args).eval_windows
    return TestSetup(
        split=setup.splits["final test"],
        facts=setup.run.data,
        naive_errors=series.seasonal_errors(season),
        target=headline_target(args),
        naive=naive,
        origin=origin_of(
            saved, setup.run.flags, csv_path(args), series.table.sha256, setup.prompt_sha256, windows, ended
        ),
        calibration=calibration,
        levels=args.level,
        keeps_forecasts=args.save_predictions,
    )


def _ended_state(accelerator: Accelerator, folder: Path) -> str:
    """Return the hash of a run's `last` if training has ended by it; a damaged one is reported, but stops no test."""
    try:
        return ended_state(folder) if accelerator.is_main_process else ""  # only that process writes it down
    except UserError as problem:
        accelerator.print(f"Note: {problem}")
        return ""


def _say_if_trained_on(accelerator: Accelerator, series: Series, saved: Checkpoint) -> None:
    """Print a note if test rows were among those that a checkpoint was trained on: errors there mean nothing."""
    share = series.share_trained_on(saved.data)
    if share > _SHARE_BY_CHANCE:
        accelerator.print(
            f"Note: {saved.path} was trained on about {share:.0%} of these test rows: their errors say nothing of new"
            " data"
        )


def _forecast_only(args: argparse.Namespace, repetition: int, table: Table) -> None:
    """Forecast beyond the CSV with a trained checkpoint; the CSV needs no more rows than a window."""
    accelerator = _start(args)
    _warn(accelerator, table.notes(args.seq_len))
    folder = run_folder(args, repetition)
    saved = read_checkpoint(trained_folder(args, repetition) / "checkpoint")
    trained = TrainedRun(saved, args, accelerator.mixed_precision)
    _write_forecast(accelerator, trained, table, args.level, folder, folder)


def _write_forecast(
    accelerator: Accelerator,
    trained: TrainedRun,
    table: Table,
    levels: Sequence[int],
    calibrated: Calibration | Path | None,
    folder: Path,
) -> None:
    """Write forecast.csv and forecast.png, with intervals if levels are asked for."""
    forecast = trained.forecast(table, levels, calibrated)
    _warn(accelerator, forecast.warnings)
    if accelerator.is_main_process:
        if not trained.args.is_training:
            open_run_folder(folder, vars(trained.args), table.sha256, str(accelerator.device), resumes=False)
        write_forecast(folder, forecast)
    dates = forecast.window.future_dates
    first, last = min(own[0] for own in dates), max(own[-1] for own in dates)
    accelerator.print(f"Forecast | {first} to {last}, {len(table.channels)} channels: {folder / 'forecast.csv'}")


def _warn(accelerator: Accelerator, notes: Sequence[str]) -> None:
    """Print what the user should know about the data."""
    for note in notes:
        accelerator.print(f"Warning: {note}")
