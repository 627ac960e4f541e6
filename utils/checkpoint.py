"""Save and load the trained layers. The frozen LLM is never in a checkpoint."""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from data_provider.series import Series
from utils.errors import UserError
from utils.llm import llm_of

FORMAT = 1


def save_checkpoint(path: Path, model: nn.Module, args: argparse.Namespace, series: Series, progress: dict) -> None:
    """Write the trained tensors and what a later load must check.

    Args:
        path: the file; it is replaced at once, never half-written.
        model: unwrapped.
        args: the run's flags.
        series: the run's data, for its channels and scaler.
        progress: where in the run this is, plain numbers.
    """
    llm = llm_of(model)
    contents = {
        "format": FORMAT,
        "weights": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "llm": llm.as_dict() if llm else None,
        "flags": vars(args),
        "channels": list(series.channels),
        "mean": series.scaler.mean_.tolist(),
        "deviation": series.scaler.scale_.tolist(),
        "progress": progress,
    }
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(contents, unfinished)
    unfinished.replace(path)


# Flags that shape what the trained layers see: with others the weights mean nothing, or something else.
_MUST_AGREE = ("seq_len", "pred_len", "patch_len", "stride")
_SHOULD_AGREE = ("prompt_padding", "prompt_decimals")


def load_checkpoint(path: Path, model: nn.Module, args: argparse.Namespace) -> dict:
    """Load the trained tensors into `model` and return everything the checkpoint says.

    Args:
        path: the file.
        model: unwrapped.
        args: the flags it is to be run with; a difference that changes forecasts is printed.

    Raises:
        UserError: if the file is no checkpoint of ours, or of another model or another LLM.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a file that is cut off or of another kind can make torch raise anything
        raise UserError(f"{path} is damaged or no checkpoint: train again, or name another --checkpoint") from problem
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: name another --checkpoint")
    _compare_flags(path, contents["flags"], vars(args))
    llm = llm_of(model)
    _check_llm(path, contents["llm"] or {}, llm.as_dict() if llm else {})
    try:
        model.load_state_dict(contents["weights"])
    except RuntimeError as problem:
        first = str(problem).splitlines()[1].strip().rstrip(".")
        raise UserError(f"{path} does not fit ({first}): give it the flags of its run") from problem
    present = model.state_dict()
    if any(tensor.shape != present[name].shape for name, tensor in contents["weights"].items()):
        PartialState().print("The full map of the checkpoint was converted to the compact one (exactly)")
    return contents


def _compare_flags(path: Path, saved: dict, present: dict) -> None:
    for name in _MUST_AGREE:
        if saved[name] != present[name]:
            raise UserError(f"{path} was trained with --{name} {saved[name]}, not {present[name]}: give it that")
    for name in _SHOULD_AGREE:
        if saved[name] != present[name]:
            PartialState().print(f"Note: {path} was trained with --{name} {saved[name]}, not {present[name]}")


def _check_llm(path: Path, saved: dict, present: dict) -> None:
    places = ("source", "dtype")  # a folder may be moved, and another precision is the user's to try
    for name in sorted(saved.keys() | present.keys()):
        before, now = saved.get(name), present.get(name)
        if name not in places and before != now:
            raise UserError(
                f"{path} was trained with another LLM ({name} {before}, here {now}): give it the LLM flags of its run"
            )
