"""The command line: every flag, its default, and the checks that need no tensor library.

Nothing here imports torch, so that ``--help`` and a typo answer at once.
"""

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Self

from utils.cli.command import OneLineParser

DATA_NAMES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "custom", "ECL", "Traffic", "Weather")
TASK_NAMES = ("long_term_forecast", "short_term_forecast")
SCHEDULE_NAMES = ("type1", "type2", "type3", "PEMS", "TST", "COS", "constant")
MODEL_NAMES = ("TimeLLM", "PatchTST", "DLinear", "SeasonalNaive", "LastValue")
ABLATION_NAMES = ("none", "no_llm", "random_llm")
LLM_NAMES = ("LLAMA", "GPT2", "BERT", "QWEN")
OPTIMIZER_NAMES = ("adam", "adamw", "adamw8bit", "paged_adamw8bit")


COMPATIBILITY = "kept for compatibility with Time-LLM scripts"

# What --demo stands for. Any of these given on the command line still wins.
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


class OptionParser(OneLineParser):
    """An ArgumentParser whose errors are one line and whose namespaces are complete.

    Defaults that depend on other flags (``--model_id``, ``--data_path``, the presets of ``--demo``)
    are filled in by `parse_known_args`, so that every namespace can be handed to `models` and
    `data_provider` as it is.
    """

    def error(self, message: str) -> None:
        """Print one line, with the flag that may have been meant, and leave with exit code 2."""
        super().error(self._with_suggestion(message))

    def _with_suggestion(self, message: str) -> str:
        marker = "unrecognized arguments: "
        if not message.startswith(marker):
            return message
        word = message.removeprefix(marker).split()[0].split("=")[0]
        close = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"{message} (did you mean {close[0]}?)" if close else f"{message} (--help lists the flags)"

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        if parsed.demo:
            # Whether an LLM was named at all: even the default's name is not the tiny one's.
            unnamed, _ = self._parse_with_defaults({"llm_model": None}, args)
            presets = dict(DEMO_DEFAULTS)
            # What a flag beside --demo stands for, the preset must not contradict.
            if parsed.prompt_file or parsed.prompt_domain:
                del presets["content"]
            if unnamed.llm_model:
                del presets["llm_model_path"]
            if not parsed.is_training:  # there --predict would stand for a forecast without a test
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


# What else a flag is about, said where it is defined.
NEEDED = "a checkpoint means nothing with another value"
SAID = "with another value a checkpoint forecasts otherwise: that is said"
RESUME_MAY_CHANGE = "a run may be resumed with another value: it changes no weight, or says how long to go on"
SAME_RUN = "a run with another value is still the same run: it changes no weight and no score"
COMPARE_SETS = "compare.py sets it, or it would leave no scores to compare"


def needed_by(model: str) -> str:
    """Return the tag of a flag that is `NEEDED` by the checkpoints of one model."""
    return f"{NEEDED}, of {model}"


def _flag(group: argparse._ArgumentGroup, name: str, *tags: str, **settings: object) -> None:
    """Define a flag that is about more than its value, as the tags say."""
    group.add_argument(name, **settings).tags = tags


