"""The forecasters: a file each, by the name that ``--model`` takes, with a class `Model(configs)`."""

import argparse
from importlib import import_module

import torch
from torch import nn


def build_model(args: argparse.Namespace, basis: torch.Tensor | None = None) -> nn.Module:
    """Return the model that ``--model`` names; (B, seq_len, N) -> (B, pred_len, N).

    Args:
        args: the parsed flags.
        basis: of TimeLLM's compact map, if it is known, from a checkpoint.
    """
    more = {} if basis is None else {"basis": basis}
    return import_module(f"models.{args.model}").Model(args, **more)
