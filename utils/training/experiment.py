"""An experiment, from the flags to its files: load the data and the model, train, calibrate, test, forecast."""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn import Module

from data_provider.fit_known_ahead import Choice, fit_known_ahead, tree_rounds
from data_provider.known_ahead import KnownAhead
from data_provider.reading import read_table
from data_provider.series import SPLITS, Series, series_of
from data_provider.tables import Table
from dataset.demo import write_demo_csv
from models import build
from utils.cli.command import is_first_process
from utils.cli.options import can_learn, flags_of_final_test, flags_of_repetition, has_llm, headline_target, reads_notes
from utils.cli.places import csv_path, is_demo_default, run_folder, trained_folder
from utils.cli.signals import Interrupts
from utils.errors import UserError
from utils.memory.plan import memory_error, memory_report, memory_summary
from utils.runs.checkpoint import Checkpoint, Run, ended_state, read_checkpoint, read_last
from utils.runs.compatibility import load_checkpoint, load_last
from utils.runs.finished import is_finished
from utils.runs.intervals import Calibration
from utils.runs.prediction import check_columns, write_forecast
from utils.runs.records import open_run_folder, origin_of, write_choice
from utils.runs.run_lock import RunLock
from utils.runs.trained import TrainedRun, with_read_notes
from utils.system.files import hash_of
from utils.system.heap import keep_freed_memory
from utils.system.plotting import check_backend
from utils.system.processes import (
    check_same_on_all_ranks,
    end_processes,
    exists_on_all_ranks,
    reraise_environment_errors,
    seed_rank,
    start_processes,
)
from utils.training.batch_size import fit_batch_size, with_batch_size
from utils.training.evaluation import Split, prepare_split
from utils.training.optimization import check_optimizer
from utils.training.reporting import check_reporting, rounds_bar, start_reporting, stop_reporting
from utils.training.testing import TestSetup, calibrate, check_levels, test
from utils.training.trainer import TrainConfig, Trainer

# Rows of other data may have the same date and value by chance; a larger share of them may not.
_SHARE_BY_CHANCE = 0.01


class Experiment:
    """Everything that one command line asks for: a memory plan, or all repetitions of a run.

    Args:
        args: the parsed flags.
        interrupts: tells when to stop.
    """

    def __init__(self, args: argparse.Namespace, interrupts: Interrupts):
        self.args, self.interrupts = args, interrupts

    def prepare(self) -> None:
        """Check what libraries read of the environment, and make the data and the LLM of --demo if they are missing.

        Raises:
            UserError: if a variable is wrong, or the files cannot be written.
        """
        check_backend()
        args = self.args
        try:
            if is_demo_default(args, "data_path"):
                write_demo_csv(csv_path(args))
            if has_llm(args) and is_demo_default(args, "llm_model_path"):
                from base_models.make_tiny_llm import make_tiny_llm  # imports transformers, which takes a second

                make_tiny_llm("qwen2", args.llm_model_path)
        except OSError as problem:
            raise UserError(f"cannot write the demo's data and LLM: {problem}") from problem

    def memory_plan(self) -> str:
        """Describe the memory that the run needs."""
        with reraise_environment_errors():
            return memory_report(self.args)

    def run(self) -> None:
        """Run every repetition, on data that are read once; if the device is full, say in one line what helps."""
        args = self.args
        table = series = fitted = None
        try:
            for number in range(args.itr):
                flags = flags_of_repetition(args, number)
                if self._can_skip(flags, number):
                    if is_first_process():
                        print(f"Seed {flags.seed} is done: {run_folder(args, number)}", flush=True)
                    continue
                table = table or self._read_table()  # once: later changes of the file do not reach the run
                if args.predict and not args.is_training:
                    forecast_only(flags, number, table)
                else:
                    series = series or series_of(table, args)
                    repetition = Repetition(flags, number, series, fitted)
                    fitted = fitted or repetition.fitted
                    repetition.train_and_test(self.interrupts)
        except RuntimeError as problem:
            if not should_reduce_batch_size(problem):
                raise
            raise memory_error(args) from problem
        end_processes()

    def _read_table(self) -> Table:
        """Read the CSV, and print how it was read where it is not plain."""
        table = read_table(self.args)
        if is_first_process() and table.reading:
            print("\n".join(f"Data | {table.source.name}: {line}" for line in table.reading), flush=True)
        return table

    def _can_skip(self, flags: argparse.Namespace, number: int) -> bool:
        """Return whether --resume auto skips a repetition, since it has all that is asked for, its scores."""
        needs_more_outputs = flags.predict or flags.level or flags.save_predictions
        can_skip = flags.is_training and flags.resume == "auto" and flags.itr > 1 and not needs_more_outputs
        return can_skip and is_finished(run_folder(flags, number), flags)


