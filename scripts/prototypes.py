"""Show what the text prototypes of a trained run are made of, and which patches of a window look at which.

    python scripts/prototypes.py checkpoints/RUN
    python scripts/prototypes.py checkpoints/RUN --channel HUFL --row 5000 --prototypes 20

Prints the prototypes that a window's patches attend to most, each with its highest-weighted tokens, and
draws the attention of every patch to them: prototypes.png in the run folder.

Apart from its bias, a prototype is a sum of token embeddings with weights W; of all W that make the same prototype the
least is taken, for both kinds of --mapping, since the rest of a full map's W cancels out and says nothing. The number
before a token is its weight times the length of its embedding: how far it pulls (+) or pushes (-) the prototype. A map
that was trained for a few steps still has almost the random weights it started with, and the tokens look like it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from utils.runs.pictures import save_picture
from utils.runs.trained import build_trained

# Files of a run that may have been moved since.
PLACES = ("root_path", "data_path", "prompt_file", "llm_model_path")


@dataclass(frozen=True)
class Window:
    """A window of one channel: its name with the dates, the values in the CSV's units and, float32, as trained on."""

    title: str
    values: np.ndarray
    scaled: np.ndarray


@dataclass(frozen=True)
class Prototype:
    """A text prototype: its number, the attention of each patch (mean over heads), its heaviest tokens (see above)."""

    number: int
    attention: np.ndarray
    tokens: Sequence[tuple[float, str]]


def choose_window(args: argparse.Namespace, facts: DataFacts, channel: str | None, row: int | None) -> Window:
    """Cut a window out of the run's CSV and scale it as the run did.

    Args:
        args: the run's flags.
        facts: about its data, from its checkpoint.
        channel: None for the run's target, or its last channel if that is none.
        row: the data row that the window ends with, None for the last.

    Raises:
        UserError: if the CSV has no such channel or row.
    """
    table, path, trained_on = read_table(args), csv_path(args), facts.channels
    channel = channel or (args.target if args.target in trained_on else trained_on[-1])
    shared = [name for name in trained_on if name in table.channels]
    if channel not in shared:
        raise UserError(f"{path} and the run have no channel {channel!r} in common: --channel takes one of {shared}")
    number_in_csv = table.channels.index(channel)
    own, dates, length = table.filled[table.rows_of(number_in_csv)], table.dates_of(number_in_csv), args.seq_len
    rows = len(own)
    if rows < length:
        raise UserError(f"{path} has {rows} rows: a window of the run has {length}")
    end = rows if row is None else row
    if not length <= end <= rows:
        raise UserError(f"--row {row} must be {length} to {rows}: a window of {length} rows ends with it")
    values = own[end - length : end]
    scales = facts.scale_of(table.channels, table.filled[table.spans.last(length)[0]].T)
    scaled = scaled_rows(table, *scales, facts.explainer)[table.rows_of(number_in_csv)][end - length : end]
    title = f"{channel}, {dates[end - length]} to {dates[end - 1]}"
    return Window(title, values, scaled.astype(np.float32))


@torch.inference_mode()
def strongest_prototypes(model: nn.Module, window: Window, prototypes: int, tokens: int) -> list[Prototype]:
    """Return the prototypes with the most attention over all heads and patches of a window, the first the strongest.

    Args:
        model: in evaluation mode.
        window: the window.
        prototypes: how many to return.
        tokens: how many of each.

    Raises:
        UserError: if there are not that many.
    """
    mapping, embeddings = model.mapping_layer, model.llm_info.backbone.get_input_embeddings().weight
    for flag, count, most in (("prototypes", prototypes, len(mapping.bias)), ("tokens", tokens, len(embeddings))):
        if not 1 <= count <= most:
            raise UserError(f"--{flag} {count} must be 1 to {most}")
    scaled, _ = model.normalize(torch.from_numpy(window.scaled)[None].to(model.device))
    attention = model.reprogramming_layer.attention(model.patch_embedding(scaled), mapping())
    attention = attention[0].mean(0).T.cpu()  # (1000, patches)
    numbers = attention.mean(1).topk(prototypes).indices.tolist()
    pulls = mapping.token_weights(numbers) * torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float32)
    strongest = []
    for number, pull in zip(numbers, pulls, strict=True):
        heaviest = pull.abs().topk(tokens).indices.tolist()
        quoted = [(pull[token].item(), quote_token(model.llm_info.tokenizer, token)) for token in heaviest]
        strongest.append(Prototype(number, attention[number].numpy(), quoted))
    return strongest


def quote_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text in quotes or, if it has none or only a part of a character, its number as <number>."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if piece.startswith("▁"):  # SentencePiece's space: decoding drops it where a text starts
        text = piece.replace("▁", " ")
    return repr(text) if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{token}>"


