"""Train, test and compare forecasters that reprogram a frozen large language model.

    python run_main.py --demo                                        nothing to download
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit  train, then test
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit --is_training 0
    accelerate launch run_main.py --data ETTm1 ...                   on several processes

--help lists the flags, README.md explains them.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from utils.errors import UserError
from utils.options import check_options, check_paths, get_parser, run_folder, trained_folder

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    try:
        args = get_parser().parse_args(argv)
    except SystemExit as leave:  # argparse's way to end after --help or a flag it does not know
        return int(leave.code or 0)
    try:
        check_options(args)
        if args.demo:
            prepare_demo(args)
        check_paths(args)
        for repetition in range(args.itr):
            run(args, repetition)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the best checkpoint so far is in the run folder, --is_training 0 tests it", file=sys.stderr)
        return 130
    return 0


def prepare_demo(args: argparse.Namespace) -> None:
    """Make the data and the LLM of --demo, where they are not there yet."""
    from base_models.make_tiny_llm import make_tiny_llm
    from dataset.demo import write_demo_csv
    from utils.options import DEMO_DEFAULTS, csv_path

    if args.data_path == DEMO_DEFAULTS["data_path"]:
        write_demo_csv(csv_path(args))
    if args.llm_model_path == DEMO_DEFAULTS["llm_model_path"]:
        make_tiny_llm("qwen2", args.llm_model_path)


def run(args: argparse.Namespace, repetition: int) -> None:
    """Train and test once, with the seed of this repetition."""
    # torch and transformers take seconds to import: not before the command line is known to be sound.
    from data_provider.data_factory import data_provider
    from data_provider.series import SPLITS, load_series
    from models import build_model
    from utils.checkpoint import load_checkpoint
    from utils.evaluation import evaluate
    from utils.llm import llm_of
    from utils.processes import start_processes
    from utils.records import write_args, write_metrics
    from utils.training import Trainer

    accelerator = start_processes(args, args.seed + repetition)
    provided = {split: data_provider(args, split) for split in SPLITS}
    datasets = {split: dataset for split, (dataset, _) in provided.items()}
    model = build_model(args)
    describe(accelerator, args, model, datasets)

    folder = run_folder(args, repetition)
    # Batches stay on the CPU: there a model writes the prompts, without waiting for the device.
    loaders = {
        split: accelerator.prepare_data_loader(loader, device_placement=False)
        for split, (_, loader) in provided.items()
    }
    model = accelerator.prepare(model)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if args.is_training or args.checkpoint:
            write_args(folder, args, str(accelerator.device))
    if args.is_training:
        accelerator.print(f"Run folder: {folder}")
        Trainer(args, accelerator, model, datasets, loaders, load_series(args), folder).fit()
        accelerator.wait_for_everyone()

    started = time.perf_counter()
    checkpoint = trained_folder(args, repetition) / "checkpoint"
    trained = accelerator.unwrap_model(model)
    load_checkpoint(checkpoint, trained)
    target = args.target if args.features == "MS" else None
    scores = evaluate(accelerator, model, loaders["test"], datasets["test"], target, "test")
    accelerator.print(
        f"Test | MSE: {scores.mse:.7f} MAE: {scores.mae:.7f} | {scores.windows} of {len(datasets['test'])} windows"
    )
    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        write_metrics(folder, scores, seconds, llm_of(trained), checkpoint)


def describe(accelerator, args, model, datasets) -> None:
    """Print what is about to run: the LLM, the parameters, the windows and one prompt.

    Raises:
        UserError: if a prompt and the patches do not fit into the LLM.
    """
    from utils.llm import llm_of

    llm = llm_of(model)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    frozen = 0
    if llm:
        frozen = llm.backbone.num_parameters()
        accelerator.print(llm.describe())
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
    if llm:
        window = datasets["train"].__getitems__([0])[0][..., 0]
        tokens = len(model.tokenize(window)[0])
        accelerator.print(f"Prompt of the first window ({tokens} tokens): {model.prompts.texts(window)[0]}")


if __name__ == "__main__":
    sys.exit(main())
