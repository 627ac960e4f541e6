"""Plot forecasts, errors, training histories and effects of covariates."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import utils.system.plotting  # noqa: F401 - before matplotlib, which may refuse the environment
from data_provider.effects import ColumnEffect
from data_provider.horizon import LastWindow
from utils.system.files import atomic_write

# isort: split
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.text import Text

CONTEXT, TARGET, FORECAST = "0.45", "tab:green", "tab:orange"

# Longer texts are cut beside an axis.
_LONGEST_TEXT = 24

# Fonts with Chinese, Japanese and Korean characters on Windows, macOS and Linux.
_FURTHER_FONTS = (
    *("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Noto Sans CJK SC"),
    *("Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Source Han Sans SC"),
)


def draw_forecast(
    path: Path,
    title: str,
    window: LastWindow,
    forecast: np.ndarray,
    half_widths: dict[int, np.ndarray],
    channels: Sequence[int],
) -> None:
    """Draw the forecasts of some channels, given by their indices, with contexts and intervals, as a PNG.

    `forecast` and half the width of the intervals, by level, are (pred_len, channels).
    """
    figure = Figure(figsize=(10, 1 + 1.7 * len(channels)), layout="constrained")
    axes = figure.subplots(len(channels), 1, sharex=not window.is_long, squeeze=False)[:, 0]
    for place, (axis, channel) in enumerate(zip(axes, channels, strict=True), start=1):
        past, context = window.dates[channel], window.values[:, channel]
        future, values = window.future_dates[channel], forecast[:, channel]
        own_half_widths = {level: half[:, channel] for level, half in half_widths.items()}
        axis.plot(past, context, color=CONTEXT, linewidth=1, label="context")
        # The line starts at the last row of the context, to leave no gap.
        axis.plot(past[-1:].append(future), np.append(context[-1:], values), color=FORECAST, label="forecast")
        _draw_bands(axis, future, values, own_half_widths)
        axis.axvline(past[-1], color="0.8", linewidth=0.8)
        axis.set_ylabel(label(window.channels[channel], f"channel {place}"))
    axes[0].legend(loc="upper left", ncols=2 + len(half_widths), fontsize="small")
    figure.suptitle(title)
    if not window.is_long:
        figure.autofmt_xdate()
    save_picture(figure, path)


def _draw_bands(axis: Axes, x: Sequence, forecast: np.ndarray, half_widths: dict[int, np.ndarray]) -> None:
    """Draw intervals around a forecast; the widest is the palest."""
    for place, (level, half) in enumerate(reversed(half_widths.items())):
        alpha, lower, upper = min(0.15 + 0.15 * place, 0.6), forecast - half, forecast + half
        axis.fill_between(x, lower, upper, label=f"{level}%", color=FORECAST, alpha=alpha, linewidth=0)


@dataclass(frozen=True)
class DrawnWindow:
    """A scaled test window: context, (seq_len,); target, forecast and half widths by level, (pred_len,) each."""

    title: str
    context: np.ndarray
    target: np.ndarray
    forecast: np.ndarray
    half_widths: dict[int, np.ndarray]


def draw_windows(path: Path, windows: Sequence[DrawnWindow]) -> None:
    """Draw test windows below each other, as a PNG."""
    figure = Figure(figsize=(10, 2.6 * len(windows)), layout="constrained")
    axes = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    for axis, window in zip(axes, windows, strict=True):
        steps = np.arange(len(window.context), len(window.context) + len(window.target))
        axis.plot(window.context, color=CONTEXT, linewidth=1, label="context")
        axis.plot(steps, window.target, color=TARGET, label="target")
        axis.plot(steps, window.forecast, color=FORECAST, label="forecast")
        _draw_bands(axis, steps, window.forecast, window.half_widths)
        axis.set_title(label(window.title, window.title.encode("ascii", "replace").decode()), fontsize="medium")
    axes[0].legend(loc="upper left", ncols=3 + len(windows[0].half_widths), fontsize="small")
    figure.supxlabel("step of the window")
    figure.supylabel("scaled value")
    save_picture(figure, path)


def draw_errors(path: Path, errors: Sequence[float | None], naive_errors: Sequence[float | None] | None) -> None:
    """Draw the error of each step (None without known targets), and the naive forecast's if given, as a PNG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    steps = np.arange(1, len(errors) + 1)
    if naive_errors is not None:
        axis.plot(steps, np.array(naive_errors, float), ".-", markersize=3, color=CONTEXT, label="seasonal naive")
    axis.plot(steps, np.array(errors, float), ".-", markersize=3, color=FORECAST, label="forecast")
    axis.set(ylim=(0, None), xlabel="forecast step", ylabel="test MSE, scaled")
    axis.legend(fontsize="small")
    save_picture(figure, path)


