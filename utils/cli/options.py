"""The flags of `run_main.py`: one table, from which the parser, the checks and the groups of flags are built."""

import argparse
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

from utils.cli.command import OneLineParser

DATA_NAMES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "custom", "ECL", "Traffic", "Weather")
MODEL_NAMES = ("TimeLLM", "PatchTST", "DLinear", "SeasonalNaive", "LastValue")

COMPATIBILITY = "kept for compatibility with Time-LLM scripts"

# Presets of --demo; a flag on the command line overrides its preset.
DEMO_DEFAULTS = {
    "data": "custom",
    "data_path": "demo.csv",
    "model_id": "demo",
    "llm_model_path": "./base_models/tiny-qwen2",
    "content": "Seven related hourly readings of a made-up power transformer; the last, OT, is its oil temperature.",
    "pred_len": 24,
    "label_len": 24,
    "train_epochs": 1,
    "max_steps": 150,
    "eval_steps": 50,
    "eval_windows": 512,
    "learning_rate": 0.005,
    "lradj": "constant",
    "skip_epoch_test": True,
    "predict": True,
}

# Tags: what a flag affects besides the run itself. Without a tag, a resume refuses another value, `--resume auto` takes
# it for another run, and a test with a checkpoint may change it (weights of another shape are refused on loading).
MUST_MATCH_CHECKPOINT = "a checkpoint cannot be used with another value"
WARN_IF_CHANGED = "a checkpoint used with another value forecasts differently, so a note is printed"
RESUME_MAY_CHANGE = "a run can be resumed with another value, which changes no weight or only when training stops"
NOT_RUN_IDENTITY = "a run with another value is the same run: no weight and no score changes"
RESERVED_BY_COMPARE = "compare.py sets the flag itself, or could not compare scores with it"


def must_match_for(model: str) -> str:
    """Build the tag of a flag that is `MUST_MATCH_CHECKPOINT` only for checkpoints of one model."""
    return f"{MUST_MATCH_CHECKPOINT}, of {model}"


class Range(NamedTuple):
    """The valid values of a number, as a predicate and in words."""

    holds: Callable[[float], bool]
    words: str


_AT_LEAST_0 = Range(lambda value: value >= 0, "at least 0")
_AT_LEAST_1 = Range(lambda value: value >= 1, "at least 1")
_LAYERS = Range(lambda value: value is None or value >= 1, "at least 1 (leave it out for the default)")
_AT_LEAST_MINUS_1 = Range(lambda value: value >= -1, "at least -1")
_DECIMALS = Range(lambda value: -1 <= value <= 20, "at least -1 and at most 20")
_ROWS = Range(lambda value: 1 <= value <= 1_000_000, "at least 1 and at most 1000000")
_RATE = Range(lambda value: 0 < value < math.inf, "above 0 and finite")
_NORM = Range(lambda value: 0 <= value < math.inf, "at least 0 and finite")
_SHARE = Range(lambda value: 0 < value < 1, "between 0 and 1")
_BELOW_1 = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
_PERCENT = Range(lambda value: 1 <= value <= 100, "at least 1 and at most 100")


@dataclass(frozen=True)
class Flag:
    """A command line flag, one row of the table.

    Attributes:
        default: the value if the flag is not given; False makes the flag a switch.
        tags: what the flag affects besides the run itself, see above.
        range: the valid values of a number; `utils.cli.checks.check_options` refuses others.
        kind: the type of the value if the default does not show it.
        settings: further arguments of `ArgumentParser.add_argument`.
    """

    name: str
    default: object
    help: str
    tags: tuple[str, ...] = ()
    choices: tuple | None = None
    range: Range | None = None
    kind: type | None = None
    settings: Mapping[str, object] | None = None

    @property
    def type(self) -> type:
        """The type of the flag's value, or of each value if the flag takes several."""
        return self.kind or type(self.default)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        kind = {"action": "store_true"} if self.type is bool else {"type": self.type, "choices": self.choices}
        group.add_argument(f"--{self.name}", default=self.default, help=self.help, **kind, **(self.settings or {}))

    def accepts(self, value: object) -> bool:
        """Return whether the command line could produce a value, judging by its type and the choices."""
        if value == self.default and type(value) is type(self.default) and self.name != "data":
            return True
        items = value if isinstance(self.default, list) and isinstance(value, list) else [value]
        types = {float, int} if self.type is float else {self.type}
        return all(type(item) in types for item in items) and (self.choices is None or value in self.choices)


