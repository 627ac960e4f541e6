"""Whether a run is done already. Nothing here imports torch."""

import argparse
import hashlib
import json
from pathlib import Path

from utils.cli.options import SAME_RUN, defaults, flags_of_final_test, flags_tagged
from utils.cli.places import csv_path


def is_of(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether what a run folder holds was made with these flags and this CSV.

    Args:
        folder: the run folder.
        args: the flags, with the repetition's own seed.
    """
    path = folder / "args.json"
    if not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    # --auto_batch_size found another batch, of as many windows an optimiser step.
    found = {"batch_size", "grad_accum"} if args.auto_batch_size else set()
    windows = before.get("batch_size", 0) * before.get("grad_accum", 0)
    same_step = not found or windows == args.batch_size * args.grad_accum
    names = vars(args).keys() - flags_tagged(SAME_RUN) - found
    same_data = before.get("data_sha256") == hash_of(csv_path(args))
    return same_data and same_step and all(before.get(name, defaults().get(name)) == vars(args)[name] for name in names)


def is_finished(folder: Path, args: argparse.Namespace) -> bool:
    """Return whether a run folder holds the scores of these flags, on all the windows of the data as they are now."""
    path = folder / "metrics.json"
    if not path.is_file() or not is_of(folder, args):
        return False
    metrics = json.loads(path.read_text(encoding="utf-8"))
    windows = flags_of_final_test(args).eval_windows
    return metrics.get("eval_windows") == windows and metrics.get("data_sha256") == hash_of(csv_path(args))


def hash_of(path: Path) -> str:
    """Return a file's SHA-256, an empty text if it is not there yet."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