def draw_history(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Draw the losses and the learning rate of a run by optimizer step, from the rows of history.csv, as a PNG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, shown, color in (("train_loss", "training", CONTEXT), ("vali_loss", "validation", FORECAST)):
        known = [(int(row["steps"]), float(row[name])) for row in rows if row[name]]
        if known:
            axis.plot(*zip(*known, strict=True), ".-", color=color, label=f"{shown} loss")
    rate_axis = axis.twinx()
    steps, rates = [int(row["steps"]) for row in rows], [float(row["lr"]) for row in rows]
    rate_axis.plot(steps, rates, ":", color=TARGET, label="learning rate")
    rate_axis.set(ylim=(0, None), ylabel="learning rate")
    axis.set(xlabel="optimizer steps", ylabel="loss, scaled")
    axis.legend(handles=[*axis.lines, *rate_axis.lines], fontsize="small")
    save_picture(figure, path)


def draw_covariates(path: Path, effects: Sequence[ColumnEffect]) -> None:
    """Draw the effect of columns on forecasts over their values, an axis for each column, as a PNG."""
    across, down = min(len(effects), 2), -(-len(effects) // 2)
    figure = Figure(figsize=(2 + 4.5 * across, 1 + 3.2 * down), layout="constrained")
    # With one scale for all, one sees which column matters most.
    axes = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axis in axes[len(effects) :]:
        axis.remove()
    for number, (axis, effect) in enumerate(zip(axes, effects, strict=False), start=1):
        axis.axhline(0, color="0.8", linewidth=0.8)
        _draw_curves(axis, effect)
        axis.tick_params(labelleft=True)
        axis.set_xlabel(label(effect.name, f"column {number}") + (", at the origin" if effect.is_past else ""))
    axes[0].legend(fontsize="small")
    figure.supylabel("effect, in the channel's units", fontsize="medium")
    save_picture(figure, path)


def _draw_curves(axis: Axes, effect: ColumnEffect) -> None:
    """Draw the effect of a column on each channel: lines over numbers, dots over texts."""
    is_text = isinstance(effect.values, list)
    x = np.arange(len(effect.values)) if is_text else effect.values
    for place, (channel, curve) in enumerate(effect.curves.items(), start=1):
        axis.plot(x, curve, "o" if is_text else ".-", markersize=5, label=label(channel, f"channel {place}"))
    if is_text:
        texts = [text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..." for text in effect.values]
        names = [label(text, f"text {place}") for place, text in enumerate(texts, start=1)]
        has_room = len(names) <= 4
        axis.set_xticks(x, names, rotation=0 if has_room else 40, ha="center" if has_room else "right")
        axis.margins(x=0.1)
    elif len(x) <= 5:  # such as 0 and 1
        axis.set_xticks(x)


@dataclass(frozen=True)
class Validation:
    """A validation after so many optimizer steps and seconds of training; `test_mse` is None if there was no test."""

    steps: int
    seconds: float
    vali_mse: float
    test_mse: float | None


def draw_comparison(
    path: Path, errors: dict[str, Sequence[float]], histories: dict[str, Sequence[Sequence[Validation]]]
) -> None:
    """Draw the test MSE of each way to forecast, and its errors during training by steps and by seconds, as a PNG.

    For each way, `errors` holds the test MSE and `histories` the validations of each seed.
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
            if history[-1].steps:  # 0 for a model without training
                middle.plot([one.steps for one in history], [one.vali_mse for one in history], ".-", **line)
                seconds, best = _best_so_far(history)
                if best:
                    right.plot(seconds, best, drawstyle="steps-post", **line)
                else:
                    right.plot(history[-1].seconds, values[number], "o", **line)
            elif number == 0:
                right.axhline(np.mean(values), linestyle=":", **line)
    left.set_yticks(range(len(errors)), names)
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_title("test MSE: each dot is a seed, the bar is their mean", fontsize="medium")
    middle.set_title("validation MSE during training: each line is a seed", fontsize="medium")
    middle.set_xlabel("optimizer steps")
    right.set_title("test MSE of the best checkpoint so far (a dot: tested only at the end)", fontsize="medium")
    right.set_xlabel("seconds of training")
    for axis in (middle, right):
        if axis.lines:
            axis.legend(fontsize="small")
    save_picture(figure, path)


def _best_so_far(history: Sequence[Validation]) -> tuple[list[float], list[float]]:
    """Collect the seconds at which the validation error reached a new minimum, and the test errors then, if known."""
    seconds, errors, lowest = [], [], np.inf
    for validation in history:
        if validation.vali_mse < lowest and validation.test_mse is not None:
            seconds.append(validation.seconds)
            errors.append(validation.test_mse)
        lowest = min(lowest, validation.vali_mse)
    if errors:  # the best weights stay the same until the end
        seconds.append(history[-1].seconds)
        errors.append(errors[-1])
    return seconds, errors


def label(text: str, stand_in: str) -> str:
    """Escape a text for matplotlib; use `stand_in` if the installed fonts lack one of its characters."""
    known = {code for font in _fonts() for code in get_font(findfont(font)).get_charmap()}
    drawn = text if all(ord(character) in known for character in text) else stand_in
    return drawn.replace("$", r"\$")  # "$" starts a formula


@cache
def _fonts() -> list[str]:
    """List the installed font families to draw with: matplotlib's own, then those with further characters."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a missing weight does not matter
    installed = set(get_font_names())
    return [name for name in ("DejaVu Sans", *_FURTHER_FONTS) if name in installed]


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    picture = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_fontfamily(_fonts())
    figure.savefig(picture, format="png", dpi=110)
    atomic_write(path, lambda file: file.write(picture.getbuffer()))
