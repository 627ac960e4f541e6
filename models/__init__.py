"""The forecasters: a file each, by the name that ``--model`` takes, with a class `Model(configs)`."""

import argparse
from importlib import import_module

import torch
from torch import nn

from data_provider.series import load_series


def build_model(args: argparse.Namespace, basis: torch.Tensor | None = None) -> nn.Module:
    """Return the model that ``--model`` names; (B, seq_len, N) -> (B, pred_len, N).

    Args:
        args: the parsed flags.
        basis: of TimeLLM's compact map, if it is known, from a checkpoint.
    """
    module = import_module(f"models.{args.model}")
    if basis is None:
        return module.Model(args)
    return module.Model(args, module.load_parts(args, basis))


def build_around(args: argparse.Namespace, llm: object) -> nn.Module:
    """Return TimeLLM as the flags describe it, built around a `LoadedLLM` or a stand-in for one."""
    return import_module("models.TimeLLM").build_around(args, llm)


def build_seasonal_naive(args: argparse.Namespace) -> nn.Module | None:
    """Return the seasonal-naive forecaster for these flags, None if a window does not hold a season."""
    naive = import_module("models.SeasonalNaive")
    return naive.Model(args) if naive.season_of(args) <= args.seq_len else None


def seasonal_errors(args: argparse.Namespace) -> dict[str, float]:
    """Return the seasonal-naive forecast's mean absolute error on the scaled training rows, by channel."""
    return load_series(args).seasonal_errors(import_module("models.SeasonalNaive").season_of(args))
