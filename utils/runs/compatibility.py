"""Check whether a checkpoint can be used with the present flags, LLM and data, and load its weights."""

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import torch
from accelerate import PartialState

from data_provider.facts import DataFacts
from models.forecaster import Forecaster
from utils.cli import options
from utils.errors import UserError, listed
from utils.llm.identity import LLMTraces, check_same_llm
from utils.runs.checkpoint import Checkpoint, Run, read_checkpoint


def check_flags(saved: Checkpoint, flags: Mapping[str, object]) -> None:
    """Raise UserError for the first flag with which a checkpoint cannot be used."""
    tags = options.MUST_MATCH_CHECKPOINT, options.must_match_for(flags["model"])
    needed = sorted(set().union(*map(options.flags_tagged, tags)))
    for name, before in _changed_flags(saved, flags, needed):
        raise UserError(
            f"{saved.path} was trained with --{name} {before}, not {flags[name]}: give it the value of its run"
        )


def _changed_flags(saved: Checkpoint, flags: Mapping[str, object], names: Iterable[str]) -> list[tuple[str, object]]:
    """List the name and the saved value of each of these flags that has changed."""
    # A flag that is younger than a file had the effect of its default.
    before, now = ({name: own.get(name, options.DEFAULTS.get(name)) for name in names} for own in (saved.flags, flags))
    return [(name, value) for name, value in before.items() if value != now[name]]


def load_checkpoint(saved: Checkpoint, model: Forecaster, flags: dict, data: DataFacts | None) -> None:
    """Load the trained weights into a model.

    Args:
        model: the unwrapped model.
        flags: the present flags; a note is printed for each difference that changes forecasts.
        data: the facts about the test data, if there are any. If they differ from the run's, a note is printed, unless
            --checkpoint named the checkpoint.

    Raises:
        UserError: if the checkpoint belongs to another model or another LLM.
    """
    check_flags(saved, flags)
    for name, before in _changed_flags(saved, flags, sorted(options.flags_tagged(options.WARN_IF_CHANGED))):
        PartialState().print(f"Note: {saved.path} was trained with --{name} {before}, not {flags[name]}")
    if _description_changed(saved, model):
        PartialState().print(f"Note: {saved.path} was trained with another description of the data in its prompts")
    if data and not flags["checkpoint"] and (names := saved.data.changed_fields(data, may_be_subset=True)):
        PartialState().print(f"Note: {saved.path} was trained on other data: the {' and '.join(names)} differ")
    _load_weights(saved, model)


def load_last(last: Checkpoint, run: Run, model: Forecaster) -> dict:
    """Load the weights of a state to resume from into an unwrapped model, and return the trainer's state.

    Raises:
        UserError: if a flag, the LLM or the data has changed, or the best weights so far are missing.
    """
    fixed_flags = [name for name in run.flags if name not in options.flags_tagged(options.RESUME_MAY_CHANGE)]
    for name, before in _changed_flags(last, run.flags, fixed_flags):
        raise UserError(
            f"{last.path} is from a run with --{name} {before}, not {run.flags[name]}: resume with the flags of the run"
        )
    if _description_changed(last, model):
        raise UserError(
            f"{last.path} is from a run with another description of the data in its prompts: resume with that"
            " description, or leave out --resume to train anew"
        )
    if names := last.data.changed_fields(run.data):
        raise UserError(
            f"{last.path} is from a run on other data (the {' and '.join(names)} differ): leave out --resume to train"
            " anew"
        )
    _load_weights(last, model)
    if not math.isinf(last.contents["training"]["stopping"]["lowest"]):  # infinite before the first validation
        _check_best(last, run.folder / "checkpoint", fixed_flags)
    return last.contents["training"]


def _check_best(last: Checkpoint, best: Path, fixed_flags: Sequence[str]) -> None:
    """Refuse to resume a run without its best weights: it could not be tested at its end."""
    if not best.is_file():
        raise UserError(f"{last.path} has no {best.name} beside it, with the best weights so far: leave out --resume")
    for name, before in _changed_flags(read_checkpoint(best), last.flags, fixed_flags):
        raise UserError(f"{best} is from another run than {last.path} (--{name} {before}): leave out --resume")


