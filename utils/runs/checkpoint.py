"""Save and load the trained layers. The frozen LLM is never in a checkpoint."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from utils.cli.options import (
    NEEDED,
    RESUME_MAY_CHANGE,
    SAID,
    defaults,
    flags_tagged,
    get_parser,
    needed_by,
)
from utils.errors import UserError
from utils.llm.loading import LoadedLLM, llm_of
from utils.runs.files import write_whole

FORMAT = 1


class Scaler(Protocol):
    """The mean and the deviation that each channel was scaled by, (channels,) each."""

    mean_: np.ndarray
    scale_: np.ndarray


class Explainer(Protocol):
    """What covariates explain."""

    def as_dict(self) -> dict:
        """Return plain values."""


class ScaledSeries(Protocol):
    """Data with channels and the scaler they were scaled by."""

    channels: tuple[str, ...]
    scaler: Scaler
    is_long: bool
    explainer: Explainer | None


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint says of its training data: the channels, and the scaler's mean and deviation of each.

    `is_long` says whether they are the series of a long CSV, `explainer` what covariates explain of them, in plain
    values; None if there are none.
    """

    channels: list[str]
    mean: list[float]
    deviation: list[float]
    is_long: bool = False
    explainer: dict | None = None


def facts_of(series: ScaledSeries) -> DataFacts:
    """Return what a checkpoint keeps of a series."""
    scaler = series.scaler
    explainer = series.explainer.as_dict() if series.explainer else None
    return DataFacts(list(series.channels), scaler.mean_.tolist(), scaler.scale_.tolist(), series.is_long, explainer)


@dataclass(frozen=True)
class Run:
    """A training run: its folder, which exists, all its flags, and what its data are."""

    folder: Path
    flags: dict
    data: DataFacts


def save_checkpoint(run: Run, model: nn.Module, progress: dict) -> None:
    """Write the best weights so far and what a later load must check, as `checkpoint`.

    Args:
        run: where to, and what of.
        model: unwrapped.
        progress: where in the run this is, plain numbers.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    _save(run.folder / "checkpoint", {**_contents(run, model), "progress": progress})


def save_last(run: Run, model: nn.Module, training: dict) -> None:
    """Write the state to resume from, as `last`: what `save_checkpoint` writes, and all of the trainer's own state."""
    _save(run.folder / "last", {**_contents(run, model), "training": training})


def _contents(run: Run, model: nn.Module) -> dict:
    llm = llm_of(model)
    return {
        "format": FORMAT,
        "weights": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "llm": llm.as_dict() if llm else None,
        "llm_probe": llm.probe if llm else None,
        "flags": run.flags,
        **asdict(run.data),
    }


def _save(path: Path, contents: dict) -> None:
    write_whole(path, lambda file: torch.save(contents, file))


def load_checkpoint(path: Path, model: nn.Module, flags: dict, data: DataFacts | None) -> dict:
    """Load the trained tensors into `model` and return everything the checkpoint says.

    Args:
        path: the file.
        model: unwrapped.
        flags: that it is to be run with; a difference that changes forecasts is printed.
        data: that it is to be tested on, None for none. Other data than the run's own is printed, unless
            --checkpoint asked for it.

    Raises:
        UserError: if the file is no checkpoint of ours, or of another model or another LLM.
    """
    contents = read_checkpoint(path, {"progress"})
    _compare_flags(path, contents["flags"], flags)
    if data and not flags["checkpoint"]:
        # Fewer series are no other data.
        compared = _of_series(contents, data.channels) if data.is_long and contents.get("is_long") else contents
        for name in differing(compared, data):
            PartialState().print(f"Note: {path} was trained on other data: the {name} of its training rows differ")
    _load_weights(path, contents, model)
    return contents


