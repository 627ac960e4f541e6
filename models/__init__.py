"""The forecasters: a file each, by the name that ``--model`` takes, with a class `Model(configs)`."""

import argparse
from importlib import import_module

from torch import nn


def build_model(args: argparse.Namespace) -> nn.Module:
    """Return the model that ``--model`` names; (B, seq_len, N) -> (B, pred_len, N)."""
    return import_module(f"models.{args.model}").Model(args)
