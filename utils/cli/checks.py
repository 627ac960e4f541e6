"""Whether the flags make sense together, and what they name is there."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.cli.options import FLAGS, has_llm, has_patches
from utils.cli.places import csv_path, is_demo_default, looks_like_a_path, run_folder, trained_folder
from utils.errors import UserError

# Of every common file system.
MAX_FILE_NAME = 255

# Of Windows, unless it is told to take longer ones.
MAX_PATH = 259

# Of numpy's generators.
MAX_SEED = 2**32


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that contradict each other or make no sense.

    Raises:
        UserError: names the flag and what to give instead.
    """
    for name, flag in FLAGS.items():
        value = getattr(args, name)
        if flag.range and not flag.range.holds(value):
            raise UserError(f"--{name} {value} must be {flag.range.words}")
    for problem in _contradictions(args):
        raise UserError(problem)
    for name in ("model_id", "model_comment", "des"):
        bad = sorted(set(getattr(args, name)) & set('<>:"/\\|?*\n\r\t'))
        if bad:
            raise UserError(f"--{name} names a folder and cannot hold {' '.join(map(repr, bad))}: leave it out")


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    """Yield messages for flags that do not fit together."""
    if not 0 <= args.seed <= MAX_SEED - args.itr:
        yield f"--seed {args.seed} must be at least 0 and, with --itr {args.itr}, at most {MAX_SEED - args.itr}"
    if args.seq_len < args.patch_len and has_patches(args):
        yield f"--seq_len {args.seq_len} is shorter than one patch: give at least --patch_len {args.patch_len}"
    if args.d_model % args.n_heads and args.model == "PatchTST":
        yield f"--d_model {args.d_model} does not divide among --n_heads {args.n_heads}: PatchTST's heads share it"
    if not all(1 <= level <= 99 for level in args.level):
        yield f"--level {_spaced(args.level)}: levels are whole per cents from 1 to 99"
    if len(set(args.level)) < len(args.level):
        yield f"--level {_spaced(args.level)} has a level twice: give each once"
    if args.label_len > args.seq_len:
        yield f"--label_len {args.label_len} is longer than the window: give at most --seq_len {args.seq_len}"
    if args.llm_layers is not None and args.llm_layers < 1:
        yield f"--llm_layers {args.llm_layers} must be at least 1 (leave it out for the default)"
    if args.content and args.prompt_file:
        yield "--content and --prompt_file both describe the data set: give one of them"
    if args.resume and not args.is_training:
        yield "--resume continues training: leave it out with --is_training 0"
    if args.checkpoint and args.is_training:
        yield "--checkpoint names a run to test: it goes with --is_training 0"
    if args.ablation != "none" and not has_llm(args):
        yield f"--ablation {args.ablation} is a change of TimeLLM: leave it out with --model {args.model}"
    if args.residual != "none" and not has_llm(args):
        yield f"--residual {args.residual} is a part of TimeLLM: leave it out with --model {args.model}"


def _spaced(levels: list[int]) -> str:
    return " ".join(map(str, levels))


def check_paths(args: argparse.Namespace) -> None:
    """Refuse files and folders that are not there.

    Raises:
        UserError: names the missing path and the flag that points to it.
    """
    csv = csv_path(args)
    if not csv.is_file() and not is_demo_default(args, "data_path"):
        fetch = ", or fetch it: python scripts/fetch.py ett" if args.data.startswith("ETT") else ""
        raise UserError(f"no data file {csv}: check --root_path and --data_path{fetch}")
    if args.prompt_file and not Path(args.prompt_file).is_file():
        raise UserError(f"no prompt file {args.prompt_file}: check --prompt_file")
    is_there = (Path(args.llm_model_path) / "config.json").is_file() or is_demo_default(args, "llm_model_path")
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
