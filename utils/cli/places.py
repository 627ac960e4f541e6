"""Locate a run's files and folders."""

import argparse
from pathlib import Path

from utils.cli.options import DEMO_DEFAULTS

BASE_MODELS = "base_models"  # the folder of downloaded LLMs


def is_demo_default(args: argparse.Namespace, name: str) -> bool:
    """Return whether a flag points to a file or folder that --demo creates if it is missing."""
    return args.demo and getattr(args, name) == DEMO_DEFAULTS[name]


def csv_path(args: argparse.Namespace) -> Path:
    """Return the path of the run's CSV."""
    return Path(args.root_path) / args.data_path


def looks_like_a_path(source: str) -> bool:
    """Return whether a source is a local folder, existing or not, rather than a Hub id such as ``gpt2`` or ``a/b``."""
    if not source:
        return False
    path = Path(source)
    if path.exists() or path.is_absolute() or source.startswith((".", "~")) or "\\" in source:
        return True
    if path.parts[0] == BASE_MODELS:  # in any working directory: nobody else can publish an LLM under this name
        return True
    return len(path.parts) > 2 or (len(path.parts) == 2 and Path(path.parts[0]).is_dir())


def run_folder(args: argparse.Namespace, repetition: int) -> Path:
    """Build the path of a repetition's run folder, named after the flags as in Time-LLM; repetitions count from 0."""
    name = (
        f"{args.task_name}_{args.model_id}_{args.model}_{args.data}_ft{args.features}"
        f"_sl{args.seq_len}_ll{args.label_len}_pl{args.pred_len}_dm{args.d_model}_nh{args.n_heads}"
        f"_el{args.e_layers}_dl{args.d_layers}_df{args.d_ff}_fc{args.factor}_eb{args.embed}"
        f"_{args.des}_{repetition}-{args.model_comment}"
    )
    return Path(args.checkpoints) / name


def hint_after_interrupt(args: argparse.Namespace) -> str:
    """Say how to continue an interrupted run."""
    folders = [run_folder(args, repetition) for repetition in range(args.itr)]
    if args.is_training and any((folder / "last").is_file() for folder in folders):
        return "the state is saved, the same command with --resume goes on from there"
    return "there is no state to resume from yet" if args.is_training else "nothing was changed"


def trained_folder(args: argparse.Namespace, repetition: int) -> Path:
    """Return the folder whose checkpoint a test loads: the run's own, or the one that --checkpoint names."""
    return Path(args.checkpoint) if args.checkpoint else run_folder(args, repetition)
