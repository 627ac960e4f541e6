"""Write and read `checkpoint` and `last`, the trained layers. The frozen LLM is in neither."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from data_provider.facts import DataFacts
from models.forecaster import Forecaster
from utils.errors import UserError, first_line
from utils.runs.contents import check_contents, check_progress, check_training
from utils.system.files import atomic_write

FORMAT = 1

_ALWAYS = {"weights", "llm", "flags", "channels", "mean", "deviation"}

# What a file lacks that was written before there was such a thing.
_OF_EARLIER_VERSIONS = {
    "is_long": False,
    "explainer": None,
    "training_hashes": [],
    "validation_hashes": [],
    "trained_rows": [],
    "one_in": 1,
    "llm_config": None,
    "llm_embeddings": None,
    "llm_probe": None,
    "description": None,
}


@dataclass(frozen=True)
class Run:
    """A training run: its folder, which exists, all its flags, and what its data are."""

    folder: Path
    flags: dict
    data: DataFacts


@dataclass(frozen=True)
class Checkpoint:
    """A file of ours as it was when it was read: somebody may train on meanwhile.

    Attributes:
        path: the file.
        sha256: of the file.
        contents: see `save_checkpoint` and `save_last`.
    """

    path: Path
    sha256: str
    contents: dict

    @property
    def flags(self) -> dict:
        """The flags of its run."""
        return self.contents["flags"]

    @cached_property
    def data(self) -> DataFacts:
        """The facts about its data."""
        return DataFacts.of(self.contents)

    @property
    def basis(self) -> torch.Tensor | None:
        """The basis of TimeLLM's compact map; None if it has no such map."""
        return self.contents["weights"].get("mapping_layer.basis")


def save_checkpoint(run: Run, model: Forecaster, progress: dict) -> None:
    """Write the best weights so far and what a later load must check, as `checkpoint`.

    Args:
        run: where to, and what of.
        model: unwrapped.
        progress: where in the run this is, plain numbers.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    _save(run.folder / "checkpoint", {**_contents(run, model), "progress": progress})


def save_last(run: Run, model: Forecaster, training: dict) -> None:
    """Write the state to resume from, as `last`: what `save_checkpoint` writes, and all of the trainer's own state."""
    _save(run.folder / "last", {**_contents(run, model), "training": training})


def _contents(run: Run, model: Forecaster) -> dict:
    llm = model.llm_info
    return {
        "format": FORMAT,
        "weights": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "llm": llm.as_dict() if llm else None,
        "llm_config": llm.traces.config if llm else None,
        "llm_embeddings": llm.traces.embeddings if llm else None,
        "llm_probe": llm.traces.probe if llm else None,
        "description": model.description,
        "flags": run.flags,
        **asdict(run.data),
    }


def _save(path: Path, contents: dict) -> None:
    atomic_write(path, lambda file: torch.save(contents, file))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `checkpoint`.

    Raises:
        UserError: if it is damaged or none of ours.
    """
    saved = _read(path)
    _refuse_damage(path, lambda: check_progress(saved.contents["progress"]))
    return saved


def read_last(path: Path) -> Checkpoint:
    """Read a `last`.

    Raises:
        UserError: if it is damaged or none of ours.
    """
    saved = _read(path)
    _refuse_damage(path, lambda: check_training(saved.contents["training"]))
    return saved


def training_ended(last: Checkpoint) -> bool:
    """Return whether the run of a `last` has come to its end: by its own flags there is nothing left to train."""
    flags, state = last.flags, last.contents["training"]
    if not last.contents["weights"]:  # nothing to train, only to score
        return bool(state["history"])
    is_over = (
        (flags["max_steps"] and state["steps"] >= flags["max_steps"])
        or state["epoch"] > flags["train_epochs"]
        or state["stopping"]["counter"] >= flags["patience"]
    )
    return bool(is_over) and state["validated_at"] == state["steps"]


def ended_state(folder: Path) -> str:
    """Return the SHA-256 of a run's `last` if by it training has ended, else an empty text.

    Raises:
        UserError: if it is damaged.
    """
    if not (folder / "last").is_file():
        return ""
    last = read_last(folder / "last")
    return last.sha256 if training_ended(last) else ""


def _read(path: Path) -> Checkpoint:
    """Read a file of ours once: its hash, its sums and its contents are of the same bytes."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:  # torch writes sums and never looks at them
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"the sum of its part {broken} is wrong")
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # a file that is cut off or of another kind can make zipfile and torch raise anything
        raise _damaged(path, problem) from problem
    if not isinstance(contents, dict) or contents.get("format") != FORMAT or not contents.keys() >= _ALWAYS:
        raise UserError(f"{path} is not a checkpoint of this program: name another --checkpoint")
    contents = {**_OF_EARLIER_VERSIONS, **contents}
    llm = contents["llm"]
    if isinstance(llm, dict) and "words_hash" in llm:  # its name in earlier versions
        contents["llm"] = {**llm, "embedding_hash": llm["words_hash"]}
        del contents["llm"]["words_hash"]
    _refuse_damage(path, lambda: check_contents(contents))
    return Checkpoint(path, sha256, contents)


def _refuse_damage(path: Path, check: Callable[[], None]) -> None:
    """Run a check of contents; what it raises becomes one line that names the file."""
    try:
        check()
    except Exception as problem:  # contents of a stranger may be anything, and so may what they make a check raise
        raise _damaged(path, problem) from problem


def _damaged(path: Path, problem: Exception) -> UserError:
    return UserError(
        f"{path} is damaged or no checkpoint ({first_line(problem)}): train again, or name another --checkpoint"
    )
