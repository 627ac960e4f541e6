"""Train, test and compare forecasters that reprogram a frozen large language model.

    python run_main.py --demo                                        nothing to download
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit  train, then test
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit --is_training 0
    accelerate launch run_main.py --data ETTm1 ...                   on several processes

--help lists the flags, README.md explains them.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.demo import farewell, introduction
from utils.cli.options import (
    check_options,
    check_paths,
    csv_path,
    demo_makes,
    flags_of_repetition,
    get_parser,
    has_llm,
    headline_target,
    run_folder,
    trained_folder,
)
from utils.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.nn import Module
    from torch.utils.data import DataLoader

    from data_provider.windows import WindowDataset
    from utils.training.evaluation import Scores
    from utils.training.interrupts import Interrupts

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    try:
        args = get_parser().parse_args(argv)
    except SystemExit as leave:  # argparse's way to end after --help or a flag it does not know
        return int(leave.code or 0)
    try:
        check_options(args)
        check_paths(args)
        if args.demo:
            prepare_demo(args)
        if args.plan:
            plan(args)
        else:
            if args.demo and is_first_process():
                print(introduction(args))
            run_all(args, sys.argv[1:] if argv is None else argv)
            if args.demo and is_first_process():
                print(farewell(sys.argv[1:] if argv is None else argv))
    except UserError as problem:
        if is_first_process():  # one line, however many there are
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first_process():
            print(f"interrupted: {hint_after_interrupt(args)}", file=sys.stderr)
        return 130
    return 0


def is_first_process() -> bool:
    """Return whether this is the process that speaks; known before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"


def hint_after_interrupt(args: argparse.Namespace) -> str:
    """Return how to go on with a run that was stopped."""
    folders = [run_folder(args, repetition) for repetition in range(args.itr)]
    if args.is_training and any((folder / "last").is_file() for folder in folders):
        return "the state is saved, the same command with --resume goes on from there"
    return "there is no state to resume from yet" if args.is_training else "nothing was changed"


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


def plan(args: argparse.Namespace) -> None:
    """Print what the run would need of memory and, if that is not there, what to change."""
    if not has_llm(args):
        print(f"{args.model} has no LLM: it fits wherever the data fit.")
        return
    from utils.memory.plan import NoPlan, advice, plan_memory, plan_table

    try:
        memory = plan_memory(args)
    except NoPlan as problem:
        raise UserError(f"there is no plan for this LLM ({problem}): run without --plan") from problem
    print(plan_table(memory))
    print("It fits." if memory.fits else f"It does not fit: {advice(args, memory)}")