# Frequent combinations of tags.
_RESUME = (RESUME_MAY_CHANGE,)
_FREE = (RESUME_MAY_CHANGE, NOT_RUN_IDENTITY)
_MATCH = (MUST_MATCH_CHECKPOINT,)
_WARN = (WARN_IF_CHANGED,)
_OF_TIMELLM = (must_match_for("TimeLLM"),)
_OF_PATCHES = (must_match_for("TimeLLM"), must_match_for("PatchTST"))
_COMPARE = (RESERVED_BY_COMPARE,)

# Frequent help texts.
_IN_NAME = "part of the run folder's name"
_IGNORED = "ignored by TimeLLM"
_FROM_CSV = f"{COMPATIBILITY}: the channels are read from the CSV"

# fmt: off
# The flags by group, each group with an optional description.
TABLE: dict[str, tuple[str | None, tuple[Flag, ...]]] = {
    "basic": (None, (
        Flag("demo", False, "run on synthetic data with a tiny LLM, without any download", _FREE),
        Flag("plan", False, "print how much memory the run needs, without running it", _FREE + _COMPARE),
        Flag("task_name", "long_term_forecast", _IN_NAME, (), ("long_term_forecast", "short_term_forecast")),
        Flag("is_training", 1, "1: train, then test; 0: only test", _RESUME + _COMPARE, (0, 1)),
        Flag("model_id", "", f"{_IN_NAME}; empty: {{data}}_{{seq_len}}_{{pred_len}}"),
        Flag("model_comment", "none", _IN_NAME),
        Flag("model", "TimeLLM", "the forecaster; PatchTST: a transformer over patches; DLinear: two linear maps;"
             " SeasonalNaive: repeats the last season; LastValue: repeats the last value", _MATCH, MODEL_NAMES),
        Flag("seed", 2021, "random seed of the first repetition"),
    )),
    "data": (None, (
        Flag("data", None, "data set, which also sets the train/val/test borders; required", (), DATA_NAMES, kind=str),
        Flag("csv", "", "path of a CSV: stands for --data custom --root_path FOLDER --data_path FILE", _FREE),
        Flag("root_path", "./dataset", "folder of the CSV", _RESUME),
        Flag("data_path", "", "file name of the CSV; empty: {data}.csv", _RESUME),
        Flag("features", "M", "M: all channels; S: the target; MS: all, scored on the target", (), ("M", "S", "MS")),
        Flag("target", "OT", "target channel of --features S and MS"),
        Flag("series", "", "series of a long CSV (unique_id, ds, y): comma-separated names or patterns (shop-*)"),
        Flag("date_column", "", "column of the timestamps; empty: found by its name or its cells", _RESUME),
        Flag("id_column", "", "column that names the series of a long CSV; empty: unique_id", _RESUME),
        Flag("date_format", "", "how dates are written: dayfirst, monthfirst, or as strptime has it", _RESUME),
        Flag("na_values", "", "comma-separated cells that mean that a value is missing, such as -,-999", _RESUME),
        Flag("covariates", "", "comma-separated columns known in advance, which explain the channels", _MATCH),
        Flag("past_covariates", "", "comma-separated columns known up to the origin, which explain them", _MATCH),
        Flag("notes", "", "comma-separated columns of text known in advance, which the LLM reads", _MATCH),
        Flag("covariate_model", "auto", "how the columns explain; auto: by the validation error of each channel", (),
             ("auto", "none", "linear", "boosted")),
        Flag("loader", "modal", COMPATIBILITY),
        Flag("freq", "h", f"frequency of the time features, for example h, t, 15min or d; {_IGNORED}"),
        Flag("checkpoints", "./checkpoints/", "folder of the run folders", _RESUME + _COMPARE),
        Flag("percent", 100, "percentage of the training rows to use (few-shot)", range=_PERCENT),
        Flag("num_workers", 0, "worker processes of the data loader; 0 is usually fastest", _FREE, range=_AT_LEAST_0),
    )),
    "windows": (None, (
        Flag("seq_len", 96, "context length: rows that the model sees", _MATCH, range=_ROWS),
        Flag("label_len", 48, f"context rows repeated before the horizon in a target; {_IGNORED}", range=_AT_LEAST_0),
        Flag("pred_len", 96, "horizon: rows to forecast", _MATCH, range=_ROWS),
        Flag("seasonal_patterns", "Monthly", COMPATIBILITY),
    )),
    "model": ("for TimeLLM and PatchTST, except where noted", (
        Flag("enc_in", 7, _FROM_CSV),
        Flag("dec_in", 7, _FROM_CSV),
        Flag("c_out", 7, _FROM_CSV),
        Flag("d_model", 16, "width of the patch embedding", range=_AT_LEAST_1),
        Flag("n_heads", 8, "attention heads", (must_match_for("PatchTST"),), range=_AT_LEAST_1),
        Flag("e_layers", 2, f"PatchTST: encoder layers; TimeLLM: only {_IN_NAME}", range=_AT_LEAST_1),
        Flag("d_layers", 1, f"{COMPATIBILITY}: only {_IN_NAME}"),
        Flag("d_ff", 32, "TimeLLM: width of a reprogramming head and number of LLM output columns kept; PatchTST: width"
             " of the feed-forward layer", range=_AT_LEAST_1),
        Flag("moving_avg", 25, "DLinear: rows in the moving average", (must_match_for("DLinear"),), range=_AT_LEAST_1),
        Flag("season", 0, "SeasonalNaive: rows in a season; 0: a day, for daily rows a week, for longer steps a year",
             (RESUME_MAY_CHANGE, must_match_for("SeasonalNaive")), range=_AT_LEAST_0),
        Flag("factor", 1, f"{COMPATIBILITY}: only {_IN_NAME}"),
        Flag("dropout", 0.1, "dropout rate of the trainable layers", range=_BELOW_1),
        Flag("embed", "timeF", f"time features: scaled (timeF) or calendar integers (fixed, learned); {_IGNORED}", (),
             ("timeF", "fixed", "learned")),
        Flag("activation", "gelu", COMPATIBILITY),
        Flag("output_attention", False, COMPATIBILITY),
        Flag("patch_len", 16, "rows in a patch", _OF_PATCHES, range=_AT_LEAST_1),
        Flag("stride", 8, "rows from the start of one patch to the next", _OF_PATCHES, range=_AT_LEAST_1),
        Flag("mapping", "compact", "weights of each text prototype: llm_dim (compact) or vocab_size (full, as in"
             " Time-LLM); both can represent the same prototypes", (), ("compact", "full")),
        Flag("normalize_prototypes", False, "TimeLLM: scale each text prototype to a mean square of 1, so that patches"
             " differ from the start of training", _OF_TIMELLM),
        Flag("residual", "none", "TimeLLM; linear: add a linear map of the scaled window, so that the LLM learns the"
             " residual of a linear forecast", _OF_TIMELLM, ("none", "linear")),
    )),
    "prompt": ("for TimeLLM", (
        Flag("prompt_domain", 0, "1: read the description of the data set from dataset/prompt_bank; 0: use Time-LLM's"
             " sentence on ETT", _WARN, (0, 1)),
        Flag("content", "", "description of the data set, used verbatim; overrides --prompt_domain", _WARN),
        Flag("prompt_file", "", "UTF-8 file with the description, used verbatim; overrides --prompt_domain", _WARN),
        Flag("prompt_decimals", -1, "decimals of the statistics; -1: all", _WARN, range=_DECIMALS),
        Flag("prompt_padding", "left", "left: padding is masked, and a forecast does not depend on the other windows in"
             " its batch; right: as in Time-LLM, padding is attended to", _WARN, ("left", "right")),
    )),
    "frozen LLM": ("for TimeLLM", (
        Flag("llm_model", "LLAMA", "LLM in ./base_models/ or on the Hub", _RESUME, ("LLAMA", "GPT2", "BERT", "QWEN")),
        Flag("llm_model_path", "", "local folder or Hub id of any LLM; overrides --llm_model", _RESUME),
        Flag("llm_dim", 0, "hidden size; 0: read from the LLM", range=_AT_LEAST_0),
        Flag("llm_layers", None, "first N layers; default: 6 for LLAMA, GPT2, BERT, else all", kind=int, range=_LAYERS),
        Flag("load_in_4bit", False, "quantize the LLM to NF4, with double quantization"),
        Flag("llm_dtype", "auto", "precision in which the LLM computes; auto: float32 on a CPU, bfloat16 on a GPU that"
             " supports it, otherwise float16", (), ("auto", "float32", "bfloat16", "float16")),
        Flag("no_prefix_cache", False, "run prompt and patches in one pass, as Time-LLM: slower, same result", _RESUME),
        Flag("gradient_checkpointing", False, "recompute activations: less memory, slower, same gradients", _FREE),
        Flag("ablation", "none", "no_llm: pass the reprogrammed patches straight to the head; random_llm: draw the"
             " LLM's weights at random from --seed", _OF_TIMELLM, ("none", "no_llm", "random_llm")),
    )),
    "optimization": (None, (
        Flag("itr", 1, "number of repetitions, with seeds seed, seed+1 and so on", _FREE + _COMPARE, range=_AT_LEAST_1),
        Flag("train_epochs", 10, "maximum number of epochs", _RESUME, range=_AT_LEAST_1),
        Flag("align_epochs", 10, COMPATIBILITY),
        Flag("batch_size", 32, "windows in a training batch, per process", range=_AT_LEAST_1),
        Flag("eval_batch_size", 0, "windows in an evaluation batch; 0: batch_size", _FREE, range=_AT_LEAST_0),
        Flag("patience", 10, "validations without improvement before early stopping", _RESUME, range=_AT_LEAST_1),
        Flag("learning_rate", 1e-4, "peak learning rate", range=_RATE),
        Flag("mapping_rate", 1.0, "TimeLLM: learning rate of --mapping relative to --learning_rate", range=_RATE),
        Flag("residual_rate", 0.01, "TimeLLM: learning rate of --residual relative to --learning_rate", range=_RATE),
        Flag("optimizer", "adam", "8bit: optimizer state in 8 bits (bitsandbytes); paged: moved to host memory when the"
             " GPU is full", (), ("adam", "adamw", "adamw8bit", "paged_adamw8bit")),
        Flag("auto_batch_size", False, "halve --batch_size and raise --grad_accum until a batch fits", _RESUME),
        Flag("des", "test", _IN_NAME, _COMPARE),
        Flag("loss", "MSE", "training loss", (), ("MSE", "MAE")),
        Flag("lradj", "type1", "learning rate schedule", (),
             ("type1", "type2", "type3", "PEMS", "TST", "COS", "constant")),
        Flag("pct_start", 0.2, "fraction of the steps to warm up for, with --lradj TST only", range=_SHARE),
        Flag("use_amp", False, "use automatic mixed precision for the trainable layers"),
        Flag("grad_accum", 1, "batches per optimizer step", range=_AT_LEAST_1),
        Flag("grad_clip", 0.0, "maximum gradient norm; 0: no clipping", range=_NORM),
        Flag("max_steps", 0, "stop training after N optimizer steps; 0: no limit", _RESUME, range=_AT_LEAST_0),
        Flag("resume", "", "continue from the run's last state; if there is none, stop with an error or, with auto,"
             " start fresh", _FREE + _COMPARE, ("yes", "auto"), settings={"nargs": "?", "const": "yes"}),
        Flag("report_to", "none", "also log to TensorBoard, in the run folder", _FREE, ("none", "tensorboard")),
        Flag("save_steps", 0, "also save the --resume state every N steps; 0: each epoch", _FREE, range=_AT_LEAST_0),
        Flag("deterministic", False, "make CUDA runs repeatable to the bit, where the kernels allow it"),
    )),
    "evaluation": (None, (
        Flag("eval_windows", 0, "evaluate on at most N evenly spaced windows; 0: all", range=_AT_LEAST_0),
        Flag("test_windows", -1, "run the final test on at most N evenly spaced windows; 0: all; -1: as --eval_windows",
             _RESUME, range=_AT_LEAST_MINUS_1),
        Flag("eval_steps", 0, "validate every N optimizer steps; 0: every epoch", range=_AT_LEAST_0),
        Flag("skip_epoch_test", False, "do not test during training", _FREE),
        Flag("predict", False, "forecast beyond the last row of the CSV; saved as CSV and picture", _FREE + _COMPARE),
        Flag("level", [], "levels of the prediction intervals in percent, for example 80 95; calibrated on the"
             " validation windows", _RESUME, kind=int, settings={"nargs": "+"}),
        Flag("save_predictions", False, "save the test forecasts (pred.npy, true.npy) and a picture of three", _FREE),
        Flag("checkpoint", "", "run folder to test instead of the run's own", _RESUME + _COMPARE),
    )),
}
# fmt: on

