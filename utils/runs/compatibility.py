"""Whether a checkpoint may be used here: with these flags, this LLM and these data."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from data_provider.facts import DataFacts
from models.forecaster import Forecaster
from utils.cli.options import (
    DEFAULTS,
    MUST_MATCH_CHECKPOINT,
    RESUME_MAY_CHANGE,
    WARN_IF_CHANGED,
    check_types,
    flags_tagged,
    get_parser,
    has_llm,
    must_match_for,
)
from utils.errors import UserError
from utils.llm.identity import LLMTraces, check_same_llm
from utils.runs.checkpoint import Checkpoint, Run, read_checkpoint


def check_flags(saved: Checkpoint, flags: Mapping[str, object]) -> None:
    """Refuse flags with which a checkpoint cannot be used.

    Raises:
        UserError: names the first one.
    """
    needed = flags_tagged(MUST_MATCH_CHECKPOINT) | flags_tagged(must_match_for(flags["model"]))
    for name, before in _changed_flags(saved, flags, needed):
        raise UserError(f"{saved.path} was trained with --{name} {before}, not {flags[name]}: give it that")


def _changed_flags(
    saved: Checkpoint, flags: Mapping[str, object], names: frozenset[str]
) -> Iterator[tuple[str, object]]:
    """Yield those of these flags that were different in training, with their values then."""
    for name in sorted(names):
        before = saved.flags.get(name, DEFAULTS.get(name))
        if before != flags[name]:
            yield name, before


def load_checkpoint(saved: Checkpoint, model: Forecaster, flags: dict, data: DataFacts | None) -> None:
    """Load the trained tensors into `model`.

    Args:
        saved: the checkpoint.
        model: unwrapped.
        flags: that it is to be run with; a difference that changes forecasts is printed.
        data: that it is to be tested on, None for none. Other data than the run's own is printed, unless
            --checkpoint asked for it.

    Raises:
        UserError: if it is of another model or another LLM.
    """
    check_flags(saved, flags)
    for name, before in _changed_flags(saved, flags, flags_tagged(WARN_IF_CHANGED)):
        PartialState().print(f"Note: {saved.path} was trained with --{name} {before}, not {flags[name]}")
    if _description_changed(saved, model):
        PartialState().print(f"Note: {saved.path} was trained with another description of the data in its prompts")
    if data and not flags["checkpoint"]:
        # Fewer series are no other data.
        before = saved.data.of_series(data.channels) if data.is_long and saved.data.is_long else saved.data
        if names := before.changed_fields(data):
            PartialState().print(f"Note: {saved.path} was trained on other data: the {_listed(names)} differ")
    _load_weights(saved, model)


def load_last(last: Checkpoint, run: Run, model: Forecaster) -> dict:
    """Load the tensors of the state to resume from into `model`, unwrapped; return its `training`.

    Raises:
        UserError: if a flag, the LLM or the data is not what it was, or the best weights so far are not there.
    """
    for name, now in run.flags.items():
        before = last.flags.get(name, DEFAULTS.get(name))
        if name not in flags_tagged(RESUME_MAY_CHANGE) and before != now:
            raise UserError(
                f"{last.path} is of a run with --{name} {before}, not {now}: resume with the flags of the run"
            )
    if _description_changed(last, model):
        raise UserError(
            f"{last.path} is of a run with another description of the data in its prompts: resume with that, or leave"
            " out --resume to train anew"
        )
    if names := last.data.changed_fields(run.data):
        raise UserError(
            f"{last.path} is of a run on other data (the {_listed(names)} differ): leave out --resume to train anew"
        )
    _load_weights(last, model)
    _check_best(last, run.folder / "checkpoint")
    return last.contents["training"]


def _check_best(last: Checkpoint, best: Path) -> None:
    """Refuse to resume a run whose best weights are lost: at its end it could not be tested."""
    if math.isinf(last.contents["training"]["stopping"]["lowest"]):
        return  # there was no validation yet
    if not best.is_file():
        raise UserError(f"{last.path} has no {best.name} beside it, the best weights so far: leave out --resume")
    read_checkpoint(best)


def check_channels(facts: DataFacts, channels: Sequence[str], is_long: bool, csv: Path) -> None:
    """Refuse data of other channels than a checkpoint was trained on; of a long CSV, it forecasts any series.

    Raises:
        UserError: if they differ.
    """
    if is_long != facts.is_long:
        trained, here = ("long", "wide") if facts.is_long else ("wide", "long")
        raise UserError(f"{csv} is a {here} CSV, the checkpoint was trained on a {trained} one: give it such a CSV")
    if is_long:
        if unseen := len(set(channels) - set(facts.channels)):
            PartialState().print(f"Note: {unseen} of {len(channels)} series of {csv} were not there in training")
    elif list(channels) != facts.channels:
        raise UserError(f"{csv} has the channels {list(channels)}, the checkpoint was trained on {facts.channels}")


def check_shapes(saved: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a checkpoint whose weights are not of the model that its flags describe, before memory is taken for that.

    The map to the prototypes is left to loading, which may convert it.

    Args:
        saved: the checkpoint.
        shapes: of the model's weights.

    Raises:
        UserError: names the first weight that does not fit.
    """
    weights = saved.contents["weights"]
    for name in sorted(shapes.keys() | weights.keys()):
        there = weights[name].shape if name in weights else None
        if not name.startswith("mapping_layer.") and there != shapes.get(name):
            raise UserError(
                f"{saved.path} does not fit ({name} is {_shape(there)}, by its flags {_shape(shapes.get(name))}): it"
                " is damaged, or give it the flags of its run"
            )