class FlagGroup:
    """A frozen dataclass of flags that are about one thing; its fields are named as the flags are."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Take this group's flags from all."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


@cache
def flags_tagged(tag: str) -> frozenset[str]:
    """Return the names of the flags that are marked so."""
    return frozenset(action.dest for action in get_parser()._actions if tag in getattr(action, "tags", ()))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of `run_main.py`; every flag of Time-LLM's keeps its name, type and default."""
    parser = OptionParser(
        prog="run_main.py",
        description="Time-LLM: forecast time series by reprogramming a frozen large language model.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    basic = parser.add_argument_group("basic")
    _flag(
        basic,
        "--demo",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        action="store_true",
        help="made-up data and a tiny LLM, nothing to download",
    )
    _flag(
        basic,
        "--plan",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        COMPARE_SETS,
        action="store_true",
        help="print what the run needs of memory, and run nothing",
    )
    basic.add_argument("--task_name", choices=TASK_NAMES, default="long_term_forecast", help="names the run")
    _flag(
        basic,
        "--is_training",
        RESUME_MAY_CHANGE,
        COMPARE_SETS,
        type=int,
        choices=(0, 1),
        default=1,
        help="1: train, then test; 0: test only",
    )
    basic.add_argument("--model_id", default="", help="names the run; empty: {data}_{seq_len}_{pred_len}")
    basic.add_argument("--model_comment", default="none", help="names the run")
    _flag(
        basic,
        "--model",
        NEEDED,
        choices=MODEL_NAMES,
        default="TimeLLM",
        help="the forecaster; PatchTST: a transformer over patches; DLinear: two linear maps; SeasonalNaive: the last"
        " season again; LastValue: the last row",
    )
    basic.add_argument("--seed", type=int, default=2021, help="random seed of the first repetition")

    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=DATA_NAMES, help="which data set, hence its train/val/test borders; required")
    _flag(data, "--root_path", RESUME_MAY_CHANGE, default="./dataset", help="folder of the CSV")
    _flag(data, "--data_path", RESUME_MAY_CHANGE, default="", help="file name of the CSV; empty: {data}.csv")
    data.add_argument(
        "--features",
        choices=("M", "S", "MS"),
        default="M",
        help="M: every channel; S: the target alone; MS: every channel, the headline metric is the target's",
    )
    data.add_argument("--target", default="OT", help="the column that S and MS are about")
    data.add_argument(
        "--series",
        default="",
        help="of a long CSV (unique_id, ds, y): these series alone, names or patterns such as shop-* between commas",
    )
    _flag(
        data,
        "--covariates",
        NEEDED,
        default="",
        help="columns known in advance, between commas: they explain, they are not forecast",
    )
    data.add_argument("--loader", default="modal", help=COMPATIBILITY)
    data.add_argument("--freq", default="h", help="step of the time marks: h, t, 15min, d, ...; TimeLLM reads none")
    _flag(
        data,
        "--checkpoints",
        RESUME_MAY_CHANGE,
        COMPARE_SETS,
        default="./checkpoints/",
        help="folder that holds the run folders",
    )
    data.add_argument("--percent", type=int, default=100, help="share of the training rows to use (few-shot)")
    _flag(
        data,
        "--num_workers",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        type=int,
        default=0,
        help="loader processes; batches are cheap, 0 is fastest",
    )

    windows = parser.add_argument_group("windows")
    _flag(windows, "--seq_len", NEEDED, type=int, default=96, help="rows the model sees")
    windows.add_argument(
        "--label_len", type=int, default=48, help="past rows repeated before the target's; TimeLLM reads none"
    )
    _flag(windows, "--pred_len", NEEDED, type=int, default=96, help="rows to forecast")
    windows.add_argument("--seasonal_patterns", default="Monthly", help=COMPATIBILITY)

    model = parser.add_argument_group("model", "of TimeLLM and PatchTST, but where it is said")
    for name in ("--enc_in", "--dec_in", "--c_out"):
        model.add_argument(name, type=int, default=7, help=f"{COMPATIBILITY}: the channels are read from the CSV")
    model.add_argument("--d_model", type=int, default=16, help="width of the patch embedding")
    _flag(
        model,
        "--n_heads",
        needed_by("PatchTST"),
        type=int,
        default=8,
        help="heads of the reprogramming attention, or of PatchTST's",
    )
    model.add_argument("--e_layers", type=int, default=2, help="layers of PatchTST; TimeLLM: only names the run")
    model.add_argument("--d_layers", type=int, default=1, help=f"{COMPATIBILITY}: only names the run")
    model.add_argument(
        "--d_ff",
        type=int,
        default=32,
        help="width of a reprogramming head, and LLM columns kept; PatchTST: of a layer's inner product",
    )
    _flag(model, "--moving_avg", needed_by("DLinear"), type=int, default=25, help="DLinear: rows of the moving average")
    _flag(
        model,
        "--season",
        RESUME_MAY_CHANGE,
        needed_by("SeasonalNaive"),
        type=int,
        default=0,
        help="SeasonalNaive: rows of a season; 0: a day's, a week's of daily rows, a year's of longer ones",
    )
    model.add_argument("--factor", type=int, default=1, help=f"{COMPATIBILITY}: only names the run")
    model.add_argument("--dropout", type=float, default=0.1, help="dropout of the trainable layers")
    model.add_argument(
        "--embed",
        choices=("timeF", "fixed", "learned"),
        default="timeF",
        help="time marks of a batch, scaled (timeF) or calendar integers (fixed, learned); TimeLLM reads none",
    )
    model.add_argument("--activation", default="gelu", help=COMPATIBILITY)
    model.add_argument("--output_attention", action="store_true", help=COMPATIBILITY)
    of_patches = (needed_by("TimeLLM"), needed_by("PatchTST"))
    _flag(model, "--patch_len", *of_patches, type=int, default=16, help="rows a patch")
    _flag(model, "--stride", *of_patches, type=int, default=8, help="rows from patch to patch")
    model.add_argument(
        "--mapping",
        choices=("compact", "full"),
        default="compact",
        help="text prototypes with llm_dim (compact) or vocab_size (full, as Time-LLM) weights each, equal in reach",
    )
    _flag(
        model,
        "--normalize_prototypes",
        needed_by("TimeLLM"),
        action="store_true",
        help="TimeLLM: scale each text prototype to entries of mean square 1, so that patches differ from the start",
    )
    _flag(
        model,
        "--residual",
        needed_by("TimeLLM"),
        choices=("none", "linear"),
        default="none",
        help="TimeLLM; linear: add a linear map of the scaled window, so that the LLM learns what a line cannot say",
    )

    prompt = parser.add_argument_group("prompt", "of TimeLLM")
    _flag(
        prompt,
        "--prompt_domain",
        SAID,
        type=int,
        choices=(0, 1),
        default=0,
        help="1: describe the data set from dataset/prompt_bank; 0: Time-LLM's one sentence on ETT",
    )
    _flag(prompt, "--content", SAID, default="", help="the data set's description, used as it is; wins")
    _flag(prompt, "--prompt_file", SAID, default="", help="UTF-8 file with the description, as it is; wins over 1")
    _flag(prompt, "--prompt_decimals", SAID, type=int, default=-1, help="decimals of the statistics; -1: in full")
    _flag(
        prompt,
        "--prompt_padding",
        SAID,
        choices=("left", "right"),
        default="left",
        help="left: masked, forecasts do not depend on batch-mates; right: as Time-LLM, pads are attended to",
    )

    llm = parser.add_argument_group("frozen LLM", "of TimeLLM")
    _flag(
        llm,
        "--llm_model",
        RESUME_MAY_CHANGE,
        choices=LLM_NAMES,
        default="LLAMA",
        help="a known LLM, from ./base_models/ or the Hub",
    )
    _flag(
        llm,
        "--llm_model_path",
        RESUME_MAY_CHANGE,
        default="",
        help="local folder or Hub id of any LLM; wins over --llm_model",
    )
    llm.add_argument("--llm_dim", type=int, default=0, help="hidden size; 0: read from the LLM")
    llm.add_argument(
        "--llm_layers",
        type=int,
        help="use the first N layers; default: 6 for LLAMA, GPT2 and BERT by name, all otherwise",
    )
    llm.add_argument("--load_in_4bit", action="store_true", help="NF4 weights with double quantisation")
    llm.add_argument(
        "--llm_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="what the LLM computes in; auto: float32 on CPU, bfloat16 on a GPU that has it, else float16",
    )
    _flag(
        llm,
        "--no_prefix_cache",
        RESUME_MAY_CHANGE,
        action="store_true",
        help="run prompt and patches through the LLM in one pass, as Time-LLM: slower, as exact",
    )
    _flag(
        llm,
        "--gradient_checkpointing",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        action="store_true",
        help="recompute the LLM's activations in backward: much less memory, a slower step, as exact",
    )
    _flag(
        llm,
        "--ablation",
        needed_by("TimeLLM"),
        choices=ABLATION_NAMES,
        default="none",
        help="no_llm: the reprogrammed patches go straight to the head; random_llm: its weights drawn from --seed",
    )

    train = parser.add_argument_group("optimisation")
    _flag(
        train,
        "--itr",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        COMPARE_SETS,
        type=int,
        default=1,
        help="repetitions, with seeds seed, seed+1, ...",
    )
    _flag(train, "--train_epochs", RESUME_MAY_CHANGE, type=int, default=10, help="epochs at most")
    train.add_argument("--align_epochs", type=int, default=10, help=COMPATIBILITY)
    train.add_argument("--batch_size", type=int, default=32, help="windows a training batch, per process")
    _flag(
        train,
        "--eval_batch_size",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        type=int,
        default=0,
        help="windows an evaluation batch; 0: batch_size",
    )
    _flag(
        train,
        "--patience",
        RESUME_MAY_CHANGE,
        type=int,
        default=10,
        help="validations without gain before an early stop",
    )
    train.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    train.add_argument(
        "--mapping_rate",
        type=float,
        default=1.0,
        help="TimeLLM: learning rate of the map to the text prototypes, as a share of --learning_rate",
    )
    train.add_argument(
        "--residual_rate",
        type=float,
        default=0.01,
        help="TimeLLM: learning rate of the map of --residual linear, as a share of --learning_rate",
    )
    train.add_argument(
        "--optimizer",
        choices=OPTIMIZER_NAMES,
        default="adam",
        help="8bit: its state in 8 bits, by bitsandbytes; paged: swapped out of a GPU that is full",
    )
    _flag(
        train,
        "--auto_batch_size",
        RESUME_MAY_CHANGE,
        action="store_true",
        help="if a batch does not fit into memory, halve it and raise --grad_accum, before training starts",
    )
    _flag(train, "--des", COMPARE_SETS, default="test", help="names the run")
    train.add_argument("--loss", choices=("MSE", "MAE"), default="MSE", help="training loss")
    train.add_argument("--lradj", choices=SCHEDULE_NAMES, default="type1", help="learning rate schedule")
    train.add_argument("--pct_start", type=float, default=0.2, help="share of warm-up steps, --lradj TST only")
    train.add_argument("--use_amp", action="store_true", help="automatic mixed precision for the trainable layers")
    train.add_argument("--grad_accum", type=int, default=1, help="batches an optimiser step")
    train.add_argument("--grad_clip", type=float, default=0.0, help="largest gradient norm; 0: off")
    _flag(
        train,
        "--max_steps",
        RESUME_MAY_CHANGE,
        type=int,
        default=0,
        help="stop training after N optimiser steps; 0: off",
    )
    _flag(
        train,
        "--resume",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        COMPARE_SETS,
        nargs="?",
        choices=("yes", "auto"),
        const="yes",
        default="",
        help="go on from the run's last state; an error if there is none, auto starts fresh then",
    )
    _flag(
        train,
        "--report_to",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        choices=("none", "tensorboard"),
        default="none",
        help="what else is told of each validation: TensorBoard, in the run folder, by accelerate's tracker",
    )
    _flag(
        train,
        "--save_steps",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        type=int,
        default=0,
        help="save the state to resume from every N steps, too; 0: every epoch",
    )
    train.add_argument(
        "--deterministic", action="store_true", help="the same bits at every run on CUDA, too, where kernels allow"
    )

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval_windows", type=int, default=0, help="at most N evenly spaced windows; 0: all")
    _flag(
        evaluation,
        "--test_windows",
        RESUME_MAY_CHANGE,
        type=int,
        default=-1,
        help="the test at the end on at most N evenly spaced windows; 0: all; -1: as --eval_windows says",
    )
    evaluation.add_argument(
        "--eval_steps", type=int, default=0, help="validate every N optimiser steps; 0: once an epoch"
    )
    _flag(
        evaluation,
        "--skip_epoch_test",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        action="store_true",
        help="no test pass while training",
    )
    _flag(
        evaluation,
        "--predict",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        COMPARE_SETS,
        action="store_true",
        help="write the forecast after the last row of the CSV, as CSV and picture",
    )
    _flag(
        evaluation,
        "--level",
        RESUME_MAY_CHANGE,
        nargs="+",
        type=int,
        default=[],
        help="prediction intervals of these levels, in per cent, calibrated on the validation windows, e.g. 80 95",
    )
    _flag(
        evaluation,
        "--save_predictions",
        RESUME_MAY_CHANGE,
        SAME_RUN,
        action="store_true",
        help="keep the test forecasts, pred.npy and true.npy, and a picture of three of them",
    )
    _flag(
        evaluation,
        "--checkpoint",
        RESUME_MAY_CHANGE,
        COMPARE_SETS,
        default="",
        help="run folder to test instead of the run's own",
    )
    return parser


