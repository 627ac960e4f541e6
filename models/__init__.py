"""The forecasters: each in the module that ``--model`` names, as the class `Model`."""

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from models.forecaster import Forecaster
from utils.cli.options import has_llm

if TYPE_CHECKING:
    from utils.llm.loading import LoadedLLM


def build(
    args: argparse.Namespace,
    llm: "LoadedLLM | None" = None,
    basis: torch.Tensor | None = None,
    season: int = 0,
    device: torch.device | None = None,
) -> Forecaster:
    """Build the forecaster that the flags describe.

    Args:
        args: the parsed flags.
        llm, basis: for TimeLLM, see there.
        season: for SeasonalNaive, the number of rows in a season of the data.
        device: for a forecaster without an LLM, None for the device of this process.

    Raises:
        UserError: if the flags do not fit the LLM, or the LLM is missing.
    """
    model = _class_of(args)
    if has_llm(args):
        return model(args, llm, basis)
    return model(args, device, **({"season": season} if args.model == "SeasonalNaive" else {}))


def _class_of(args: argparse.Namespace) -> type[Forecaster]:
    """Import the chosen forecaster: only those with an LLM, and PatchTST, need transformers, which takes a second."""
    return import_module(f"models.{args.model}").Model


def weight_shapes(args: argparse.Namespace) -> dict[str, torch.Size]:
    """Determine the shapes of the weights of the forecaster that the flags describe, without allocating them."""
    if args.model == "SeasonalNaive":  # it has no weights, and its season is unknown here
        return {}
    model = _class_of(args).without_weights(args)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
