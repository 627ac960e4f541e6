"""Write and read `checkpoint` and `last`, which hold the trained layers but not the frozen LLM."""

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

_REQUIRED = {"weights", "llm", "flags", "channels", "mean", "deviation"}

# The values of keys that files of earlier versions lack.
_DEFAULTS_OF_EARLIER_VERSIONS = {
    **dict.fromkeys(("explainer", "boosted", "llm_config", "llm_embeddings", "llm_probe", "description")),
    **{key: [] for key in ("training_hashes", "validation_hashes", "trained_rows")},
    "is_long": False,
}


@dataclass(frozen=True)
class Run:
    """A training run: its existing folder, all its flags and the facts about its data."""

    folder: Path
    flags: dict
    data: DataFacts


@dataclass(frozen=True)
class Checkpoint:
    """A `checkpoint` or `last` as it was when it was read; training may have replaced the file since.

    `sha256` is the hash of the file; for the contents, see `save_checkpoint` and `save_last`.
    """

    path: Path
    sha256: str
    contents: dict

    @property
    def flags(self) -> dict:
        """The flags of the run."""
        return self.contents["flags"]

    @cached_property
    def data(self) -> DataFacts:
        """The facts about the run's data."""
        return DataFacts.of(self.contents)

    @property
    def basis(self) -> torch.Tensor | None:
        """The basis of TimeLLM's compact mapping layer; None if the model has no such layer."""
        return self.contents["weights"].get("mapping_layer.basis")


def save_checkpoint(run: Run, model: Forecaster, progress: dict) -> None:
    """Write the best weights so far of an unwrapped model, and what a later load must check, as `checkpoint`.

    `progress` is the position in the run, as plain numbers.

    Raises:
        UserError: if the file cannot be written, for example because the disk is full.
    """
    _save(run, model, "checkpoint", {"progress": progress})


def save_last(run: Run, model: Forecaster, training: dict) -> None:
    """Write the state to resume from as `last`: the contents of `save_checkpoint` and the state of the trainer."""
    _save(run, model, "last", {"training": training})


def _save(run: Run, model: Forecaster, name: str, position: dict) -> None:
    llm = model.llm_info
    contents = {
        "format": FORMAT,
        "weights": {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()},
        "llm": llm.as_dict() if llm else None,
        "llm_config": llm.traces.config if llm else None,
        "llm_embeddings": llm.traces.embeddings if llm else None,
        "llm_probe": llm.traces.probe if llm else None,
        "description": model.description,
        "flags": run.flags,
        **asdict(run.data),
        **position,
    }
    atomic_write(run.folder / name, lambda file: torch.save(contents, file))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `checkpoint`; raise UserError if it is damaged or was not written by this program."""
    return _read(path, lambda contents: check_progress(contents["progress"]))


def read_last(path: Path) -> Checkpoint:
    """Read a `last`; raise as `read_checkpoint` does."""
    return _read(path, lambda contents: check_training(contents["training"]))


def _training_ended(last: Checkpoint) -> bool:
    """Return whether the run that wrote a `last` has nothing left to train by its own flags."""
    flags, state = last.flags, last.contents["training"]
    if not last.contents["weights"]:  # a model without weights is only scored
        return bool(state["history"])
    is_over = (
        (flags["max_steps"] and state["steps"] >= flags["max_steps"])
        or state["epoch"] > flags["train_epochs"]
        or state["stopping"]["counter"] >= flags["patience"]
    )
    return bool(is_over) and state["validated_at"] == state["steps"]


def ended_state(folder: Path) -> str:
    """Return the SHA-256 of a run's `last` if training has ended, else ""; raise UserError if `last` is damaged."""
    last = read_last(folder / "last") if (folder / "last").is_file() else None
    return last.sha256 if last and _training_ended(last) else ""


def _read(path: Path, check_position: Callable[[dict], None]) -> Checkpoint:
    """Read a file once, so that its hash, its checksums and its contents are those of the same bytes."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:  # torch writes checksums but never verifies them
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of its part {broken} is wrong")
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(contents, dict) or contents.get("format") != FORMAT or not contents.keys() >= _REQUIRED:
            raise UserError(f"{path} is not a checkpoint of this program: name another --checkpoint")
        contents = {**_DEFAULTS_OF_EARLIER_VERSIONS, **contents}
        if contents.pop("one_in", 1) != 1:  # earlier versions chose the rows in another way
            contents["trained_rows"] = []
        llm = contents["llm"]
        if isinstance(llm, dict) and "words_hash" in llm:  # the key's name in earlier versions
            llm["embedding_hash"] = llm.pop("words_hash")
        check_contents(contents)
        check_position(contents)
    except UserError:
        raise
    except Exception as problem:  # zipfile, torch and the checks can raise anything for a truncated or foreign file
        raise UserError(
            f"{path} is damaged or not a checkpoint ({first_line(problem)}): train again, or name another --checkpoint"
        ) from problem
    return Checkpoint(path, sha256, contents)