FLAGS = {flag.name: flag for _, flags in TABLE.values() for flag in flags}
DEFAULTS = {name: flag.default for name, flag in FLAGS.items()}  # also for runs saved before a flag existed


def flags_tagged(tag: str) -> frozenset[str]:
    """List the names of the flags with a tag."""
    return frozenset(name for name, flag in FLAGS.items() if tag in flag.tags)


def check_types(flags: Mapping[str, object]) -> None:
    """Raise a ValueError if a value, from a file or from Python, is one that the command line would not accept."""
    for name, value in flags.items():
        if name in FLAGS and not FLAGS[name].accepts(value):
            choices = f": one of {', '.join(map(str, FLAGS[name].choices))}" if FLAGS[name].choices else ""
            raise ValueError(f"--{name} cannot be {value!r}{choices}")


class FlagGroup:
    """The base of a frozen dataclass of flags that belong together; each field has the name of its flag."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Select this group's flags from all flags."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class OptionParser(OneLineParser):
    """A parser that also suggests the flag probably meant, and fills in the defaults that depend on other flags."""

    def error(self, message: str) -> None:
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            word = message.removeprefix(marker).split()[0].split("=")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message += f" (did you mean {close[0]}?)" if close else " (--help lists the flags)"
        super().error(message)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if parsed.demo:
            # argparse sets a default only where the namespace has no value yet.
            presets = argparse.Namespace(**self._demo_presets(parsed, args))
            with_presets, rest = super().parse_known_args(args, presets)
            vars(parsed).update(vars(with_presets))  # in the order of the table
        if parsed.data is None and not parsed.csv and not rest:
            self.error(f"--data is required (one of {', '.join(DATA_NAMES)}), or --csv; --demo needs neither")
        given = self._given(args, "label_len", "root_path", "data_path")
        if parsed.csv:
            self._take_csv(parsed, given)
        if given.label_len is None:  # the default is no longer than the context
            parsed.label_len = min(parsed.label_len, max(parsed.seq_len, 0))
        parsed.level = sorted(parsed.level)
        parsed.data_path = parsed.data_path or f"{parsed.data}.csv"
        parsed.model_id = parsed.model_id or f"{parsed.data}_{parsed.seq_len}_{parsed.pred_len}"
        return parsed, rest

    def _given(self, args: Sequence[str] | None, *names: str) -> argparse.Namespace:
        """Parse the command line with None for flags that are not on it, even if their default is given."""
        return super().parse_known_args(args, argparse.Namespace(**dict.fromkeys(names)))[0]

    def _take_csv(self, parsed: argparse.Namespace, given: argparse.Namespace) -> None:
        """Set the three flags that --csv stands for."""
        if given.data not in (None, "custom") or given.root_path is not None or given.data_path is not None:
            self.error("--csv stands for --data custom, --root_path and --data_path: leave them out")
        path = Path(parsed.csv)
        parsed.data, parsed.root_path, parsed.data_path = "custom", str(path.parent), path.name
        parsed.csv = ""

    def _demo_presets(self, parsed: argparse.Namespace, args=None) -> dict:
        """Select the presets of --demo that do not contradict a given flag."""
        presets = dict(DEMO_DEFAULTS)
        if parsed.prompt_file or parsed.prompt_domain:
            del presets["content"]
        if self._given(args, "llm_model").llm_model:
            del presets["llm_model_path"]
        if not parsed.is_training:  # with --is_training 0, --predict skips the test
            del presets["predict"]
        return presets


def get_parser() -> argparse.ArgumentParser:
    """Build the parser of `run_main.py`, in which Time-LLM's flags keep their names, types and defaults."""
    parser = OptionParser(
        prog="run_main.py",
        description="Time-LLM: forecast time series by reprogramming a frozen large language model.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for title, (description, flags) in TABLE.items():
        group = parser.add_argument_group(title, description)
        for flag in flags:
            flag.add_to(group)
    return parser


def can_learn(args: argparse.Namespace) -> bool:
    """Return whether the forecaster has weights to train."""
    return args.model not in ("SeasonalNaive", "LastValue")


def has_llm(args: argparse.Namespace) -> bool:
    """Return whether the forecaster of --model contains an LLM."""
    return args.model == "TimeLLM"


def reads_notes(args: argparse.Namespace) -> bool:
    """Return whether an LLM reads notes."""
    return bool(args.notes) and args.covariate_model != "none"


def flags_of_repetition(args: argparse.Namespace, repetition: int) -> argparse.Namespace:
    """Copy the flags, with the seed of a repetition; repetitions count from 0."""
    return argparse.Namespace(**{**vars(args), "seed": args.seed + repetition})


def flags_of_final_test(args: argparse.Namespace) -> argparse.Namespace:
    """Copy the flags, with --test_windows, if given, in place of --eval_windows."""
    windows = args.eval_windows if args.test_windows < 0 else args.test_windows
    return argparse.Namespace(**{**vars(args), "eval_windows": windows})


def headline_target(args: argparse.Namespace) -> str | None:
    """Name the channel of the headline metric, None for all channels."""
    return args.target if args.features == "MS" else None