def check_channels(facts: DataFacts, channels: Sequence[str], is_long: bool, csv: Path) -> None:
    """Raise UserError for data with other channels than a checkpoint was trained on; a long CSV may have new series."""
    if is_long != facts.is_long:
        trained, present = ("long", "wide") if facts.is_long else ("wide", "long")
        raise UserError(
            f"{csv} is a {present} CSV, but the checkpoint was trained on a {trained} CSV: give a {trained} CSV"
        )
    if not is_long and list(channels) != facts.channels:
        raise UserError(f"{csv} has the channels {list(channels)}, the checkpoint was trained on {facts.channels}")
    if unseen := len(set(channels) - set(facts.channels)):
        PartialState().print(f"Note: {unseen} of {len(channels)} series of {csv} were not in the training data")


def check_shapes(saved: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Raise UserError for the first weight that does not fit the model of the flags, before that model takes memory.

    The mapping layer is checked on loading, which may convert its weights.
    """
    found = {name: tuple(tensor.shape) for name, tensor in saved.contents["weights"].items()}
    for name in sorted(shapes.keys() | found.keys()):
        shape, needed = found.get(name, "missing"), tuple(shapes[name]) if name in shapes else "missing"
        if not name.startswith("mapping_layer.") and shape != needed:
            raise UserError(
                f"{saved.path} does not fit ({name} is {shape}, by its flags {needed}): it is damaged, or give it the"
                " flags of its run"
            )


def flags_to_test(saved: Checkpoint, changes: Mapping[str, object]) -> argparse.Namespace:
    """Build the flags to test or forecast with a checkpoint: its run's flags with changes, such as new paths.

    Raises:
        UserError: if a change does not name a flag, or gives a flag an invalid value.
    """
    if unknown := sorted(changes.keys() - options.DEFAULTS.keys()):
        raise UserError(f"run_main.py has no flag {listed(unknown)}: load_run takes the flags of the run")
    changes = {name: _plain(value) for name, value in changes.items()}
    try:
        options.check_types(changes)
    except ValueError as problem:
        raise UserError(str(problem)) from problem
    # Runs of earlier versions lack the newer flags, whose defaults reproduce the earlier behavior.
    args = options.get_parser().parse_args(["--data", saved.flags["data"]])
    test_flags = {"is_training": 0, "resume": "", "demo": False, "checkpoint": str(saved.path.parent)}
    vars(args).update({**saved.flags, **test_flags, **changes})
    if options.has_llm(args) and not {"llm_model", "llm_model_path"} & changes.keys():
        _keep_local_llm(saved, args)
    return args


def _plain(value: object) -> object:
    """Return a path as a string and an integer of NumPy as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _keep_local_llm(saved: Checkpoint, args: argparse.Namespace) -> None:
    """Set the flags to the local folder of a run's LLM, since its name alone would be looked up on the Hub."""
    llm = saved.contents["llm"] or {}
    if llm.get("folder") is None:  # from the Hub, or a checkpoint of an earlier version
        return
    args.llm_model_path = llm["source"] if (Path(llm["source"]) / "config.json").is_file() else llm["folder"]
    if args.llm_layers is None and args.ablation != "no_llm":
        args.llm_layers = llm["layers"]  # an LLM chosen by name may have a lower default


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
    if "mapping_layer.basis" in contents["weights"].keys() - present.keys():  # only full to compact can be converted
        raise UserError(f"{path} was trained with --mapping compact, not full: give it --mapping compact")
    for name, tensor in contents["weights"].items():
        if name in present and tensor.dtype != present[name].dtype:
            raise UserError(f"{path} is damaged ({name} is {tensor.dtype}, not {present[name].dtype}): train again")
    try:
        model.load_state_dict(contents["weights"])
    except RuntimeError as problem:
        first = str(problem).splitlines()[1].strip().rstrip(".")
        raise UserError(f"{path} does not fit ({first}): give it the flags of its run") from problem
    if any(tensor.shape != present[name].shape for name, tensor in contents["weights"].items()):
        PartialState().print("The full mapping layer of the checkpoint was converted to the compact one (exactly)")
