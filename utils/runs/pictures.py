"""Plots of forecasts."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError
from utils.system.files import atomic_write

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font, get_font_names
    from matplotlib.text import Text
except ValueError as problem:  # of the variable MPLBACKEND, which it reads when it is imported
    raise UserError(f"matplotlib refuses the environment variable MPLBACKEND ({problem}): unset it") from problem

CONTEXT, TARGET, FORECAST = "0.45", "tab:green", "tab:orange"

# With Chinese, Japanese and Korean characters: Windows, macOS, Linux.
_FURTHER_FONTS = (
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Noto Sans CJK SC"),
    *("Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Source Han Sans SC"),
)


@dataclass(frozen=True)
class DrawnForecast:
    """A channel's forecast to draw, in the CSV's units.

    Attributes:
        name: of the channel.
        context_dates, context: what it was made from, (seq_len,) each.
        dates, values: the forecast, (pred_len,) each.
        half_widths: of its intervals, (pred_len,) each, by level in per cent.
    """

    name: str
    context_dates: pd.DatetimeIndex
    context: np.ndarray
    dates: pd.DatetimeIndex
    values: np.ndarray
    half_widths: dict[int, np.ndarray]


def draw_forecasts(path: Path, title: str, drawn: Sequence[DrawnForecast], share_dates: bool) -> None:
    """Draw forecasts with their intervals behind what they were made from, one axis a channel.

    Args:
        path: of the PNG.
        title: of the picture.
        drawn: what to draw.
        share_dates: whether all axes are of the same dates.
    """
    figure = Figure(figsize=(10, 1 + 1.7 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, sharex=share_dates, squeeze=False)[:, 0]
    for number, (axis, one) in enumerate(zip(axes, drawn, strict=True)):
        axis.plot(one.context_dates, one.context, color=CONTEXT, linewidth=1, label="context")
        # From the last row of the context, so that the line has no hole.
        axis.plot(
            one.context_dates[-1:].append(one.dates),
            np.append(one.context[-1:], one.values),
            color=FORECAST,
            label="forecast",
        )
        _draw_bands(axis, one.dates, one.values, one.half_widths)
        axis.axvline(one.context_dates[-1], color="0.8", linewidth=0.8)
        axis.set_ylabel(label(one.name, f"channel {number + 1}"))
    axes[0].legend(loc="upper left", ncols=2 + len(drawn[0].half_widths), fontsize="small")
    figure.suptitle(title)
    if share_dates:
        figure.autofmt_xdate()
    save_picture(figure, path)


def _draw_bands(axis: Axes, places: Sequence, forecast: np.ndarray, half_widths: dict[int, np.ndarray]) -> None:
    """Draw intervals around a forecast, (pred_len,) each, the widest the palest."""
    for place, (level, half) in enumerate(reversed(half_widths.items())):
        shade = {"color": FORECAST, "alpha": min(0.15 + 0.15 * place, 0.6), "linewidth": 0}
        axis.fill_between(places, forecast - half, forecast + half, label=f"{level}%", **shade)


@dataclass(frozen=True)
class DrawnWindow:
    """A test window to draw: its title; what it shows, (seq_len,); target and forecast, (pred_len,); all scaled.

    `half_widths` are those of the forecast's intervals, (pred_len,) each, by level in per cent.
    """

    title: str
    context: np.ndarray
    target: np.ndarray
    forecast: np.ndarray
    half_widths: dict[int, np.ndarray]


def draw_windows(path: Path, windows: Sequence[DrawnWindow]) -> None:
    """Draw test windows one below the other, as a PNG at `path`."""
    figure = Figure(figsize=(10, 2.6 * len(windows)), layout="constrained")
    axes = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    for axis, window in zip(axes, windows, strict=True):
        behind = np.arange(len(window.context), len(window.context) + len(window.target))
        axis.plot(window.context, color=CONTEXT, linewidth=1, label="context")
        axis.plot(behind, window.target, color=TARGET, label="target")
        axis.plot(behind, window.forecast, color=FORECAST, label="forecast")
        _draw_bands(axis, behind, window.forecast, window.half_widths)
        axis.set_title(label(window.title, window.title.encode("ascii", "replace").decode()), fontsize="medium")
    axes[0].legend(loc="upper left", ncols=3 + len(windows[0].half_widths), fontsize="small")
    figure.supxlabel("step of the window")
    figure.supylabel("scaled value")
    save_picture(figure, path)


def draw_errors(path: Path, errors: Sequence[float | None], naive_errors: Sequence[float | None] | None) -> None:
    """Draw the scaled squared error of each forecast step, beside the seasonal-naive forecast's if there is one.

    Args:
        path: of the PNG.
        errors, naive_errors: a number a step, None for a step of which nothing is known.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(errors) + 1)
    if naive_errors is not None:
        axis.plot(
            steps, np.array(naive_errors, float), ".-", markersize=3, color=CONTEXT, label="the last season again"
        )
    axis.plot(steps, np.array(errors, float), ".-", markersize=3, color=FORECAST, label="forecast")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("forecast step")
    axis.set_ylabel("test MSE, scaled")
    axis.legend(fontsize="small")
    save_picture(figure, path)


