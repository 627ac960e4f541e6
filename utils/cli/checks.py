"""Whether the flags make sense together, and what they name is there."""

import argparse
import math
import os
import platform
import sys
from pathlib import Path

from utils.cli.options import has_llm, has_patches
from utils.cli.places import csv_path, demo_makes, looks_like_a_path, run_folder, trained_folder
from utils.errors import UserError

# Of every common file system.
MAX_FILE_NAME = 255

# Of Windows, unless it is told to take longer ones.
MAX_PATH = 259


# Of numpy's generators.
MAX_SEED = 2**32


_AT_LEAST = {
    0: (
        "eval_batch_size",
        "max_steps",
        "eval_windows",
        "eval_steps",
        "num_workers",
        "llm_dim",
        "label_len",
        "save_steps",
        "season",
    ),
    1: (
        *("seq_len", "pred_len", "patch_len", "stride", "d_model", "n_heads", "d_ff", "itr", "train_epochs"),
        *("batch_size", "patience", "grad_accum", "percent", "moving_avg", "e_layers"),
    ),
}


# Numbers with a range of their own: what holds, and how to say it.
_RANGES = {
    "percent": (lambda value: value <= 100, "at most 100"),
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0 and finite"),
    "mapping_rate": (lambda value: 0 < value < math.inf, "above 0 and finite"),
    "residual_rate": (lambda value: 0 < value < math.inf, "above 0 and finite"),
    "dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "pct_start": (lambda value: 0 < value < 1, "between 0 and 1"),
    "grad_clip": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "prompt_decimals": (lambda value: value >= -1, "at least -1"),
    "test_windows": (lambda value: value >= -1, "at least -1"),
}


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that contradict each other or make no sense.

    Raises:
        UserError: names the flag and what to give instead.
    """
    for least, names in _AT_LEAST.items():
        for name in names:
            if getattr(args, name) < least:
                raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    for name, (holds, words) in _RANGES.items():
        if not holds(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)} must be {words}")
    for holds, message in _requirements(args):
        if not holds:
            raise UserError(message)
    for name in ("model_id", "model_comment", "des"):
        bad = sorted(set(getattr(args, name)) & set('<>:"/\\|?*\n\r\t'))
        if bad:
            raise UserError(f"--{name} names a folder and cannot hold {' '.join(map(repr, bad))}: leave it out")


def _requirements(args: argparse.Namespace) -> tuple[tuple[bool, str], ...]:
    """Return what must hold, each with the message for when it does not."""
    return (
        (
            0 <= args.seed <= MAX_SEED - args.itr,
            f"--seed {args.seed} must be at least 0 and, with --itr {args.itr}, at most {MAX_SEED - args.itr}",
        ),
        (
            args.seq_len >= args.patch_len or not has_patches(args),
            f"--seq_len {args.seq_len} is shorter than one patch: give at least --patch_len {args.patch_len}",
        ),
        (
            args.d_model % args.n_heads == 0 or args.model != "PatchTST",
            f"--d_model {args.d_model} does not divide among --n_heads {args.n_heads}: PatchTST's heads share it",
        ),
        (
            all(1 <= level <= 99 for level in args.level),
            f"--level {_spaced(args.level)}: levels are whole per cents from 1 to 99",
        ),
        (
            len(set(args.level)) == len(args.level),
            f"--level {_spaced(args.level)} has a level twice: give each once",
        ),
        (
            args.label_len <= args.seq_len,
            f"--label_len {args.label_len} is longer than the window: give at most --seq_len {args.seq_len}",
        ),
        (
            args.llm_layers is None or args.llm_layers >= 1,
            f"--llm_layers {args.llm_layers} must be at least 1 (leave it out for the default)",
        ),
        (
            not (args.content and args.prompt_file),
            "--content and --prompt_file both describe the data set: give one of them",
        ),
        (
            not args.resume or bool(args.is_training),
            "--resume goes on with training: leave it out with --is_training 0",
        ),
        (
            not (args.checkpoint and args.is_training),
            "--checkpoint names a run to test: it goes with --is_training 0",
        ),
        (
            args.ablation == "none" or has_llm(args),
            f"--ablation {args.ablation} is a change of TimeLLM: leave it out with --model {args.model}",
        ),
        (
            args.residual == "none" or has_llm(args),
            f"--residual {args.residual} is a part of TimeLLM: leave it out with --model {args.model}",
        ),
    )


def _spaced(levels: list[int]) -> str:
    return " ".join(map(str, levels))


def check_paths(args: argparse.Namespace) -> None:
    """Refuse files and folders that are not there.

    Raises:
        UserError: names the missing path and the flag that points to it.
    """
    csv = csv_path(args)
    if not csv.is_file() and not demo_makes(args, "data_path"):
        fetch = ", or fetch it: python scripts/fetch.py ett" if args.data.startswith("ETT") else ""
        raise UserError(f"no data file {csv}: check --root_path and --data_path{fetch}")
    if args.prompt_file and not Path(args.prompt_file).is_file():
        raise UserError(f"no prompt file {args.prompt_file}: check --prompt_file")
    is_there = (Path(args.llm_model_path) / "config.json").is_file() or demo_makes(args, "llm_model_path")
    if has_llm(args) and looks_like_a_path(args.llm_model_path) and not is_there:
        raise UserError(
            f"no LLM in {args.llm_model_path}: --llm_model_path takes a folder with a config.json"
            " (python scripts/fetch.py smollm2 fetches one)"
        )
    for place in (Path(args.checkpoints), *Path(args.checkpoints).parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file: --checkpoints names a folder")
    _check_lengths(args)
    first = run_folder(args, 0)
    if args.resume == "yes" and not (first / "last").is_file():
        raise UserError(f"no state to resume from in {first}: leave out --resume, or give --resume auto to start fresh")
    if not args.is_training:
        for repetition in range(args.itr):
            folder = trained_folder(args, repetition)
            if not (folder / "checkpoint").is_file():
                raise UserError(f"no checkpoint in {folder}: train first, or name a run's folder with --checkpoint")


def _check_lengths(args: argparse.Namespace) -> None:
    """Refuse what the file system would: under Windows that looks as if a folder were missing."""
    folder, remedy = run_folder(args, args.itr), "shorten --model_id, --model_comment or --des"
    longest = len(folder.name.encode())
    if longest > MAX_FILE_NAME:
        raise UserError(f"the run folder's name has {longest} bytes: {remedy}")
    file = "calibration.npz.01234567.unfinished"  # the longest of a run's, while it is written
    if args.report_to == "tensorboard":  # time, host, process and number
        file = f"tensorboard/events.out.tfevents.{2**31}.{platform.node()}.{2**31}.99"
    path = os.path.abspath(folder / file)  # noqa: PTH100 - without .., as Windows counts, but with its links
    characters = 0 if path.startswith("\\\\?\\") else len(path)  # what begins so may be of any length
    if characters > MAX_PATH and not _takes_long_paths():
        raise UserError(
            f"this Windows takes paths of {MAX_PATH} characters, and the run would have some of {characters}: {remedy},"
            " name a shorter folder with --checkpoints, or turn long paths on (LongPathsEnabled in the registry)"
        )


def _takes_long_paths() -> bool:
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:  # it has never been set
        return False
