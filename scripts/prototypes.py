"""Show the text prototypes that a trained run attends to: their tokens, and each patch's attention to them.

    python scripts/prototypes.py checkpoints/RUN
    python scripts/prototypes.py checkpoints/RUN --channel HUFL --row 5000 --prototypes 20

Prints the prototypes with the most attention from the patches of one window, each with its highest-weighted tokens, and
draws the attention of every patch to them as prototypes.png in the run folder.

Except for its bias, a prototype is a sum of token embeddings with weights W. Many W give the same prototype; this
script uses the W with the smallest norm, for both kinds of --mapping. The number before a token is its weight times the
norm of its embedding: how strongly it pulls the prototype toward (+) or pushes it away from (-) the token. After only a
few training steps, the weights are close to their random initialization, and the tokens look random.
"""

import sys
from argparse import SUPPRESS, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data_provider.facts import DataFacts
from data_provider.horizon import scaled_rows
from data_provider.reading import read_table
from utils.cli.checks import check_options, check_paths
from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.places import csv_path
from utils.cli.signals import leave
from utils.errors import UserError
from utils.runs.checkpoint import read_checkpoint
from utils.runs.compatibility import flags_to_test
from utils.runs.pictures import Figure, save_picture
from utils.runs.trained import build_trained
from utils.system.plotting import check_backend

# Flags that name files, which may have moved since the run.
PATH_FLAGS = ("root_path", "data_path", "prompt_file", "llm_model_path")


class Window(NamedTuple):
    """A context of one channel: a title, its values in the CSV's units, and its values scaled as in training."""

    title: str
    values: np.ndarray
    scaled: np.ndarray


class Prototype(NamedTuple):
    """A text prototype: its number, each patch's attention (mean over heads), its top tokens with their pulls."""

    number: int
    attention: np.ndarray
    tokens: Sequence[tuple[float, str]]


def choose_window(args: Namespace, facts: DataFacts, channel: str | None, row: int | None) -> Window:
    """Read a window from the run's CSV and scale it as in training.

    Args:
        channel: its name; None for the run's target if it is a channel, else the last channel.
        row: the last data row of the window, counted from 1; None for the last row of the CSV.

    Raises:
        UserError: if the channel or the row does not exist.
    """
    table, path, trained_on = read_table(args), csv_path(args), facts.channels
    channel = channel or (args.target if args.target in trained_on else trained_on[-1])
    shared = [name for name in trained_on if name in table.channels]
    if channel not in shared:
        raise UserError(f"{path} and the run have no channel {channel!r} in common: --channel takes one of {shared}")
    number, length = table.channels.index(channel), args.seq_len
    series, dates = table.filled[table.rows_of(number)], table.dates_of(number)
    if (rows := len(series)) < length:
        raise UserError(f"{path} has {rows} rows: a window of the run needs {length}")
    end = rows if row is None else row
    if not length <= end <= rows:
        raise UserError(f"--row {row} must be {length} to {rows}: a window of {length} rows ends with it")
    scales = facts.scale_of(table.channels, table.filled[table.spans.last(length)[0]].T)
    scaled = scaled_rows(table, *scales, facts.explainer)[table.rows_of(number)][end - length : end]
    title = f"{channel}, {dates[end - length]} to {dates[end - 1]}"
    return Window(title, series[end - length : end], scaled.astype(np.float32))


@torch.inference_mode()
def strongest_prototypes(model: nn.Module, window: Window, prototypes: int, tokens: int) -> list[Prototype]:
    """Find the `prototypes` with the most attention, averaged over heads and patches, and the top `tokens` of each.

    Raises:
        UserError: if the model has fewer prototypes or tokens.
    """
    mapping, embeddings = model.mapping_layer, model.llm_info.backbone.get_input_embeddings().weight
    for flag, count, limit in (("prototypes", prototypes, len(mapping.bias)), ("tokens", tokens, len(embeddings))):
        if not 1 <= count <= limit:
            raise UserError(f"--{flag} {count} must be 1 to {limit}")
    scaled, _ = model.normalize(torch.from_numpy(window.scaled)[None].to(model.device))
    attention = model.reprogramming_layer.attention(model.patch_embedding(scaled), mapping())
    attention = attention[0].mean(0).T.cpu()  # (1000, patches)
    numbers = attention.mean(1).topk(prototypes).indices.tolist()
    pulls = mapping.token_weights(numbers) * torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float32)
    strongest = []
    for number, pull in zip(numbers, pulls, strict=True):
        top = pull.abs().topk(tokens).indices.tolist()
        quoted = [(pull[token].item(), quote_token(model.llm_info.tokenizer, token)) for token in top]
        strongest.append(Prototype(number, attention[number].numpy(), quoted))
    return strongest


def quote_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Quote a token's text; a token without text, or with only part of a character, gives its id as <id>."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if piece.startswith("▁"):  # SentencePiece's space, which decoding drops at the start of a text
        text = piece.replace("▁", " ")
    return repr(text) if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{token}>"