def check_channels(contents: dict, channels: Sequence[str], is_long: bool, csv: Path) -> None:
    """Refuse data of other channels than a checkpoint was trained on; of a long CSV, it forecasts any series.

    Raises:
        UserError: if they differ.
    """
    if is_long != contents.get("is_long", False):
        trained, here = ("long", "wide") if contents.get("is_long") else ("wide", "long")
        raise UserError(f"{csv} is a {here} CSV, the checkpoint was trained on a {trained} one: give it such a CSV")
    if is_long:
        if unseen := len(set(channels) - set(contents["channels"])):
            PartialState().print(f"Note: {unseen} of {len(channels)} series of {csv} were not there in training")
    elif list(channels) != contents["channels"]:
        raise UserError(
            f"{csv} has the channels {list(channels)}, the checkpoint was trained on {contents['channels']}"
        )


def load_last(run: Run, model: nn.Module) -> dict:
    """Load the tensors of the state to resume from into `model`, unwrapped; return its `training`.

    Raises:
        UserError: if the file is none of ours, or a flag, the LLM or the data is not what it was.
    """
    path = run.folder / "last"
    contents = read_checkpoint(path, {"training"})
    for name, now in run.flags.items():
        before = contents["flags"].get(name, defaults().get(name))
        if name not in flags_tagged(RESUME_MAY_CHANGE) and before != now:
            raise UserError(f"{path} is of a run with --{name} {before}, not {now}: resume with the flags of the run")
    for name in differing(contents, run.data):
        raise UserError(f"{path} is of a run on other data (their {name} differ): leave out --resume to train anew")
    _load_weights(path, contents, model)
    return contents["training"]


def resumed_batches(path: Path) -> tuple[int, int]:
    """Return the --batch_size and --grad_accum of the run whose state this is.

    Raises:
        UserError: as in `load_last`.
    """
    flags = read_checkpoint(path, {"training"})["flags"]
    return flags["batch_size"], flags["grad_accum"]


def flags_to_test(folder: Path, contents: dict, changes: dict[str, object]) -> argparse.Namespace:
    """Return the flags to test or forecast with a run's checkpoint: its own, but for these changes.

    Args:
        folder: the run folder.
        contents: of its checkpoint.
        changes: such as places of files that were moved.
    """
    # A run of an earlier version lacks the flags that came later: their defaults are what it did.
    args = get_parser().parse_args(["--data", contents["flags"]["data"]])
    of_a_test = {"is_training": 0, "resume": "", "demo": False, "checkpoint": str(folder)}
    vars(args).update({**contents["flags"], **of_a_test, **changes})
    return args


def differing(contents: dict, data: DataFacts) -> list[str]:
    """Return what of the data is not as it was."""
    # A checkpoint of an earlier version is of a wide CSV without covariates.
    saved = {"is_long": False, "explainer": None, **contents}
    return [name for name, now in asdict(data).items() if not _same(saved[name], now)]


def _of_series(contents: dict, names: Sequence[str]) -> dict:
    """Return a checkpoint's contents with what it says of these series alone, as far as it knows them."""
    number_of = {name: number for number, name in enumerate(contents["channels"])}
    numbers = [number_of[name] for name in names if name in number_of]

    def chosen(facts: dict, *lists: str) -> dict:
        return {**facts, **{name: [facts[name][number] for number in numbers] for name in lists}}

    explainer = contents.get("explainer")
    if explainer:
        explainer = chosen(explainer, "channels", "coefficients", "shares")
    return {**chosen(contents, "channels", "mean", "deviation"), "explainer": explainer}


def _same(before: object, now: object, abs_tol: float = 0.0) -> bool:
    """Compare names, or numbers but for the rounding of another machine, wherever they stand."""
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9, abs_tol=abs_tol)
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(
            _same(before[name], now[name], 1e-9)  # coefficients near 0 are rounding alone
            for name in before
        )
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(
            _same(one, other, abs_tol) for one, other in zip(before, now, strict=True)
        )
    return before == now


