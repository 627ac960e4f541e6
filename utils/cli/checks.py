"""Check the flags, the files and folders that they name, and the environment variables, before torch is imported."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.cli.options import DEFAULTS, FLAGS, can_learn, has_llm, reads_notes
from utils.cli.places import csv_path, is_demo_default, looks_like_a_path, run_folder, trained_folder
from utils.errors import UserError

MAX_FILE_NAME = 255  # bytes, on every common file system
MAX_PATH = 259  # characters, on Windows without long paths
MAX_SEED = 2**32  # numpy accepts seeds below

# Features that accelerate enables from the environment and that this program neither supports nor tests.
_UNSUPPORTED = [f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")]

# A launcher sets all three for each process; none has a meaning without the others.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def check_options(args: argparse.Namespace) -> None:
    """Raise a UserError if a flag's value is out of range or contradicts another flag."""
    for name, flag in FLAGS.items():
        value = getattr(args, name)
        if flag.range and not flag.range.holds(value):
            raise UserError(f"--{name} {value} must be {flag.range.words}")
    for problem in _contradictions(args):
        raise UserError(problem)


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    levels = " ".join(map(str, args.level))
    if not 0 <= args.seed <= MAX_SEED - args.itr:
        yield f"--seed {args.seed} must be at least 0 and, with --itr {args.itr}, at most {MAX_SEED - args.itr}"
    if args.seq_len < args.patch_len and args.model in ("TimeLLM", "PatchTST"):
        yield f"--seq_len {args.seq_len} is shorter than one patch: give at least --patch_len {args.patch_len}"
    if args.d_model % args.n_heads and args.model == "PatchTST":
        yield f"--d_model {args.d_model} is not divisible by --n_heads {args.n_heads}, as PatchTST needs: change one"
    if not all(1 <= level <= 99 for level in args.level):
        yield f"--level {levels}: levels are whole percentages from 1 to 99"
    if len(set(args.level)) < len(args.level):
        yield f"--level {levels} repeats a level: give each once"
    if args.label_len > args.seq_len:
        yield f"--label_len {args.label_len} is longer than the context: give at most --seq_len {args.seq_len}"
    if args.content and args.prompt_file:
        yield "--content and --prompt_file both describe the data set: give only one of them"
    if args.resume and not args.is_training:
        yield "--resume continues training: leave it out with --is_training 0"
    if args.checkpoint and args.is_training:
        yield "--checkpoint names a run to test: add --is_training 0"
    for name, value in (("ablation", args.ablation), ("residual", args.residual)):
        if value != "none" and not has_llm(args) and not (reads_notes(args) and value == "random_llm"):
            yield f"--{name} {value} applies only to TimeLLM: leave it out with --model {args.model}"
    if args.notes and args.covariate_model == "linear":
        yield "--covariate_model linear reads no notes: leave out --notes, or give auto or boosted"
    if args.covariate_model == "linear" and args.past_covariates and not args.covariates:
        yield "--covariate_model linear needs --covariates: past ones are read by trees alone"
    if not can_learn(args) and (reads_notes(args) or args.covariate_model == "boosted"):
        what = "--notes" if args.notes else "--covariate_model boosted"
        yield f"{what} needs a forecaster that is trained: leave it out with --model {args.model}"
    if reads_notes(args) and not has_llm(args) and not args.llm_model_path and args.llm_model == DEFAULTS["llm_model"]:
        yield "--notes needs an LLM to read them: name it with --llm_model_path or --llm_model"
    for name in ("model_id", "model_comment", "des"):
        if bad := sorted(set(getattr(args, name)) & set('<>:"/\\|?*\n\r\t')):
            yield f"--{name} names a folder and cannot contain {' '.join(map(repr, bad))}: choose another name"