def run_all(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run every repetition; if the device is full, say in one line what helps."""
    from accelerate.utils.memory import should_reduce_batch_size

    from utils.training.interrupts import Interrupts
    from utils.training.processes import missing_processes

    try:
        with missing_processes(Path(__file__), argv), Interrupts() as interrupts:
            for repetition in range(args.itr):
                flags = flags_of_repetition(args, repetition)
                if args.predict and not args.is_training:
                    run_prediction(flags, repetition)
                else:
                    run(flags, repetition, interrupts)
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem):
            raise
        from utils.memory.plan import memory_error

        raise memory_error(args) from problem


def run(args: argparse.Namespace, repetition: int, interrupts: "Interrupts") -> None:
    """Train and test once; `args` has the seed of this repetition."""
    # torch and transformers take seconds to import: not before the command line is known to be sound.
    from data_provider.series import load_series
    from models import build_model
    from utils.memory.plan import memory_in_short
    from utils.runs.checkpoint import load_checkpoint, saved_basis
    from utils.runs.records import open_run_folder
    from utils.runs.run_lock import RunLock
    from utils.training.optimizers import check_optimizer
    from utils.training.processes import draw_apart, is_there_for_all, start_processes

    accelerator = start_processes(args)
    check_optimizer(args.optimizer, accelerator.device)
    datasets, loaders = provide(accelerator, args)
    for note in load_series(args).notes:
        accelerator.print(f"Warning: {note}")
    if has_llm(args):
        accelerator.print(memory_in_short(args))
    folder, checkpoint = run_folder(args, repetition), trained_folder(args, repetition) / "checkpoint"
    resumes = bool(args.resume) and is_there_for_all(folder / "last")
    begun = folder / "last" if resumes else None if args.is_training else checkpoint
    model = build_model(args, saved_basis(begun) if begun else None)
    is_trainable = bool(list(model.parameters()))
    if args.is_training and args.auto_batch_size and is_trainable:
        settle_batch_size(accelerator, args, model, folder / "last" if resumes else None)
        datasets, loaders = provide(accelerator, args)
    describe(accelerator, args, model, datasets)
    if not args.is_training:
        contents = load_checkpoint(checkpoint, model, args, load_series(args))  # before anything is written
    if is_trainable:  # torch's data parallelism refuses others
        model = accelerator.prepare(model)
    draw_apart(accelerator, args.seed)
    with RunLock(folder) if args.is_training and accelerator.is_main_process else nullcontext():
        if args.is_training:
            train(accelerator, args, model, datasets, loaders, folder, interrupts, resumes)
            contents = load_checkpoint(checkpoint, accelerator.unwrap_model(model), args, load_series(args))
        elif accelerator.is_main_process:
            open_run_folder(folder, args, str(accelerator.device), resumes)
        test(accelerator, args, model, datasets["test"], loaders["test"], checkpoint, folder, contents["progress"])
        if args.predict:
            predict(accelerator, args, accelerator.unwrap_model(model), checkpoint, folder)


def train(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    datasets: "dict[str, WindowDataset]",
    loaders: "dict[str, DataLoader]",
    folder: Path,
    interrupts: "Interrupts",
    resumes: bool,
) -> None:
    """Train, from the start or from the state in the run folder."""
    from data_provider.series import load_series
    from utils.runs.checkpoint import load_last
    from utils.runs.records import open_run_folder
    from utils.training.processes import is_there_for_all
    from utils.training.trainer import Trainer

    series, state = load_series(args), None
    if resumes:
        state = load_last(folder / "last", accelerator.unwrap_model(model), args, series)
        accelerator.print(f"Resuming at step {state['steps']}, epoch {state['epoch']}")
    if accelerator.is_main_process:
        open_run_folder(folder, args, str(accelerator.device), resumes)
    accelerator.print(f"Run folder: {folder}")
    Trainer(args, accelerator, model, datasets, loaders, series, folder, interrupts, state).fit()
    accelerator.wait_for_everyone()
    is_there_for_all(folder / "checkpoint")


def settle_batch_size(accelerator: "Accelerator", args: argparse.Namespace, model: "Module", last: Path | None) -> None:
    """Set the batch size to what fits into memory, or to that of the state `last` that the run goes on from."""
    from utils.runs.checkpoint import resumed_batches
    from utils.training.batch_size import fit_batch_size, take_batches

    if last is None:
        fit_batch_size(args, accelerator, model)
    else:
        take_batches(args, accelerator, *resumed_batches(last))


def run_prediction(args: argparse.Namespace, repetition: int) -> None:
    """Forecast beyond the CSV with a trained checkpoint; the CSV needs no more rows than a window has."""
    from data_provider.series import read_table
    from models import build_model
    from utils.runs.checkpoint import saved_basis
    from utils.runs.records import open_run_folder
    from utils.training.processes import start_processes

    accelerator = start_processes(args)
    read_table(args)  # before the LLM: a wrong CSV is found sooner
    folder, checkpoint = run_folder(args, repetition), trained_folder(args, repetition) / "checkpoint"
    model = build_model(args, saved_basis(checkpoint))
    if accelerator.is_main_process:
        open_run_folder(folder, args, str(accelerator.device), resumes=False)
    predict(accelerator, args, model, checkpoint, folder)


def predict(
    accelerator: "Accelerator", args: argparse.Namespace, model: "Module", checkpoint: Path, folder: Path
) -> None:
    """Write forecast.csv and forecast.png with the weights of a checkpoint."""
    from utils.runs.checkpoint import load_checkpoint
    from utils.runs.prediction import forecast_beyond, write_forecast

    contents = load_checkpoint(checkpoint, model, args, None)
    with accelerator.autocast():  # as in training and testing, whether accelerate has prepared the model or not
        forecast = forecast_beyond(args, model, contents)
    if accelerator.is_main_process:
        write_forecast(folder, args, forecast)
    first, last = forecast.dates[0], forecast.dates[-1]
    accelerator.print(f"Forecast | {first} to {last}, {len(forecast.channels)} channels: {folder / 'forecast.csv'}")


def provide(
    accelerator: "Accelerator", args: argparse.Namespace
) -> tuple[dict[str, "WindowDataset"], dict[str, "DataLoader"]]:
    """Return the windows of each split, and a loader for each that shares them out to the processes."""
    from data_provider.data_factory import data_provider
    from data_provider.series import SPLITS

    provided = {split: data_provider(args, split) for split in SPLITS}
    datasets = {split: dataset for split, (dataset, _) in provided.items()}
    # Batches stay on the CPU: there a model writes the prompts, without waiting for the device.
    loaders = {
        split: accelerator.prepare_data_loader(loader, device_placement=False)
        for split, (_, loader) in provided.items()
    }
    return datasets, loaders


def test(
    accelerator: "Accelerator",
    args: argparse.Namespace,
    model: "Module",
    dataset: "WindowDataset",
    loader: "DataLoader",
    checkpoint: Path,
    folder: Path,
    progress: dict,
) -> None:
    """Score the model on the test windows; print the scores and write metrics.json.

    `checkpoint` is where its weights are from, `progress` what that says of the training.
    """
    from utils.llm.loading import llm_of
    from utils.runs.records import cost_of, write_metrics, write_predictions
    from utils.training.evaluation import evaluate, window_numbers

    started = time.perf_counter()
    kept = [] if args.save_predictions else None
    scores = evaluate(accelerator, model, loader, dataset, headline_target(args), "test", keep=kept)
    seconds = time.perf_counter() - started
    if not math.isfinite(scores.mse):
        raise UserError(f"the test MSE is {scores.mse}: give --llm_dtype float32 or bfloat16, and look at the data")
    whose = "windows" if headline_target(args) is None else f"windows, those of {args.target},"
    accelerator.print(
        f"Test | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | {scores.windows} {whose} of {len(dataset)}"
    )
    naive = score_last_season(accelerator, args, dataset, loader)
    if accelerator.is_main_process:
        bare_model = accelerator.unwrap_model(model)
        cost = cost_of(bare_model, accelerator.device, progress)
        write_metrics(folder, args, scores, naive, seconds, llm_of(bare_model), checkpoint, cost)
        if kept:
            write_predictions(folder, kept, dataset, window_numbers(loader))


def score_last_season(
    accelerator: "Accelerator", args: argparse.Namespace, dataset: "WindowDataset", loader: "DataLoader"
) -> "Scores | None":
    """Score the plainest forecast on the same windows, and print its scores; None if no season fits into a window."""
    from data_provider.series import read_table
    from models.SeasonalNaive import Model
    from utils.training.evaluation import evaluate

    if (args.season or read_table(args).rows_of_a_season()) > args.seq_len:
        return None
    naive = Model(args)
    scores = evaluate(accelerator, naive, loader, dataset, headline_target(args), "seasonal naive")
    accelerator.print(
        f"Seasonal naive | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | the last {naive.season} rows again,"
        " on the same windows"
    )
    return scores


def describe(
    accelerator: "Accelerator", args: argparse.Namespace, model: "Module", datasets: "dict[str, WindowDataset]"
) -> None:
    """Print what is about to run: the LLM, the parameters, the windows and one prompt.

    Raises:
        UserError: if a prompt and the patches do not fit into the LLM.
    """
    from utils.llm.loading import llm_of

    llm = llm_of(model)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    frozen = 0
    if llm:
        frozen = llm.backbone.num_parameters()
        accelerator.print(llm.describe())
    if llm and model.llm:
        if model.llm.sees_pads:
            accelerator.print("This LLM cannot mask pads: prompts of one length are run together (slower, as exact)")
        if model.llm.why_not:
            accelerator.print(
                f"No prefix cache ({model.llm.why_not}): prompt and patches in one pass (slower, as exact)"
            )
    accelerator.print(f"Parameters: {trainable:,} trainable, {frozen:,} frozen")
    counts = ", ".join(f"{split} {len(dataset)}" for split, dataset in datasets.items())
    accelerator.print(f"Windows: {counts}, of {len(datasets['train'].channels)} channels")
    if args.eval_windows:
        accelerator.print(f"Evaluating on at most {args.eval_windows} evenly spaced windows (--eval_windows)")
    if llm and model.llm:
        window = datasets["train"].__getitems__([0])[0][..., 0]
        tokens = len(model.tokenize(window)[0])
        accelerator.print(f"Prompt of the first window ({tokens} tokens): {model.prompts.texts(window)[0]}")


if __name__ == "__main__":
    sys.exit(main())
