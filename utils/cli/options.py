"""The flags of `run_main.py`: one table, and the parser, the range checks and the groups of values made from it.

Nothing here imports torch, so that ``--help`` and a typo answer at once.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

from utils.cli.command import OneLineParser

DATA_NAMES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "custom", "ECL", "Traffic", "Weather")
MODEL_NAMES = ("TimeLLM", "PatchTST", "DLinear", "SeasonalNaive", "LastValue")

COMPATIBILITY = "kept for compatibility with Time-LLM scripts"

# Presets of --demo. Any of these given on the command line still wins.
DEMO_DEFAULTS = {
    "data": "custom",
    "root_path": "./dataset",
    "data_path": "demo.csv",
    "model_id": "demo",
    "llm_model_path": "./base_models/tiny-qwen2",
    "content": "Seven related hourly readings of a made-up power transformer; the last, OT, is its oil temperature.",
    "seq_len": 96,
    "pred_len": 24,
    "label_len": 24,
    "batch_size": 32,
    "train_epochs": 1,
    "max_steps": 150,
    "eval_steps": 50,
    "eval_windows": 512,
    "learning_rate": 0.005,
    "lradj": "constant",
    "skip_epoch_test": True,
    "predict": True,
}

# What a flag affects besides the run itself.
MUST_MATCH_CHECKPOINT = "a checkpoint cannot be used with another value"
WARN_IF_CHANGED = "with another value a checkpoint forecasts differently: a note says so"
RESUME_MAY_CHANGE = "a run may be resumed with another value: it changes no weight, or says when to stop"
NOT_RUN_IDENTITY = "a run with another value is still the same run: it changes no weight and no score"
RESERVED_BY_COMPARE = "compare.py sets it, or there would be no scores to compare"


def must_match_for(model: str) -> str:
    """Return the tag of a flag that is `MUST_MATCH_CHECKPOINT` for the checkpoints of one model."""
    return f"{MUST_MATCH_CHECKPOINT}, of {model}"


class Range(NamedTuple):
    """The values that a number may have: a test, and the words for it."""

    holds: Callable[[float], bool]
    words: str


_AT_LEAST_0 = Range(lambda value: value >= 0, "at least 0")
_AT_LEAST_1 = Range(lambda value: value >= 1, "at least 1")
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
    """A flag: a row of the table.

    Attributes:
        name: without the dashes.
        default: its value if it is not given; False makes it a switch.
        help: for --help.
        tags: what it affects, see above.
        choices: its values, where they are few.
        range: its values, where it is a number; of a number that is out of it, the command line says so.
        kind: its type, where the default does not tell.
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
        """The type of its value; of each value, where it takes several."""
        return self.kind or type(self.default)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Define the flag on a command line."""
        how = {"action": "store_true"} if self.type is bool else {"type": self.type, "choices": self.choices}
        group.add_argument(f"--{self.name}", default=self.default, help=self.help, **how, **(self.settings or {}))

    def accepts(self, value: object) -> bool:
        """Return whether the command line could have made a value, as to its type and choices."""
        takes_list = bool(self.settings) and self.settings.get("nargs") == "+"
        parts = value if takes_list and isinstance(value, list) else [value]
        kinds = {float, int} if self.type is float else {self.type}
        if value == self.default and type(value) is type(self.default) and self.name != "data":
            return True
        return all(type(part) in kinds for part in parts) and (self.choices is None or value in self.choices)


# Frequent sets of tags, of choices, and ranges.
_RESUME = (RESUME_MAY_CHANGE,)
_FREE = (RESUME_MAY_CHANGE, NOT_RUN_IDENTITY)
_MATCH = (MUST_MATCH_CHECKPOINT,)
_WARN = (WARN_IF_CHANGED,)
_OF_TIMELLM = (must_match_for("TimeLLM"),)
_OF_PATCHES = (must_match_for("TimeLLM"), must_match_for("PatchTST"))
_COMPARE = (RESERVED_BY_COMPARE,)

# fmt: off
# One row a flag, by group; a group may have a description.
TABLE: dict[str, tuple[str | None, tuple[Flag, ...]]] = {
    "basic": (None, (
        Flag("demo", False, "synthetic data and a tiny LLM, nothing to download", _FREE),
        Flag("plan", False, "print the memory that the run needs, and do not run", _FREE + _COMPARE),
        Flag("task_name", "long_term_forecast", "names the run", (), ("long_term_forecast", "short_term_forecast")),
        Flag("is_training", 1, "1: train, then test; 0: only test", _RESUME + _COMPARE, (0, 1)),
        Flag("model_id", "", "names the run; empty: {data}_{seq_len}_{pred_len}"),
        Flag("model_comment", "none", "names the run"),
        Flag("model", "TimeLLM", "the forecaster; PatchTST: a transformer over patches; DLinear: two linear maps;"
             " SeasonalNaive: repeats the last season; LastValue: repeats the last value", _MATCH, MODEL_NAMES),
        Flag("seed", 2021, "random seed of the first repetition"),
    )),
    "data": (None, (
        Flag("data", None, "which data set, hence its train/val/test borders; required", (), DATA_NAMES, kind=str),
        Flag("root_path", "./dataset", "folder of the CSV", _RESUME),
        Flag("data_path", "", "file name of the CSV; empty: {data}.csv", _RESUME),
        Flag("features", "M", "M: every channel; S: only the target; MS: every channel, the headline metric is the"
             " target's", (), ("M", "S", "MS")),
        Flag("target", "OT", "the column that S and MS refer to"),
        Flag("series", "", "of a long CSV (unique_id, ds, y): only these series, names or patterns such as shop-*"
             " between commas"),
        Flag("covariates", "", "columns known in advance, between commas: they explain the channels and are not"
             " forecast", _MATCH),
        Flag("loader", "modal", COMPATIBILITY),
        Flag("freq", "h", "step of the time marks: h, t, 15min, d and so on; TimeLLM does not read them"),
        Flag("checkpoints", "./checkpoints/", "folder of the run folders", _RESUME + _COMPARE),
        Flag("percent", 100, "share of the training rows to use (few-shot)", range=_PERCENT),
        Flag("num_workers", 0, "loader processes; batches are cheap, 0 is fastest", _FREE, range=_AT_LEAST_0),
    )),
    "windows": (None, (
        Flag("seq_len", 96, "rows that the model sees", _MATCH, range=_ROWS),
        Flag("label_len", 48, "past rows repeated before the target's; TimeLLM does not read them", range=_AT_LEAST_0),
        Flag("pred_len", 96, "rows to forecast", _MATCH, range=_ROWS),
        Flag("seasonal_patterns", "Monthly", COMPATIBILITY),
    )),
    "model": ("of TimeLLM and PatchTST, except where noted", (
        Flag("enc_in", 7, f"{COMPATIBILITY}: the channels are read from the CSV"),
        Flag("dec_in", 7, f"{COMPATIBILITY}: the channels are read from the CSV"),
        Flag("c_out", 7, f"{COMPATIBILITY}: the channels are read from the CSV"),
        Flag("d_model", 16, "width of the patch embedding", range=_AT_LEAST_1),
        Flag("n_heads", 8, "heads of the reprogramming attention, or of PatchTST's", (must_match_for("PatchTST"),),
             range=_AT_LEAST_1),
        Flag("e_layers", 2, "layers of PatchTST; TimeLLM: only names the run", range=_AT_LEAST_1),
        Flag("d_layers", 1, f"{COMPATIBILITY}: only names the run"),
        Flag("d_ff", 32, "width of a reprogramming head, and LLM columns kept; PatchTST: width of the feed-forward"
             " layer", range=_AT_LEAST_1),
        Flag("moving_avg", 25, "DLinear: rows of the moving average", (must_match_for("DLinear"),), range=_AT_LEAST_1),
        Flag("season", 0, "SeasonalNaive: rows of a season; 0: a day, a week for daily rows, a year for longer ones",
             (RESUME_MAY_CHANGE, must_match_for("SeasonalNaive")), range=_AT_LEAST_0),
        Flag("factor", 1, f"{COMPATIBILITY}: only names the run"),
        Flag("dropout", 0.1, "dropout of the trainable layers", range=_BELOW_1),
        Flag("embed", "timeF", "time marks of a batch, scaled (timeF) or calendar integers (fixed, learned); TimeLLM"
             " does not read them", (), ("timeF", "fixed", "learned")),
        Flag("activation", "gelu", COMPATIBILITY),
        Flag("output_attention", False, COMPATIBILITY),
        Flag("patch_len", 16, "rows of a patch", _OF_PATCHES, range=_AT_LEAST_1),
        Flag("stride", 8, "rows from one patch to the next", _OF_PATCHES, range=_AT_LEAST_1),
        Flag("mapping", "compact", "text prototypes with llm_dim (compact) or vocab_size (full, as in Time-LLM) weights"
             " each; both reach the same prototypes", (), ("compact", "full")),
        Flag("normalize_prototypes", False, "TimeLLM: scale each text prototype to entries of mean square 1, so that"
             " patches differ from the start", _OF_TIMELLM),
        Flag("residual", "none", "TimeLLM; linear: add a linear map of the scaled window, so that the LLM learns the"
             " residual of a linear forecast", _OF_TIMELLM, ("none", "linear")),
    )),
    "prompt": ("of TimeLLM", (
        Flag("prompt_domain", 0, "1: describe the data set from dataset/prompt_bank; 0: Time-LLM's one sentence on ETT",
             _WARN, (0, 1)),
        Flag("content", "", "description of the data set, used as it is; overrides the others", _WARN),
        Flag("prompt_file", "", "UTF-8 file with the description, used as it is; overrides --prompt_domain", _WARN),
        Flag("prompt_decimals", -1, "decimals of the statistics; -1: all", _WARN, range=_DECIMALS),
        Flag("prompt_padding", "left", "left: pads are masked, forecasts do not depend on batch-mates; right: as in"
             " Time-LLM, pads are attended to", _WARN, ("left", "right")),
    )),
    "frozen LLM": ("of TimeLLM", (
        Flag("llm_model", "LLAMA", "a known LLM, from ./base_models/ or the Hub", _RESUME,
             ("LLAMA", "GPT2", "BERT", "QWEN")),
        Flag("llm_model_path", "", "local folder or Hub id of any LLM; overrides --llm_model", _RESUME),
        Flag("llm_dim", 0, "hidden size; 0: read from the LLM", range=_AT_LEAST_0),
        Flag("llm_layers", None, "use the first N layers; default: 6 for LLAMA, GPT2 and BERT by name, all otherwise",
             kind=int),
        Flag("load_in_4bit", False, "NF4 weights with double quantisation"),
        Flag("llm_dtype", "auto", "precision that the LLM computes in; auto: float32 on a CPU, bfloat16 on a GPU that"
             " has it, else float16", (), ("auto", "float32", "bfloat16", "float16")),
        Flag("no_prefix_cache", False, "run prompt and patches through the LLM in one pass, as Time-LLM does: slower,"
             " the same forecasts", _RESUME),
        Flag("gradient_checkpointing", False, "recompute the LLM's activations in backward: much less memory, slower"
             " steps, the same gradients", _FREE),
        Flag("ablation", "none", "no_llm: the reprogrammed patches go straight to the head; random_llm: random weights"
             " in the LLM, drawn from --seed", _OF_TIMELLM, ("none", "no_llm", "random_llm")),
    )),
    "optimisation": (None, (
        Flag("itr", 1, "repetitions, with seeds seed, seed+1 and so on", _FREE + _COMPARE, range=_AT_LEAST_1),
        Flag("train_epochs", 10, "largest number of epochs", _RESUME, range=_AT_LEAST_1),
        Flag("align_epochs", 10, COMPATIBILITY),
        Flag("batch_size", 32, "windows of a training batch, per process", range=_AT_LEAST_1),
        Flag("eval_batch_size", 0, "windows of an evaluation batch; 0: batch_size", _FREE, range=_AT_LEAST_0),
        Flag("patience", 10, "validations without improvement before early stopping", _RESUME, range=_AT_LEAST_1),
        Flag("learning_rate", 1e-4, "peak learning rate", range=_RATE),
        Flag("mapping_rate", 1.0, "TimeLLM: learning rate of the map to the text prototypes, as a share of"
             " --learning_rate", range=_RATE),
        Flag("residual_rate", 0.01, "TimeLLM: learning rate of the map of --residual linear, as a share of"
             " --learning_rate", range=_RATE),
        Flag("optimizer", "adam", "8bit: state in 8 bits, by bitsandbytes; paged: moved to host memory when a GPU is"
             " full", (), ("adam", "adamw", "adamw8bit", "paged_adamw8bit")),
        Flag("auto_batch_size", False, "if a batch does not fit into memory, halve it and raise --grad_accum, before"
             " training starts", _RESUME),
        Flag("des", "test", "names the run", _COMPARE),
        Flag("loss", "MSE", "training loss", (), ("MSE", "MAE")),
        Flag("lradj", "type1", "learning rate schedule", (),
             ("type1", "type2", "type3", "PEMS", "TST", "COS", "constant")),
        Flag("pct_start", 0.2, "share of warm-up steps, only for --lradj TST", range=_SHARE),
        Flag("use_amp", False, "automatic mixed precision for the trainable layers"),
        Flag("grad_accum", 1, "batches of an optimiser step", range=_AT_LEAST_1),
        Flag("grad_clip", 0.0, "largest gradient norm; 0: off", range=_NORM),
        Flag("max_steps", 0, "stop training after N optimiser steps; 0: off", _RESUME, range=_AT_LEAST_0),
        Flag("resume", "", "continue from the run's last state; it is an error if there is none, with auto a fresh"
             " start", _FREE + _COMPARE, ("yes", "auto"), settings={"nargs": "?", "const": "yes"}),
        Flag("report_to", "none", "log validations to TensorBoard, too, in the run folder, by accelerate's tracker",
             _FREE, ("none", "tensorboard")),
        Flag("save_steps", 0, "save the state to resume from every N steps, too; 0: every epoch", _FREE,
             range=_AT_LEAST_0),
        Flag("deterministic", False, "repeat CUDA runs to the bit, where the kernels allow it"),
    )),
    "evaluation": (None, (
        Flag("eval_windows", 0, "at most N evenly spaced windows; 0: all", range=_AT_LEAST_0),
        Flag("test_windows", -1, "the final test on at most N evenly spaced windows; 0: all; -1: as --eval_windows",
             _RESUME, range=_AT_LEAST_MINUS_1),
        Flag("eval_steps", 0, "validate every N optimiser steps; 0: once an epoch", range=_AT_LEAST_0),
        Flag("skip_epoch_test", False, "no test pass while training", _FREE),
        Flag("predict", False, "write the forecast after the last row of the CSV, as CSV and picture",
             _FREE + _COMPARE),
        Flag("level", [], "prediction intervals of these levels, in per cent, calibrated on the validation windows,"
             " e.g. 80 95", _RESUME, kind=int, settings={"nargs": "+"}),
        Flag("save_predictions", False, "keep the test forecasts, pred.npy and true.npy, and a picture of three of"
             " them", _FREE),
        Flag("checkpoint", "", "run folder to test instead of the run's own", _RESUME + _COMPARE),
    )),
}
# fmt: on

FLAGS = {flag.name: flag for _, flags in TABLE.values() for flag in flags}
DEFAULTS = {name: flag.default for name, flag in FLAGS.items()}  # what a run did before it had the flag


def flags_tagged(tag: str) -> frozenset[str]:
    """Return the names of the flags that have a tag."""
    return frozenset(name for name, flag in FLAGS.items() if tag in flag.tags)


def check_types(flags: Mapping[str, object]) -> None:
    """Check values that did not come from the command line, but from a file or from Python.

    Raises:
        ValueError: names the first flag whose value the command line would not have let through.
    """
    for name, value in flags.items():
        if name in FLAGS and not FLAGS[name].accepts(value):
            choices = f": one of {', '.join(map(str, FLAGS[name].choices))}" if FLAGS[name].choices else ""
            raise ValueError(f"--{name} cannot be {value!r}{choices}")


class FlagGroup:
    """A frozen dataclass of flags that belong together; its fields are named as the flags are."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take this group's flags from all."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class OptionParser(OneLineParser):
    """An ArgumentParser whose errors are one line and whose namespaces are complete.

    Defaults that depend on other flags (``--model_id``, ``--data_path``, the presets of ``--demo``) are filled in by
    `parse_known_args`, so that every namespace can be handed to `models` and `data_provider` as it is.
    """

    def error(self, message: str) -> None:
        """Print one line, with the flag that may have been meant, and exit with code 2."""
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            word = message.removeprefix(marker).split()[0].split("=")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message += f" (did you mean {close[0]}?)" if close else " (--help lists the flags)"
        super().error(message)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if parsed.demo:
            # Whether an LLM was named at all: even the default's name is not the tiny one's.
            unnamed, _ = self._parse_with_defaults({"llm_model": None}, args)
            presets = dict(DEMO_DEFAULTS)
            # A preset must not contradict a flag given beside --demo.
            if parsed.prompt_file or parsed.prompt_domain:
                del presets["content"]
            if unnamed.llm_model:
                del presets["llm_model_path"]
            if not parsed.is_training:  # there --predict would mean a forecast without a test
                del presets["predict"]
            parsed, rest = self._parse_with_defaults(presets, args, namespace)
        if parsed.data is None and not rest:
            self.error(f"--data is required (one of {', '.join(DATA_NAMES)}); --demo needs no data")
        parsed.level = sorted(parsed.level)
        parsed.data_path = parsed.data_path or f"{parsed.data}.csv"
        parsed.model_id = parsed.model_id or f"{parsed.data}_{parsed.seq_len}_{parsed.pred_len}"
        return parsed, rest

    def _parse_with_defaults(self, defaults: dict, args=None, namespace=None):
        """Parse with other defaults, this once."""
        ordinary = {name: self.get_default(name) for name in defaults}
        self.set_defaults(**defaults)
        try:
            return super().parse_known_args(args, namespace)
        finally:
            self.set_defaults(**ordinary)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of `run_main.py`; every flag of Time-LLM's keeps its name, type and default."""
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


def has_llm(args: argparse.Namespace) -> bool:
    """Return whether the forecaster that --model names is built around an LLM."""
    return args.model == "TimeLLM"


def has_patches(args: argparse.Namespace) -> bool:
    """Return whether the forecaster that --model names cuts windows into patches."""
    return args.model in ("TimeLLM", "PatchTST")


def flags_of_repetition(args: argparse.Namespace, repetition: int) -> argparse.Namespace:
    """Return the flags that run repetition 0, 1, ... by itself: those of all, with its own seed."""
    return argparse.Namespace(**{**vars(args), "seed": args.seed + repetition})


def flags_of_final_test(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of the test at the end: its --eval_windows is --test_windows, if that is given."""
    windows = args.eval_windows if args.test_windows < 0 else args.test_windows
    return argparse.Namespace(**{**vars(args), "eval_windows": windows})


def headline_target(args: argparse.Namespace) -> str | None:
    """Return the channel of the headline metric, None for all channels."""
    return args.target if args.features == "MS" else None