def check_paths(args: argparse.Namespace) -> None:
    """Raise a UserError if a file or folder that the flags name does not exist."""
    csv = csv_path(args)
    if not csv.is_file() and not is_demo_default(args, "data_path"):
        fetch = ", or fetch it: python scripts/fetch.py ett" if args.data.startswith("ETT") else ""
        raise UserError(f"no data file {csv.absolute()}: check --root_path and --data_path, or --csv{fetch}")
    if args.prompt_file and not Path(args.prompt_file).is_file():
        raise UserError(f"no prompt file {args.prompt_file}: check --prompt_file")
    llm_exists = (Path(args.llm_model_path) / "config.json").is_file() or is_demo_default(args, "llm_model_path")
    if (has_llm(args) or reads_notes(args)) and looks_like_a_path(args.llm_model_path) and not llm_exists:
        raise UserError(
            f"no LLM in {args.llm_model_path}: --llm_model_path needs a folder with a config.json"
            " (python scripts/fetch.py smollm2 downloads one)"
        )
    for place in (Path(args.checkpoints), *Path(args.checkpoints).parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file: --checkpoints must name a folder")
    _check_lengths(args)
    first = run_folder(args, 0)
    if args.resume == "yes" and not (first / "last").is_file():
        raise UserError(f"no state to resume from in {first}: leave out --resume, or give --resume auto to start fresh")
    if not args.is_training:
        for folder in (trained_folder(args, repetition) for repetition in range(args.itr)):
            if not (folder / "checkpoint").is_file():
                raise UserError(f"no checkpoint in {folder}: train first, or name a run's folder with --checkpoint")


def _check_lengths(args: argparse.Namespace) -> None:
    """Refuse paths that are too long; Windows itself would report a missing folder."""
    folder, remedy = run_folder(args, args.itr), "shorten --model_id, --model_comment or --des"
    name_bytes = len(folder.name.encode())
    if name_bytes > MAX_FILE_NAME:
        raise UserError(f"the run folder's name has {name_bytes} bytes, {MAX_FILE_NAME} are allowed: {remedy}")
    longest_file = "calibration.npz.01234567.unfinished"  # a run's longest file name, while it is being written
    if args.report_to == "tensorboard":  # time, host, process id, counter and nanoseconds
        longest_file = f"tensorboard/events.out.tfevents.{2**31}.{platform.node()}.{2**31}.99.{10**9 - 1}"
    # Windows counts a path without "..", but with symbolic links unresolved.
    path = os.path.abspath(folder / longest_file)  # noqa: PTH100
    length = 0 if path.startswith("\\\\?\\") else len(path)  # Windows does not limit paths with this prefix
    if length > MAX_PATH and not _takes_long_paths():
        raise UserError(
            f"the run's longest path would have {length} characters, this Windows allows {MAX_PATH}: {remedy}, name a"
            " shorter folder with --checkpoints, or enable long paths (LongPathsEnabled in the registry)"
        )


def _takes_long_paths() -> bool:
    """Return whether the system allows paths longer than `MAX_PATH`."""
    if sys.platform != "win32":
        return True
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:  # the value does not exist until someone sets it
        return False


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "on")


def check_environment() -> None:
    """Raise a UserError if variables enable an unsupported feature of accelerate or are an incomplete launcher's."""
    for name in filter(_is_true, _UNSUPPORTED):
        raise UserError(f"{name}={os.environ[name]} is not supported: unset it, or launch without it")
    if _is_true("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says: set ACCELERATE_USE_CPU=1 and"
            " start the processes with torchrun --nproc_per_node"
        )
    given = {name: os.environ[name] for name in _LAUNCHER_VARIABLES if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value} is not a whole number: unset it, or start with accelerate launch")
    # A single process may be given its rank without a local rank, as by Kubernetes' PyTorchJob.
    needed = [name for name in _LAUNCHER_VARIABLES if name != "LOCAL_RANK" or given.get("WORLD_SIZE") != "1"]
    missing = [name for name in needed if name not in given]
    if missing and {"RANK", "LOCAL_RANK"} & given.keys():
        name, value = next(iter(given.items()))
        raise UserError(f"{name}={value} is set but {missing[0]} is not: unset it, or start with accelerate launch")


def overruled_variables(mixed_precision: str, grad_accum: int) -> list[str]:
    """Write a note for each variable of accelerate that the flags overrule; --use_amp decides `mixed_precision`."""
    decided = (
        ("ACCELERATE_MIXED_PRECISION", (mixed_precision, "no"), "--use_amp"),  # "no" is the launcher's default
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", (str(grad_accum),), "--grad_accum"),
        ("ACCELERATE_DYNAMO_BACKEND", ("no",), "no flag, nothing is compiled"),
    )
    return [
        f"Note: {name}={os.environ[name]} has no effect, the flags decide ({flag})"
        for name, values, flag in decided
        if os.environ.get(name, "").lower() not in ("", *values)
    ]
