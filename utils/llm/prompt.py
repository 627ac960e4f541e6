"""From a window to the prompt that stands before its patches (section 3.1 of the paper, "Prompt-as-Prefix")."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from layers.StandardNorm import EPS
from utils.errors import UserError
from utils.exact import mean_and_variance

PROMPT_BANK = Path(__file__).resolve().parents[2] / "dataset" / "prompt_bank"

# Time-LLM's own sentence, whatever the data set: it is part of the original's numbers.
DEFAULT_DESCRIPTION = (
    "The Electricity Transformer Temperature (ETT) is a crucial indicator in the electric power long-term deployment."
)

TOP_LAGS = 5


@dataclass(frozen=True)
class WindowStatistics:
    """What a prompt says of one window."""

    smallest: float
    largest: float
    median: float
    is_upward: bool
    lags: tuple[int, ...]


def window_statistics(windows: torch.Tensor) -> list[WindowStatistics]:
    """Describe windows as they are once `Normalize` has scaled them; the same on every machine and in every batch.

    All is computed in float64, by operations that come out alike everywhere, and rounded to float32 once. The trend
    is that from the first value to the last; a window that ends where it began is not upward. The median of an even
    number of values is the lower one of the middle, as torch and Time-LLM have it.

    Args:
        windows: (B, seq_len) on the CPU, not yet scaled.
    """
    rows = windows.double().numpy()
    means, variances = np.array([mean_and_variance(row) for row in rows]).T[..., None]  # (B, 1) each
    centred = rows - means
    ordered = np.sort(centred)[:, [0, -1, (rows.shape[1] - 1) // 2]]
    numbers = ordered / np.sqrt(variances + EPS) + 0.0  # + 0.0: there is but one zero then, that without a sign
    return [
        WindowStatistics(*told, is_upward=upward, lags=lags)
        for told, upward, lags in zip(
            numbers.astype(np.float32).tolist(),
            (rows[:, -1] > rows[:, 0]).tolist(),
            _largest_lags(centred, np.sqrt(variances)),
            strict=True,
        )
    ]


def _largest_lags(centred: np.ndarray, deviations: np.ndarray) -> list[tuple[int, ...]]:
    """Return the lags of each window's largest circular autocorrelations, the largest first.

    Windows are rounded to whole numbers (of about 2^15 times their deviation for 512 rows). Then autocorrelations are
    whole numbers below 2^42, a transform in float64 is off by a hundredth or less, and rounding makes them exact,
    whoever wrote the transform. Lags k and seq_len - k are equal by definition: the nearer is named first, then its
    mirror; of other equals the smaller is first.

    Args:
        centred: (B, seq_len), of mean 0.
        deviations: (B, 1), 0 for a constant window.
    """
    count = centred.shape[1]
    unit = np.where(deviations > 0, deviations, 1) * 2.0 ** (count.bit_length() // 2 - 20)
    spectrum = np.fft.rfft(np.rint(centred / unit))
    correlations = np.rint(np.fft.irfft(spectrum.real**2 + spectrum.imag**2, count))
    nearer = np.argsort(-correlations[:, : count // 2 + 1], kind="stable")[:, :TOP_LAGS].tolist()
    with_mirrors = [[lag for k in lags for lag in dict.fromkeys((k, -k % count))] for lags in nearer]
    return [tuple(lags[:TOP_LAGS]) for lags in with_mirrors]


def render(statistics: WindowStatistics, description: str, seq_len: int, pred_len: int, decimals: int = -1) -> str:
    """Write a window's prompt, in Time-LLM's words.

    Args:
        statistics: of the window.
        description: of the data set, one or more sentences.
        seq_len, pred_len: rows of the context and to forecast.
        decimals: of the numbers; -1 prints every digit that a float32 has as a float64, as Time-LLM does.
    """
    smallest, largest, median = (
        str(number) if decimals < 0 else f"{number:.{decimals}f}"
        for number in (statistics.smallest, statistics.largest, statistics.median)
    )
    return (
        f"<|start_prompt|>Dataset description: {description}"
        f"Task description: forecast the next {pred_len} steps given the previous {seq_len} steps information; "
        f"Input statistics: min value {smallest}, max value {largest}, median value {median}, "
        f"the trend of input is {'upward' if statistics.is_upward else 'downward'}, "
        f"top 5 lags are : {list(statistics.lags)}<|<end_prompt>|>"
    )


# Where a prompt's constant beginning ends. The words behind it are tokenised alike with or without it by
# tokenizers that cut a text into words first; `PromptBuilder` makes sure of it.
_SEAM = " Input statistics"

# Windows as different as can be, to find out what all prompts have in common; the last as long as can be.
_EXAMPLES = (
    WindowStatistics(-1.7905428409576416, 3.985621452331543, -0.265960991382598, True, (0, 1, 95, 48, 2)),
    WindowStatistics(0.5, 12.25, 1.1920928955078125e-07, False, (0, 511, 7, 64, 300)),
    WindowStatistics(
        -2.1920928955078125e-07, 12.190948486328125, -3.1209287955078125e-06, True, (998, 509, 765, 321, 634)
    ),
)


class PromptBuilder:
    """Turn windows into the token ids of their prompts.

    Args:
        tokenizer: the LLM's tokenizer.
        description: of the data set.
        seq_len, pred_len, decimals: as in `render`.
        patches: positions that follow a prompt.
        context: positions the LLM has, None for no limit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
        seq_len: int,
        pred_len: int,
        decimals: int,
        patches: int,
        context: int | None,
    ):
        self.tokenizer = tokenizer
        self.patches = patches
        self.context = context
        self._render = partial(render, description=description, seq_len=seq_len, pred_len=pred_len, decimals=decimals)
        self._frame = self._find_frame()

    def texts(self, windows: torch.Tensor) -> list[str]:
        """Return the prompts of windows, (B, seq_len) on the CPU, as text."""
        return [self._render(statistics) for statistics in window_statistics(windows)]

    def __call__(self, windows: torch.Tensor) -> list[list[int]]:
        """Return the prompts of windows, (B, seq_len) on the CPU, as token ids.

        Raises:
            UserError: if a prompt and the patches do not fit into the LLM's context.
        """
        ids = self._tokenize(self.texts(windows))
        self._check_length(ids)
        return ids

    def examples(self) -> list[list[int]]:
        """Return the token ids of prompts that have nothing in common but what all prompts have.

        Raises:
            UserError: as in `__call__`.
        """
        ids = self._tokenize([self._render(statistics) for statistics in _EXAMPLES])
        self._check_length(ids)
        return ids

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self._frame is None:
            return self.tokenizer(texts, verbose=False).input_ids
        begin, end = self._frame
        return [[*begin, *middle, *end] for middle in self._tokenize_behind_seam(texts)]

    def _tokenize_behind_seam(self, texts: list[str]) -> list[list[int]]:
        endings = [text[text.rindex(_SEAM) :] for text in texts]
        return self.tokenizer(endings, add_special_tokens=False, verbose=False).input_ids

    def _find_frame(self) -> tuple[list[int], list[int]] | None:
        """Return the tokens before the seam, and those that the tokenizer puts at the end of every text.

        None if the parts of a text are tokenised otherwise than the whole: the whole is what counts then.
        """
        texts = [self._render(statistics) for statistics in _EXAMPLES]
        wholes = self.tokenizer(texts, verbose=False).input_ids
        middles = self._tokenize_behind_seam(texts)
        for after in range(self.tokenizer.num_special_tokens_to_add() + 1):
            before = len(wholes[0]) - after - len(middles[0])
            begin, end = wholes[0][:before], wholes[0][len(wholes[0]) - after :]
            if wholes == [[*begin, *middle, *end] for middle in middles]:
                return begin, end
        return None

    def _check_length(self, ids: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, ids))
        if self.context is not None and longest + self.patches > self.context:
            raise UserError(
                f"a prompt of {longest} tokens and {self.patches} patches make {longest + self.patches} positions,"
                f" the LLM has {self.context}: shorten the description, or raise --stride"
            )


class NoPrompts:
    """Stands for a `PromptBuilder` where no prompt is read."""

    def __call__(self, windows: torch.Tensor) -> list[list[int]]:
        """Return a prompt without tokens for each window."""
        return [[] for _ in windows]


def load_description(content: str, prompt_file: str, prompt_domain: int, data: str) -> str:
    """Return the description of the data set: the user's own, the prompt bank's, or Time-LLM's sentence.

    Args:
        content, prompt_file, prompt_domain, data: the flags of these names.

    Raises:
        UserError: if a file is missing or not UTF-8.
    """
    if content:
        return content
    if prompt_file:
        return _read(Path(prompt_file), "--prompt_file")
    if prompt_domain:
        name = "ETT" if data.startswith("ETT") else data
        return _read(PROMPT_BANK / f"{name}.txt", "--prompt_domain 1 (or describe the data with --content)")
    return DEFAULT_DESCRIPTION


def _read(path: Path, flag: str) -> str:
    if not path.is_file():  # a device, for example, might never end
        raise UserError(f"no prompt file {path}: check {flag}")
    try:
        # utf-8-sig: Windows' Notepad marks UTF-8 files with a byte order mark.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8 for {flag}") from problem