def _shape(shape: torch.Size | None) -> str:
    return "not there" if shape is None else str(tuple(shape))


def flags_to_test(saved: Checkpoint, changes: Mapping[str, object]) -> argparse.Namespace:
    """Return the flags to test or forecast with a run's checkpoint: its own, but for these changes.

    Args:
        saved: the checkpoint in the run folder.
        changes: such as places of files that were moved.

    Raises:
        UserError: if a change is no flag or no value of it.
    """
    if unknown := sorted(changes.keys() - DEFAULTS.keys()):
        raise UserError(f"{', '.join(unknown)} is no flag of run_main.py: load_run takes those of the run")
    try:
        check_types(changes)
    except ValueError as problem:
        raise UserError(str(problem)) from problem
    # A run of an earlier version lacks the flags that came later: their defaults are what it did.
    args = get_parser().parse_args(["--data", saved.flags["data"]])
    of_a_test = {"is_training": 0, "resume": "", "demo": False, "checkpoint": str(saved.path.parent)}
    vars(args).update({**saved.flags, **of_a_test, **changes})
    if has_llm(args) and not {"llm_model", "llm_model_path"} & changes.keys():
        _keep_local_llm(saved, args)
    return args


def _keep_local_llm(saved: Checkpoint, args: argparse.Namespace) -> None:
    """Name the folder that a run's LLM was in: from elsewhere, its name alone would be looked for on the Hub."""
    llm = saved.contents["llm"] or {}
    folder = llm.get("folder")
    if folder is None:  # it came from the Hub; or of an earlier version
        return
    is_beside = (Path(llm["source"]) / "config.json").is_file()
    args.llm_model_path = llm["source"] if is_beside else folder
    if args.llm_layers is None and args.ablation != "no_llm":
        args.llm_layers = llm["layers"]  # by name, fewer may be the default


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _description_changed(saved: Checkpoint, model: Forecaster) -> bool:
    before, now = saved.contents["description"], model.description
    return before is not None and now is not None and before != now


def _load_weights(saved: Checkpoint, model: Forecaster) -> None:
    path, contents, llm = saved.path, saved.contents, model.llm_info
    if bool(llm) != bool(contents["llm"]):
        raise UserError(f"{path} was trained {'without' if llm else 'with'} an LLM: give it the --model of its run")
    if llm:
        embeddings = contents["llm_embeddings"] if contents["llm_embeddings"] is not None else torch.empty(0)
        traces = LLMTraces(contents["llm_config"] or {}, embeddings, contents["llm_probe"])
        check_same_llm(path, contents["llm"], traces, llm.as_dict(), llm.traces)
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