@cache
def defaults() -> dict[str, object]:
    """Return the default of every flag: what a run did from before there was this flag."""
    return {action.dest: action.default for action in get_parser()._actions}


def check_types(flags: Mapping[str, object]) -> None:
    """Check values that did not come from the command line, from a file or from Python.

    Raises:
        ValueError: names the first flag whose value the command line would not have let through.
    """
    for action in get_parser()._actions:
        if action.dest not in flags:
            continue
        value = flags[action.dest]
        kind = bool if action.nargs == 0 else action.type or str
        parts = value if action.nargs == "+" and isinstance(value, list) else [value]
        # Python takes a bool for an int.
        fits = all(type(part) in ({float, int} if kind is float else {kind}) for part in parts)
        is_choice = action.choices is None or value in action.choices or (action.nargs == "?" and value == "")
        is_left_out = value is None and action.default is None and action.dest != "data"
        if not is_left_out and not (fits and is_choice):
            choices = f": one of {', '.join(map(str, action.choices))}" if action.choices else ""
            raise ValueError(f"--{action.dest} cannot be {value!r}{choices}")


def has_llm(args: argparse.Namespace) -> bool:
    """Return whether the forecaster that --model names is built around an LLM."""
    return args.model == "TimeLLM"


def has_patches(args: argparse.Namespace) -> bool:
    """Return whether the forecaster that --model names cuts windows into patches."""
    return args.model in ("TimeLLM", "PatchTST")


def flags_of_repetition(args: argparse.Namespace, repetition: int) -> argparse.Namespace:
    """Return the flags with which repetition 0, 1, ... could be run by itself: with its own seed."""
    return argparse.Namespace(**{**vars(args), "seed": args.seed + repetition})


def flags_of_final_test(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags whose --eval_windows says how many windows the test at the end takes."""
    windows = args.eval_windows if args.test_windows < 0 else args.test_windows
    return argparse.Namespace(**{**vars(args), "eval_windows": windows})


def headline_target(args: argparse.Namespace) -> str | None:
    """Return the channel that the headline metric is of, None for all."""
    return args.target if args.features == "MS" else None