def draw_history(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Draw the losses of a run, and its learning rate, by optimiser step.

    Args:
        path: of the PNG.
        rows: of history.csv.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, shown, color in (("train_loss", "training", CONTEXT), ("vali_loss", "validation", FORECAST)):
        known = [(int(row["steps"]), float(row[name])) for row in rows if row[name]]
        if known:
            axis.plot(*zip(*known, strict=True), ".-", color=color, label=f"{shown} loss")
    rate = axis.twinx()
    rates = [float(row["lr"]) for row in rows]
    rate.plot([int(row["steps"]) for row in rows], rates, ":", color=TARGET, label="learning rate")
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel("loss, scaled")
    axis.legend(handles=[*axis.lines, *rate.lines], fontsize="small")
    save_picture(figure, path)


@dataclass(frozen=True)
class Validation:
    """A validation while training: optimiser steps and seconds of training until then, errors on the splits.

    The test error is None where there was no test.
    """

    steps: int
    seconds: float
    vali_mse: float
    test_mse: float | None


def draw_comparison(
    path: Path, errors: dict[str, Sequence[float]], histories: dict[str, Sequence[Sequence[Validation]]]
) -> None:
    """Draw the test error of each way to forecast, and how its errors fell by steps and by seconds.

    Args:
        path: of the PNG.
        errors: the test MSE of each seed, by way.
        histories: the validations of each seed, by way.
    """
    figure = Figure(figsize=(18, 1.5 + max(3.5, 0.5 * len(errors))), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [label(name, f"way {number + 1}") for number, name in enumerate(errors)]
    for place, (name, values) in enumerate(errors.items()):
        color = f"C{place % 10}"
        left.barh(place, np.mean(values), color=color, alpha=0.35)
        left.plot(values, [place] * len(values), "o", color=color, markersize=5)
        left.annotate(f"  {np.mean(values):.4f}", (max(values), place), va="center", fontsize="small")
        for number, history in enumerate(histories[name]):
            line = {"color": color, "alpha": 0.7, "label": names[place] if number == 0 else None}
            if history[-1].steps:  # else there was nothing to train
                middle.plot([one.steps for one in history], [one.vali_mse for one in history], ".-", **line)
                seconds, falling = _best_so_far(history)
                if falling:
                    right.plot(seconds, falling, drawstyle="steps-post", **line)
                else:
                    right.plot(history[-1].seconds, values[number], "o", **line)
            elif number == 0:
                right.axhline(np.mean(values), linestyle=":", **line)
    left.set_yticks(range(len(errors)), names)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_title("test MSE: a dot a seed, the bar their mean", fontsize="medium")
    middle.set_title("validation MSE while training: a line a seed", fontsize="medium")
    middle.set_xlabel("optimiser steps")
    right.set_title("test MSE of the best validation so far; a dot: tested at the end alone", fontsize="medium")
    right.set_xlabel("seconds of training")
    for axis in (middle, right):
        if axis.lines:
            axis.legend(fontsize="small")
    save_picture(figure, path)


def _best_so_far(history: Sequence[Validation]) -> tuple[list[float], list[float]]:
    """Return when, in seconds, a run's validation error fell to a new least, and its test error then, if known."""
    seconds, errors, least = [], [], np.inf
    for one in history:
        if one.vali_mse < least and one.test_mse is not None:
            seconds.append(one.seconds)
            errors.append(one.test_mse)
        least = min(least, one.vali_mse)
    if errors:  # the weights stay what they were until the end
        seconds.append(history[-1].seconds)
        errors.append(errors[-1])
    return seconds, errors


def label(text: str, stand_in: str) -> str:
    """Return a text as matplotlib is to draw it, or `stand_in` if no font here has all its characters."""
    known = {code for font in _fonts() for code in get_font(findfont(font)).get_charmap()}
    drawn = text if all(ord(character) in known for character in text) else stand_in
    return drawn.replace("$", r"\$")  # else it begins a formula


@cache
def _fonts() -> list[str]:
    """Return the families to take characters from, matplotlib's own first, then what this machine has for others."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # any weight of theirs will do
    there = set(get_font_names())
    return [name for name in ("DejaVu Sans", *_FURTHER_FONTS) if name in there]


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    picture = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_fontfamily(_fonts())
    figure.savefig(picture, format="png", dpi=110)
    atomic_write(path, lambda file: file.write(picture.getbuffer()))