def read_checkpoint(path: Path, extra: set[str]) -> dict:
    """Return all that a file of ours holds.

    Args:
        path: the file.
        extra: what it must hold beside what all have.

    Raises:
        UserError: if it is damaged or none of ours.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a file that is cut off or of another kind can make torch raise anything
        raise UserError(f"{path} is damaged or no checkpoint: train again, or name another --checkpoint") from problem
    expected = {"format", "weights", "llm", "flags", "channels", "mean", "deviation"} | extra
    if not isinstance(contents, dict) or contents.get("format") != FORMAT or not expected <= contents.keys():
        raise UserError(f"{path} is not a checkpoint of this program: name another --checkpoint")
    return contents


def _load_weights(path: Path, contents: dict, model: nn.Module) -> None:
    llm = llm_of(model)
    _check_llm(path, contents["llm"] or {}, llm.as_dict() if llm else {})
    if llm:
        _check_probe(path, contents, llm)
    present = model.state_dict()
    if "mapping_layer.basis" in contents["weights"].keys() - present.keys():  # the other way it is converted
        raise UserError(f"{path} was trained with --mapping compact, not full: give it that")
    try:
        model.load_state_dict(contents["weights"])
    except RuntimeError as problem:
        first = str(problem).splitlines()[1].strip().rstrip(".")
        raise UserError(f"{path} does not fit ({first}): give it the flags of its run") from problem
    if any(tensor.shape != present[name].shape for name, tensor in contents["weights"].items()):
        PartialState().print("The full map of the checkpoint was converted to the compact one (exactly)")


def _compare_flags(path: Path, saved: dict, present: dict) -> None:
    for name in sorted(flags_tagged(NEEDED) | flags_tagged(needed_by(present["model"]))):
        before = saved.get(name, defaults().get(name))
        if before != present[name]:
            raise UserError(f"{path} was trained with --{name} {before}, not {present[name]}: give it that")
    for name in sorted(flags_tagged(SAID)):
        if saved[name] != present[name]:
            PartialState().print(f"Note: {path} was trained with --{name} {saved[name]}, not {present[name]}")


def _check_probe(path: Path, contents: dict, llm: LoadedLLM) -> None:
    """Refuse an LLM of the same shape and words whose layers do something else.

    Weights that are rounded alike give the same probe but for float32's rounding, and in 4 bits for a weight between
    two of the 16 steps. Where bfloat16 has rounded one side alone, the LLMs tried (tiny ones, SmolLM2-135M) differed by
    up to 1%, in 4 bits, where many a weight falls into another step then, by up to 8%. Noise of 1% and 5% of the
    weights' deviation made 4% and 17%, matrices drawn anew more than 100%.
    """
    saved = contents.get("llm_probe")
    if saved is None or llm.probe is None:  # of an earlier version; or the LLM is not run
        return
    same_dtype = contents["llm"]["dtype"] == llm.dtype
    in_4bit = llm.identity.quantization == "nf4"
    tolerance = (0.03 if in_4bit else 1e-3) if same_dtype else (0.2 if in_4bit else 0.02)
    difference = ((llm.probe - saved).norm() / saved.norm()).item()
    if not difference <= tolerance:  # NaN, too
        raise UserError(
            f"{path} was trained with another LLM (its hidden states differ by {difference:.1%}): give it the LLM of"
            " its run"
        )


def saved_basis(path: Path, flags: dict) -> torch.Tensor | None:
    """Return the basis of the compact map in a file of ours, None if it holds none or the flags have no such map.

    Raises:
        UserError: as in `read_checkpoint`.
    """
    if flags["model"] != "TimeLLM" or flags["mapping"] != "compact":
        return None
    return read_checkpoint(path, set())["weights"].get("mapping_layer.basis")


def _check_llm(path: Path, saved: dict, present: dict) -> None:
    places = ("source", "dtype")  # a folder may be moved, and another precision is the user's to try
    for name in sorted(saved.keys() | present.keys()):
        before, now = saved.get(name), present.get(name)
        if name not in places and before != now:
            raise UserError(
                f"{path} was trained with another LLM ({name} {before}, here {now}): give it the LLM flags of its run"
            )
