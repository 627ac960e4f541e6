"""Write the prompt that precedes a window's patches (section 3.1 of the paper, "Prompt-as-Prefix")."""

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

# Time-LLM uses this sentence for every data set, and its published results depend on the wording.
DEFAULT_DESCRIPTION = (
    "The Electricity Transformer Temperature (ETT) is a crucial indicator in the electric power long-term deployment."
)

TOP_LAGS = 5


@dataclass(frozen=True)
class WindowStatistics:
    """The statistics of one window that its prompt states."""

    smallest: float
    largest: float
    median: float
    is_upward: bool
    lags: tuple[int, ...]


def window_statistics(windows: torch.Tensor) -> list[WindowStatistics]:
    """Compute the statistics of windows (B, seq_len) on the CPU, after scaling as by `Normalize`.

    They are computed in float64, by operations with the same result on every machine and in every batch, and rounded to
    float32 once. The trend is upward if the last value is above the first. The median of an even number of values is
    the lower of the two middle ones, as in torch and Time-LLM.
    """
    rows = windows.double().numpy()
    means, variances = np.array([mean_and_variance(row) for row in rows]).T[..., None]  # (B, 1) each
    centered = rows - means
    ordered = np.sort(centered)[:, [0, -1, (rows.shape[1] - 1) // 2]]
    numbers = ordered / np.sqrt(variances + EPS) + 0.0  # + 0.0 turns -0.0 into 0.0
    smallest, largest, median = numbers.astype(np.float32).T.tolist()
    is_upward = (rows[:, -1] > rows[:, 0]).tolist()
    lags = _largest_lags(centered, np.sqrt(variances))
    return list(map(WindowStatistics, smallest, largest, median, is_upward, lags))


def _largest_lags(centered: np.ndarray, deviations: np.ndarray) -> list[tuple[int, ...]]:
    """List the lags of each window's largest circular autocorrelations, given (B, seq_len) of mean 0 and (B, 1)."""
    # Windows are rounded to integers (for 512 rows, of about 2^15 times their deviation). The autocorrelations are then
    # integers below 2^42, an FFT in float64 is off by 0.01 at most, and rounding makes them exact with any FFT library.
    # Lags k and seq_len - k are equal by definition: the smaller comes first, then its mirror. Among other equal lags,
    # the smallest comes first.
    count = centered.shape[1]
    unit = np.where(deviations > 0, deviations, 1) * 2.0 ** (count.bit_length() // 2 - 20)
    spectrum = np.fft.rfft(np.rint(centered / unit))
    correlations = np.rint(np.fft.irfft(spectrum.real**2 + spectrum.imag**2, count))
    nearer = np.argsort(-correlations[:, : count // 2 + 1], kind="stable")[:, :TOP_LAGS].tolist()
    with_mirrors = [[lag for k in lags for lag in dict.fromkeys((k, -k % count))] for lags in nearer]
    return [tuple(lags[:TOP_LAGS]) for lags in with_mirrors]


def render(statistics: WindowStatistics, description: str, seq_len: int, pred_len: int, decimals: int = -1) -> str:
    """Write a window's prompt in Time-LLM's words; -1 decimals print every digit of a number, as Time-LLM does."""
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


# The constant beginning of a prompt ends here. Tokenizers that split a text into words first produce the same tokens
# for the rest with or without the beginning; `PromptBuilder._find_frame` checks it.
_SEAM = " Input statistics"

# Windows that differ in every statistic, to find the tokens that all prompts share; the last has the longest prompt.
_EXAMPLES = (
    WindowStatistics(-1.7905428409576416, 3.985621452331543, -0.265960991382598, True, (0, 1, 95, 48, 2)),
    WindowStatistics(0.5, 12.25, 1.1920928955078125e-07, False, (0, 511, 7, 64, 300)),
    WindowStatistics(
        -2.1920928955078125e-07, 12.190948486328125, -3.1209287955078125e-06, True, (998, 509, 765, 321, 634)
    ),
)


class PromptBuilder:
    """Write and tokenize the prompts of windows, with `render` and the LLM's tokenizer.

    Args:
        patches: number of patches, and so of positions, after a prompt.
        context: maximum number of positions of the LLM, None for no limit.
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
        """Write the prompts of windows, (B, seq_len) on the CPU."""
        return [self._render(statistics) for statistics in window_statistics(windows)]

    def __call__(self, windows: torch.Tensor) -> list[list[int]]:
        """Write the prompts of windows, (B, seq_len) on the CPU, as token ids.

        Raises:
            UserError: if a prompt and the patches exceed the LLM's context length.
        """
        return self._tokenize(self.texts(windows))

    def examples(self) -> list[list[int]]:
        """Write prompts, as token ids, that share only the tokens that all prompts share; errors as in `__call__`."""
        return self._tokenize([self._render(statistics) for statistics in _EXAMPLES])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenize prompts and check that they fit into the LLM's context."""
        if self._frame:
            begin, end = self._frame
            prompts = [[*begin, *middle, *end] for middle in self._tokenize_after_seam(texts)]
        else:
            prompts = self.tokenizer(texts, verbose=False).input_ids
        longest = max(map(len, prompts))
        positions = longest + self.patches
        if self.context is not None and positions > self.context:
            raise UserError(
                f"a prompt of {longest} tokens and {self.patches} patches need {positions} positions, the LLM has"
                f" {self.context}: shorten the description, or raise --stride"
            )
        return prompts

    def _tokenize_after_seam(self, texts: list[str]) -> list[list[int]]:
        endings = [text[text.rindex(_SEAM) :] for text in texts]
        return self.tokenizer(endings, add_special_tokens=False, verbose=False).input_ids

    def _find_frame(self) -> tuple[list[int], list[int]] | None:
        """Find the tokens before the seam and at the end of every prompt; None if parts tokenize unlike the whole."""
        texts = [self._render(statistics) for statistics in _EXAMPLES]
        wholes = self.tokenizer(texts, verbose=False).input_ids
        middles = self._tokenize_after_seam(texts)
        for after in range(self.tokenizer.num_special_tokens_to_add() + 1):
            before = len(wholes[0]) - after - len(middles[0])
            begin, end = wholes[0][:before], wholes[0][len(wholes[0]) - after :]
            if wholes == [[*begin, *middle, *end] for middle in middles]:
                return begin, end
        return None


class NoPrompts:
    """A stand-in for a `PromptBuilder` that writes empty prompts, for an LLM that is not run."""

    def __call__(self, windows: torch.Tensor) -> list[list[int]]:
        return [[] for _ in windows]


def load_description(content: str, prompt_file: str, prompt_domain: int, data: str) -> str:
    """Choose the description of the data set by the flags: the user's, the prompt bank's, or Time-LLM's sentence.

    Raises:
        UserError: if a file is missing or not UTF-8.
    """
    if content or not (prompt_file or prompt_domain):
        return content or DEFAULT_DESCRIPTION
    if prompt_file:
        path, flag = Path(prompt_file), "--prompt_file"
    else:
        path = PROMPT_BANK / f"{'ETT' if data.startswith('ETT') else data}.txt"
        flag = "--prompt_domain 1 (or describe the data with --content)"
    if not path.is_file():  # a device, for example, might never end
        raise UserError(f"no prompt file {path}: check {flag}")
    try:
        return path.read_text(encoding="utf-8-sig")  # without the byte order mark that Notepad on Windows may write
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8 for {flag}") from problem