def describe(window: Window, prototypes: Sequence[Prototype], count: int) -> str:
    """Format the strongest of `count` prototypes for printing."""
    lines = [
        f"Window: {window.title}, {len(window.values)} rows, {len(prototypes[0].attention)} patches",
        f"Prototype, share of the attention (uniform: {1 / count:.2%}), highest-weighted tokens:",
    ]
    for number, attention, tokens in prototypes:
        quoted = "  ".join(f"{pull:+.3g} {text}" for pull, text in tokens)
        lines.append(f"{number:>5}  {attention.mean():>7.2%}  {quoted}")
    return "\n".join(lines)


def draw(path: Path, window: Window, prototypes: Sequence[Prototype], patch_len: int, stride: int) -> None:
    """Draw a window with its patches and, below, the patches' attention to the prototypes, as a PNG."""
    patches, rows, length = len(prototypes[0].attention), len(prototypes), len(window.values)
    figure = Figure(figsize=(11, 4.2 + 0.28 * rows), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 0.8 + 0.28 * rows])
    top.set_title(_in_font(window.title), fontsize="medium", parse_math=False)
    top.plot(np.arange(length), window.values, color="0.3", label="window")
    padding = np.arange(length - 1, length + stride)
    top.plot(padding, [window.values[-1]] * len(padding), ":", color="0.3", label="its last value, repeated")
    starts, overlapping = np.arange(patches) * stride, -(-patch_len // stride)
    heights = 0.04 + 0.16 * (np.arange(patches) % overlapping) / overlapping  # shares of the axis
    relative = top.get_xaxis_transform()
    top.hlines(heights, starts, starts + patch_len - 1, "tab:blue", label="patches", transform=relative)
    low, span = window.values.min(), np.ptp(window.values) or 1
    top.set_ylim(low - 0.4 * span, low + 1.35 * span)
    top.legend(loc="upper left", ncols=3, fontsize="small")
    edges = np.arange(patches + 1) * stride + (patch_len - 1 - stride) / 2
    attention, labels = [one.attention for one in prototypes], [_label(one) for one in prototypes]
    mesh = bottom.pcolormesh(edges, np.arange(rows + 1) - 0.5, attention, vmin=0)
    bottom.set_yticks(range(rows), labels, fontsize="small", parse_math=False)
    bottom.invert_yaxis()
    top.margins(x=0)  # for both axes
    bottom.set_xlabel("step of the window (a patch's attention is drawn at the patch's center)")
    figure.colorbar(mesh, ax=bottom, location="bottom", aspect=60, label="attention, mean over heads")
    save_picture(figure, path)


def _label(prototype: Prototype) -> str:
    """Shorten the top three tokens to a label."""
    tokens = ((pull, _in_font(text)) for pull, text in prototype.tokens[:3])
    shortened = ("-+"[pull > 0] + (text if len(text) <= 18 else text[:17] + "…") for pull, text in tokens)
    return f"{' '.join(shortened)}  {prototype.number}"


def _in_font(text: str) -> str:
    """Escape characters that matplotlib's default font may lack."""
    return text.encode("latin-1", "backslashreplace").decode("latin-1")


def show_prototypes(argv: Sequence[str] | None) -> None:
    """Print the strongest prototypes of a run and save a picture of their attention in the run folder."""
    parser = OneLineParser(allow_abbrev=False, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--prototypes", type=int, default=10, help="number of prototypes to show (default: 10)")
    parser.add_argument("--tokens", type=int, default=8, help="number of tokens to print per prototype (default: 8)")
    parser.add_argument("--channel", help="channel of the window; default: the run's target or its last channel")
    parser.add_argument("--row", type=int, help="last data row of the window, counted from 1; default: the last row")
    for name in PATH_FLAGS:
        parser.add_argument(f"--{name}", default=SUPPRESS, help="flag of run_main.py, for files moved since the run")
    options = parser.parse_args(argv)
    check_backend()
    checkpoint = options.folder / "checkpoint"
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint in {options.folder}: name the folder of a trained run")
    saved = read_checkpoint(checkpoint)
    if saved.contents["llm"] is None:
        raise UserError(f"{options.folder} is a run without an LLM and has no text prototypes: name a run of TimeLLM")
    args = flags_to_test(saved, {name: value for name, value in vars(options).items() if name in PATH_FLAGS})
    check_options(args)
    check_paths(args)
    # Check the options before the LLM is loaded.
    window = choose_window(args, saved.data, options.channel, options.row)
    model = build_trained(saved, args).eval()
    prototypes = strongest_prototypes(model, window, options.prototypes, options.tokens)
    print(describe(window, prototypes, len(model.mapping_layer.bias)))
    picture = options.folder / "prototypes.png"
    draw(picture, window, prototypes, args.patch_len, args.stride)
    print(f"Picture: {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 2 invalid input (one line), 130 interrupted."""
    return exit_code_of(lambda: show_prototypes(argv), "nothing was written")


if __name__ == "__main__":
    leave(main)
