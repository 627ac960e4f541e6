"""Find out whether a run is already finished, without importing torch."""

import argparse
from pathlib import Path

from utils.cli.options import DEFAULTS, NOT_RUN_IDENTITY, flags_of_final_test, flags_tagged
from utils.cli.places import csv_path
from utils.system.files import hash_of, read_json


def is_of(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether a run folder was written with these flags and CSV; raise UserError if args.json is damaged."""
    if not (folder / "args.json").is_file():
        return False
    before = read_json(folder / "args.json")
    return before.get("data_sha256") == hash_of(csv_path(args)) and _same_flags(before, args)


def is_finished(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether a run folder holds the scores of these flags on all windows of the current data.

    The scores count only if the run was trained with these flags, training has ended, and both `last` and
    `checkpoint` are the files that were scored.

    Raises:
        UserError: if metrics.json or args.json is damaged.
    """
    if not (folder / "metrics.json").is_file() or not is_of(folder, args):
        return False
    metrics = read_json(folder / "metrics.json")
    tested = metrics.get("flags")
    return (
        isinstance(tested, dict)  # earlier versions did not write the flags
        and _same_flags(tested, args, {"is_training", "checkpoint"})  # a later test has the same scores
        and metrics.get("eval_windows") == flags_of_final_test(args).eval_windows
        and metrics.get("data_sha256") == hash_of(csv_path(args))
        and metrics.get("prompt_file_sha256") == hash_of(Path(args.prompt_file))
        and bool(metrics.get("ended_state_sha256"))
        and metrics["ended_state_sha256"] == hash_of(folder / "last")
        and metrics.get("checkpoint_sha256") == hash_of(folder / "checkpoint")
    )


def _same_flags(before: dict, args: argparse.Namespace, ignored: set[str] = frozenset()) -> bool:
    """Return whether saved flags equal the present ones, except flags that change neither weights nor scores."""
    # --auto_batch_size may have found another batch size with as many windows per optimizer step.
    resized = {"batch_size", "grad_accum"} if args.auto_batch_size else set()
    sizes = before.get("batch_size"), before.get("grad_accum")
    windows = sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else 0
    if resized and windows != args.batch_size * args.grad_accum:
        return False
    names = vars(args).keys() - flags_tagged(NOT_RUN_IDENTITY) - resized - ignored
    return all(before.get(name, DEFAULTS.get(name)) == vars(args)[name] for name in names)