def describe(window: Window, prototypes: Sequence[Prototype], count: int) -> str:
    """Return what to print of the strongest of `count` prototypes."""
    lines = [
        f"Window: {window.title}, {len(window.values)} rows, {len(prototypes[0].attention)} patches",
        f"Prototype, share of the attention (spread evenly: {1 / count:.2%}), its highest-weighted tokens:",
    ]
    for prototype in prototypes:
        tokens = "  ".join(f"{pull:+.3g} {text}" for pull, text in prototype.tokens)
        lines.append(f"{prototype.number:>5}  {prototype.attention.mean():>7.2%}  {tokens}")
    return "\n".join(lines)


def draw(path: Path, window: Window, prototypes: Sequence[Prototype], patch_len: int, stride: int) -> None:
    """Draw a window and its patches and below, step by step, the patches' attention to the prototypes, as a PNG."""
    patches, shown = len(prototypes[0].attention), len(prototypes)
    figure = Figure(figsize=(11, 4.2 + 0.28 * shown), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 0.8 + 0.28 * shown])
    top.set_title(_in_font(window.title), fontsize="medium", parse_math=False)
    _draw_window(top, window.values, np.arange(patches) * stride, patch_len, stride)
    edges = np.arange(patches + 1) * stride + (patch_len - 1 - stride) / 2
    attention = [prototype.attention for prototype in prototypes]
    mesh = bottom.pcolormesh(edges, np.arange(shown + 1) - 0.5, attention, vmin=0)
    labels = [_label(prototype) for prototype in prototypes]
    bottom.set_yticks(range(shown), labels, fontsize="small", parse_math=False)
    bottom.invert_yaxis()
    for axis in (top, bottom):
        axis.margins(x=0)
    bottom.set_xlabel("step of the window (a patch's attention is drawn at its middle)")
    figure.colorbar(mesh, ax=bottom, location="bottom", aspect=60, label="attention, mean over heads")
    save_picture(figure, path)


def _draw_window(axis: Axes, values: np.ndarray, starts: np.ndarray, patch_len: int, stride: int) -> None:
    steps = np.arange(len(values) + stride)
    axis.plot(steps[: len(values)], values, color="0.3", label="window")
    axis.plot(steps[-stride - 1 :], [values[-1]] * (stride + 1), ":", color="0.3", label="its last value, repeated")
    overlapping = -(-patch_len // stride)
    heights = 0.04 + 0.16 * (np.arange(len(starts)) % overlapping) / overlapping
    place = {"transform": axis.get_xaxis_transform()}  # the height as a share of the axis
    axis.hlines(heights, starts, starts + patch_len - 1, "tab:blue", label="patches", **place)
    low, span = values.min(), np.ptp(values) or 1
    axis.set_ylim(low - 0.4 * span, low + 1.35 * span)
    axis.legend(loc="upper left", ncols=3, fontsize="small")


def _label(prototype: Prototype) -> str:
    tokens = ((pull, _in_font(text)) for pull, text in prototype.tokens[:3])
    shortened = ("-+"[pull > 0] + (text if len(text) <= 18 else text[:17] + "…") for pull, text in tokens)
    return f"{' '.join(shortened)}  {prototype.number}"


def _in_font(text: str) -> str:
    """Escape letters that matplotlib's own font may lack."""
    return text.encode("latin-1", "backslashreplace").decode("latin-1")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder, with a checkpoint")
    parser.add_argument("--prototypes", type=int, default=10, help="how many to show (default: 10)")
    parser.add_argument("--tokens", type=int, default=8, help="how many of each prototype to print (default: 8)")
    parser.add_argument("--channel", help="of the window; default: the run's target if it is a channel, else the last")
    parser.add_argument("--row", type=int, help="data row that the window ends with, counted from 1; default: the last")
    for name in PLACES:
        default = argparse.SUPPRESS
        parser.add_argument(f"--{name}", default=default, help="as of run_main.py, if it is elsewhere than in the run")
    return parser.parse_args(argv)


def show_prototypes(options: argparse.Namespace) -> None:
    """Print the strongest prototypes and draw them into the run folder.

    Raises:
        UserError: if the folder has no checkpoint of a model with prototypes, or an option does not fit it.
    """
    checkpoint, picture = options.folder / "checkpoint", options.folder / "prototypes.png"
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint in {options.folder}: name the folder of a run that was trained")
    saved = read_checkpoint(checkpoint)
    if saved.contents["llm"] is None:
        raise UserError(f"{options.folder} is a run without an LLM and has no text prototypes: name one of TimeLLM")
    moved = {name: value for name, value in vars(options).items() if name in PLACES}
    args = flags_to_test(saved, moved)
    check_options(args)
    check_paths(args)
    # Before the LLM: what is wrong is found sooner.
    window = choose_window(args, saved.data, options.channel, options.row)
    model = build_trained(saved, args).eval()
    prototypes = strongest_prototypes(model, window, options.prototypes, options.tokens)
    print(describe(window, prototypes, len(model.mapping_layer.bias)))
    draw(picture, window, prototypes, args.patch_len, args.stride)
    print(f"Picture: {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 with one line if the input is wrong, 130 interrupted."""
    return exit_code_of(lambda: show_prototypes(parse(argv)), "nothing was written")


if __name__ == "__main__":
    leave(main)
