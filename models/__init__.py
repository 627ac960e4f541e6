"""The forecasters: a file each, by the name that ``--model`` takes, with a class `Model(configs)`."""

import argparse
from importlib import import_module

import torch
from torch import nn

from data_provider.tables import Table
from utils.cli.options import has_llm
from utils.llm.loading import LLMFlags, choose_llm
from utils.memory.trial_step import llm_without_weights


def build_model(args: argparse.Namespace, basis: torch.Tensor | None = None, table: Table | None = None) -> nn.Module:
    """Return the model that ``--model`` names; (B, seq_len, N) -> (B, pred_len, N).

    Args:
        args: the parsed flags.
        basis: of TimeLLM's compact map, if it is known, from a checkpoint.
        table: the run's CSV, which tells how long a season is; None reads it where that must be known.
    """
    module = import_module(f"models.{args.model}")
    if has_llm(args):
        return module.Model(args, module.load_parts(args, basis))
    if args.model == "SeasonalNaive" and table is not None:
        return module.Model(args, season=season_of(args, table))
    return module.Model(args)


def build_around(args: argparse.Namespace, llm: object) -> nn.Module:
    """Return TimeLLM as the flags describe it, built around a `LoadedLLM` or a stand-in for one."""
    return import_module("models.TimeLLM").build_around(args, llm)


def weight_shapes(args: argparse.Namespace) -> dict[str, torch.Size]:
    """Return the shapes of the weights of the model that the flags describe; no memory is taken for them."""
    with torch.device("meta") as meta:
        if has_llm(args):
            model = build_around(args, llm_without_weights(choose_llm(LLMFlags.of(args)), 1, torch.float32))
        elif args.model == "SeasonalNaive":  # its season is no weight
            return {}
        else:
            model = import_module(f"models.{args.model}").Model(args, device=meta)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def season_of(args: argparse.Namespace, table: Table) -> int:
    """Return the rows of a season: as the flag says, or as the dates of the CSV do."""
    return args.season or table.rows_of_a_season()


def build_seasonal_naive(args: argparse.Namespace, table: Table) -> nn.Module | None:
    """Return the seasonal-naive forecaster for a CSV, None if a window does not hold a season."""
    season = season_of(args, table)
    return import_module("models.SeasonalNaive").Model(args, season=season) if season <= args.seq_len else None
