"""The forecasters: each in the module that ``--model`` names, as the class `Model`."""

import argparse
from importlib import import_module

import torch

from models.forecaster import Forecaster
from utils.cli.options import has_llm
from utils.llm.choice import LLMFlags, choose_llm
from utils.llm.loading import LoadedLLM
from utils.llm.meta import llm_without_weights


def build(
    args: argparse.Namespace,
    llm: LoadedLLM | None = None,
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
    model = import_module(f"models.{args.model}").Model
    if has_llm(args):
        return model(args, llm, basis)
    return model(args, device, **({"season": season} if args.model == "SeasonalNaive" else {}))


def weight_shapes(args: argparse.Namespace) -> dict[str, torch.Size]:
    """Determine the shapes of the weights of the forecaster that the flags describe, without allocating them."""
    if args.model == "SeasonalNaive":  # it has no weights, and its season is unknown here
        return {}
    with torch.device("meta") as meta:
        llm = llm_without_weights(choose_llm(LLMFlags.of(args)), 1, torch.float32) if has_llm(args) else None
        model = build(args, llm, device=meta)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