class Repetition:
    """One run of an experiment, with a seed and a folder of its own; constructing it starts the processes.

    Args:
        args: the flags of the repetition.
        number: of the repetition, from 0.
        series: the data, without an effect of covariates.
        fitted: the effect of the covariates, from an earlier repetition; None to fit one if it is needed.

    Attributes:
        args: the flags, with the batch size that fits into memory.
        series: the data, without the effect of the covariates.
        accelerator: the device and the processes.
        forecaster: the model, without accelerate's wrapper.
        splits: train, val, test and `final test`, the windows of the test at the end.
        initial: the checkpoint to start from: `last` to resume, `checkpoint` to test, else None.
        prompt_sha256: the hash of --prompt_file when the model read it; empty without one.
        season: the rows of a season.
        run: the folder, the flags and the facts about the data.

    Raises:
        UserError: if the data, the levels, the LLM or the checkpoint do not fit the flags.
    """

    def __init__(self, args: argparse.Namespace, number: int, series: Series, fitted: tuple[KnownAhead, Choice] | None):
        if args.predict:
            series.last_window()  # what it lacks is reported first
        self.args, self.fitted = args, fitted
        self.accelerator = _start(args)
        check_same_on_all_ranks(series.table.sha256, str(series.table.source))
        check_optimizer(args.optimizer, self.accelerator.device)
        check_reporting(args.report_to)
        folder = run_folder(args, number)
        self.initial = self._read_initial(folder, trained_folder(args, number))
        check_columns(series.channels, series.table.is_long, args.level)
        _warn(self.accelerator, series.notes)
        if reads_notes(args) and not series.table.covariates.states:
            with self.accelerator.main_process_first():  # the others find what it read
                series = replace(series, table=with_read_notes(series.table, args, Path(args.checkpoints)))
        self.series = self._subtract_known_ahead(series) if series.table.covariates else series
        self.splits = self._prepare_splits()
        check_levels(args.level, self.splits["val"])
        if has_llm(args):
            self.accelerator.print(memory_summary(args))
        self.prompt_sha256 = hash_of(Path(args.prompt_file))
        basis = self.initial.basis if self.initial else None
        self.season = args.season or series.table.rows_of_a_season()
        self.forecaster = build(args, basis=basis, season=self.season)
        if args.is_training and args.auto_batch_size and list(self.forecaster.parameters()):
            self._fit_batch_size()
        self._introduce()
        if self.series.known_ahead and self.series.known_ahead.line is not None:
            self.forecaster.start_from_line(self.series.known_ahead.line)
            if args.is_training and has_llm(args) and not self.forecaster.starts_fitted:
                self.accelerator.print("Note: --residual linear would start from the line that the trees correct")
        elif args.is_training and not self.initial:
            self._fit_residual()
        self.run = Run(folder, vars(self.args), self.series.facts())

    def _subtract_known_ahead(self, series: Series) -> Series:
        """Subtract the effect of the covariates, which is that of the initial checkpoint if there is one."""
        if self.initial:
            facts = self.initial.data
            return series.with_known_ahead(KnownAhead.of(facts.explainer, facts.boosted))
        if not self.fitted:
            # One process fits, so that all have the same trees.
            fitted = [None]
            if self.accelerator.is_main_process:
                with rounds_bar(tree_rounds(series), "Covariates") as bar:
                    can_boost = can_learn(self.args)
                    fitted = [fit_known_ahead(series, self.args.covariate_model, can_boost, bar.update)]
            (self.fitted,) = broadcast_object_list(fitted)
        known, choice = self.fitted
        _warn(self.accelerator, choice.warnings)
        for line in (*choice.lines(), *(known.linear.lines() if known.linear else ())):
            self.accelerator.print(line)
        return series.with_known_ahead(known)

    def _prepare_splits(self) -> dict[str, Split]:
        """Prepare train, val and test, and the windows of the final test, which may be others than the test's."""
        args = dict.fromkeys(SPLITS, self.args) | {"final test": flags_of_final_test(self.args)}
        return {name: prepare_split(self.accelerator, self.series, flags, name) for name, flags in args.items()}

    def _read_initial(self, folder: Path, trained: Path) -> Checkpoint | None:
        if not self.args.is_training:
            return read_checkpoint(trained / "checkpoint")
        if self.args.resume and exists_on_all_ranks(folder / "last"):
            return read_last(folder / "last")
        return None

    def _fit_batch_size(self) -> None:
        """Find the batch size that fits into memory, or take that of the run to resume."""
        if self.initial:
            flags = self.initial.flags
            self.args = with_batch_size(self.args, self.accelerator, flags["batch_size"], flags["grad_accum"])
        else:
            self.args = fit_batch_size(self.args, self.accelerator, self.forecaster)
        self.splits = self._prepare_splits()

    def _introduce(self) -> None:
        """Print the LLM, the parameters, the windows and one prompt.

        Raises:
            UserError: if a prompt and the patches do not fit into the LLM.
        """
        say, model, windows = self.accelerator.print, self.forecaster, self.splits["train"].windows
        for line in model.describe():
            say(line)
        trainable = sum(parameter.numel() for parameter in model.parameters())
        frozen = model.llm_info.backbone.num_parameters() if model.llm_info else 0
        say(f"Parameters: {trainable:,} trainable, {frozen:,} frozen")
        counts = ", ".join(f"{name} {len(self.splits[name].windows)}" for name in SPLITS)
        say(f"Windows: {counts}, of {len(windows.channels)} channels")
        if self.args.eval_windows:
            say(f"Evaluating on at most {self.args.eval_windows} evenly spaced windows (--eval_windows)")
        for line in model.describe_prompt(windows.__getitems__([0])[0][..., 0]):
            say(line)

    def _fit_residual(self) -> None:
        error = self.forecaster.fit_residual(self.splits["train"].windows, self.splits["val"].windows)
        if error is not None:
            self.accelerator.print(
                f"Linear residual: fitted to the training windows; its MSE on all validation windows is {error:.7f}"
            )

    def train_and_test(self, interrupts: Interrupts) -> None:
        """Train, test and, if asked for, forecast; without --is_training only test a trained model."""
        args, accelerator, run, saved = self.args, self.accelerator, self.run, self.initial
        keep_freed_memory()
        if not args.is_training:
            load_checkpoint(saved, self.forecaster, run.flags, run.data)  # before anything is written
            self._report_overlap(saved)
            seconds_per_step = saved.contents["progress"].get("seconds_per_step")
        # torch's data parallelism refuses models without parameters.
        has_parameters = list(self.forecaster.parameters())
        model = accelerator.prepare(self.forecaster) if has_parameters else self.forecaster
        seed_rank(accelerator, args.seed)
        with RunLock(run.folder) if args.is_training and accelerator.is_main_process else nullcontext():
            if args.is_training:
                saved = None  # its weights and optimizer state would take memory during training
                seconds_per_step = self._train(model, interrupts)
                saved = read_checkpoint(run.folder / "checkpoint")
                load_checkpoint(saved, self.forecaster, run.flags, run.data)
            elif accelerator.is_main_process:
                self._open_folder(resumes=False)
            calibration = self._calibrate(model, saved) if args.level else None
            test(accelerator, model, self._test_setup(saved, calibration), run.folder, seconds_per_step)
            if args.predict:
                trained = TrainedRun(saved, args, accelerator.mixed_precision, self.forecaster)
                _write_forecast(accelerator, trained, self.series.table, args.level, calibration, run.folder)

    def _report_overlap(self, saved: Checkpoint) -> None:
        """Print a note if a checkpoint was trained on test rows: errors on them mean nothing."""
        share = self.series.share_trained_on(saved.data)
        if share > _SHARE_BY_CHANCE:
            self.accelerator.print(
                f"Note: {saved.path} was trained on about {share:.0%} of these test rows: their errors say nothing of"
                " new data"
            )

    def _open_folder(self, resumes: bool) -> None:
        run, device = self.run, str(self.accelerator.device)
        open_run_folder(run.folder, run.flags, self.series.table.sha256, device, resumes)

    def _train(self, model: Module, interrupts: Interrupts) -> float | None:
        """Train from the start, or from where `last` stopped; return the seconds of a step."""
        accelerator, run = self.accelerator, self.run
        trainer = self._build_trainer(model, interrupts)
        start_reporting(accelerator, self.args.report_to, run.folder, run.flags)
        try:
            trainer.fit()
        finally:
            stop_reporting(accelerator)
        accelerator.wait_for_everyone()
        exists_on_all_ranks(run.folder / "checkpoint")
        # It would hold the optimizer's state during the test; `free_memory` collects garbage for a third of a second.
        accelerator._optimizers.clear()
        return trainer.state.seconds_per_step

    def _build_trainer(self, model: Module, interrupts: Interrupts) -> Trainer:
        """Open the run folder and build the trainer, which takes over the initial checkpoint."""
        accelerator, run, last = self.accelerator, self.run, self.initial
        training = load_last(last, run, self.forecaster) if last else None
        self.initial = None
        if training:
            accelerator.print(f"Resuming at step {training['steps']}, epoch {training['epoch']}")
        if accelerator.is_main_process:
            self._open_folder(resumes=bool(last))
            if self.fitted and not last:
                write_choice(run.folder, self.fitted[1], self.series)
        accelerator.print(f"Run folder: {run.folder}")
        config, target = TrainConfig.of(self.args), headline_target(self.args)
        return Trainer(config, accelerator, model, self.splits, target, run, interrupts, training)

    def _calibrate(self, model: Module, saved: Checkpoint) -> Calibration:
        """Calibrate the intervals; a calibration on other data does not replace the run's own."""
        folder = self.run.folder
        tests_itself = not self.args.is_training and folder.resolve() == saved.path.parent.resolve()
        keep_in = None if tests_itself and saved.data.changed_fields(self.run.data) else folder
        return calibrate(self.accelerator, model, self.splits["val"], saved.sha256, keep_in)

    def _test_setup(self, saved: Checkpoint, calibration: Calibration | None) -> TestSetup:
        args, run, series, naive = self.args, self.run, self.series, None
        if self.season <= args.seq_len:
            naive = build(argparse.Namespace(**{**vars(args), "model": "SeasonalNaive"}), season=self.season)
        # Training that has just returned has ended; the state that an earlier one left must say so.
        ended = hash_of(run.folder / "last") if args.is_training else self._ended_state()
        final_flags = flags_of_final_test(args)
        sha256, eval_windows = series.table.sha256, final_flags.eval_windows
        return TestSetup(
            split=self.splits["final test"],
            naive_split=prepare_split(self.accelerator, series.without_window_effect(), final_flags, "final test"),
            facts=run.data,
            naive_errors=series.seasonal_errors(self.season),
            target=headline_target(args),
            naive=naive,
            origin=origin_of(saved, run.flags, csv_path(args), sha256, self.prompt_sha256, eval_windows, ended),
            calibration=calibration,
            levels=args.level,
            keeps_forecasts=args.save_predictions,
        )

    def _ended_state(self) -> str:
        """Return the hash of the run's `last` if it ended training; report a damaged one, which stops no test."""
        try:
            # Only the main process writes the hash down.
            return ended_state(self.run.folder) if self.accelerator.is_main_process else ""
        except UserError as problem:
            self.accelerator.print(f"Note: {problem}")
            return ""


def forecast_only(args: argparse.Namespace, number: int, table: Table) -> None:
    """Forecast beyond the CSV with a trained checkpoint; the CSV needs no more rows than a window."""
    accelerator = _start(args)
    _warn(accelerator, table.notes(args.seq_len))
    folder = run_folder(args, number)
    saved = read_checkpoint(trained_folder(args, number) / "checkpoint")
    trained = TrainedRun(saved, args, accelerator.mixed_precision)
    _write_forecast(accelerator, trained, table, args.level, folder, folder)


def _start(args: argparse.Namespace) -> Accelerator:
    return start_processes(args.seed, args.grad_accum, args.use_amp, args.deterministic, not has_llm(args))


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
