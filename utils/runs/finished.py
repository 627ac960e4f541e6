"""Whether a run is done already. Nothing here imports torch."""

import argparse
from pathlib import Path

from utils.cli.options import DEFAULTS, NOT_RUN_IDENTITY, flags_of_final_test, flags_tagged
from utils.cli.places import csv_path
from utils.system.files import hash_of, read_json

# What a test's own flags may say otherwise than its run's, without another score.
_OF_A_TEST = {"is_training", "checkpoint"}


def is_of(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether what a run folder holds was made with these flags and this CSV.

    Args:
        folder: the run folder.
        args: the flags, with the repetition's own seed.

    Raises:
        UserError: if its args.json is damaged.
    """
    path = folder / "args.json"
    if not path.is_file():
        return False
    before = read_json(path)
    return before.get("data_sha256") == hash_of(csv_path(args)) and _same_flags(before, args)


def is_finished(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether a run folder holds the scores of these flags, on all the windows of the data as they are now.

    They are those of the weights that are there, and of a training that has ended, whose state is there.

    Raises:
        UserError: if its metrics.json is damaged.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    metrics = read_json(path)
    tested = metrics.get("flags")
    return (
        isinstance(tested, dict)  # else of an earlier version, which did not tell
        and _same_flags(tested, args, _OF_A_TEST)
        and metrics.get("eval_windows") == flags_of_final_test(args).eval_windows
        and metrics.get("data_sha256") == hash_of(csv_path(args))
        and metrics.get("prompt_file_sha256") == hash_of(Path(args.prompt_file))
        and bool(metrics.get("ended_state_sha256"))
        and metrics["ended_state_sha256"] == hash_of(folder / "last")
        and metrics.get("checkpoint_sha256") == hash_of(folder / "checkpoint")
    )


def _same_flags(before: dict, args: argparse.Namespace, but_for: set[str] = frozenset()) -> bool:
    """Return whether flags that were written down are these, as far as they matter to weights and scores."""
    # --auto_batch_size found another batch, of as many windows an optimiser step.
    found = {"batch_size", "grad_accum"} if args.auto_batch_size else set()
    sizes = before.get("batch_size"), before.get("grad_accum")
    windows = sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else 0
    if found and windows != args.batch_size * args.grad_accum:
        return False
    names = vars(args).keys() - flags_tagged(NOT_RUN_IDENTITY) - found - but_for
    return all(before.get(name, DEFAULTS.get(name)) == vars(args)[name] for name in names)
