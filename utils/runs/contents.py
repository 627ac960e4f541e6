"""Check that the contents of `checkpoint` and `last` could come from a run: a file may be damaged or foreign.

Each check raises an exception of any type if they could not.
"""

import math
from dataclasses import fields
from numbers import Real

import torch

from data_provider.boosting import Trees
from data_provider.note_effect import GROUPS
from data_provider.notes import NoteColumn
from utils.cli.options import check_types
from utils.errors import listed

_LLM_TEXTS = ("model_type", "quantization", "config_hash", "embedding_hash", "dtype", "source")
_LLM_SIZES = ("hidden_size", "vocab_size", "layers")
_REQUIRED_FLAGS = ("data", "model", "batch_size", "grad_accum", "max_steps", "train_epochs", "patience")


def check_contents(contents: dict) -> None:
    """Check the contents that `checkpoint` and `last` have in common."""
    _check(isinstance(contents["weights"], dict), "its weights are not a dictionary")
    for name, tensor in contents["weights"].items():
        _check(isinstance(name, str), "a weight's name is not a string")
        _check_tensor(name, tensor)
    missing = [name for name in _REQUIRED_FLAGS if name not in contents["flags"]]
    _check(not missing, f"its flags lack {listed(missing)}")
    check_types(contents["flags"])
    if contents["llm"] is not None:
        _check_llm(contents)
    _check_data(contents)


def _check_llm(contents: dict) -> None:
    llm = contents["llm"]
    _check(all(isinstance(llm[name], str) for name in _LLM_TEXTS), "the description of its LLM is incomplete")
    _check(all(_is_count(llm[name]) for name in _LLM_SIZES), "the sizes of its LLM are not counts")
    _check(isinstance(llm.get("folder"), str | None), "the folder of its LLM is not a string")
    _check(isinstance(contents["llm_config"], dict | None), "the config of its LLM is not a dictionary")
    _check(isinstance(contents["description"], str | None), "its description of the data is not a string")
    for name, width in (("llm_probe", llm["hidden_size"]), ("llm_embeddings", 5)):
        if contents[name] is not None:
            _check_tensor(name, contents[name])
            _check(contents[name].dim() == 2 and contents[name].shape[1] == width, f"{name} has a wrong shape")


def _check_data(contents: dict) -> None:
    channels = contents["channels"]
    _check(_are_texts(channels) and len(set(channels)) == len(channels) > 0, "its channel names are invalid")
    count = len(channels)
    _check(_are_numbers(contents["mean"], count), "its means are not finite numbers, one per channel")
    _check(_are_numbers(contents["deviation"], count), "its deviations are not finite numbers, one per channel")
    _check(all(deviation > 0 for deviation in contents["deviation"]), "a deviation is not positive")
    _check(isinstance(contents["is_long"], bool), "its is_long is neither true nor false")
    for name in ("training_hashes", "validation_hashes"):
        _check(_are_texts(contents[name]) and len(contents[name]) in (0, count), f"its {name} are incomplete")
    is_int64 = [type(row) is int and -(2**63) <= row < 2**63 for row in contents["trained_rows"]]
    _check(all(is_int64), "its trained_rows are not 64-bit integers")
    if contents["explainer"] is not None:
        _check_explainer(contents["explainer"], channels)
    if contents["boosted"] is not None:
        _check_boosted(contents["boosted"], channels, contents["flags"])


def _check_boosted(boosted: dict, channels: list[str], flags: dict) -> None:
    _check(boosted["channels"] == channels, "its trees are of other channels")
    count = len(boosted["trees"])
    _check(all(type(number) is int and -1 <= number < count for number in boosted["tree_of"]), "it lacks trees")
    _check(len(boosted["tree_of"]) == len(channels) and count > 0, "it lacks trees")
    for name in ("known", "past"):
        _check_columns(boosted[name])
    _check_tensor("its linear forecast", boosted["line"])
    is_line = boosted["line"].dtype == torch.float64
    _check(is_line and boosted["line"].shape == (flags["pred_len"], flags["seq_len"]), "its linear forecast is wrong")
    _check(all(_is_count(lag) and lag > 0 for lag in boosted["lags"]) and boosted["lags"], "its seasons are not counts")
    _check(_is_number(boosted["step_in_days"]), "its step is not a number")
    for trees in boosted["trees"]:
        for tensor in _tensors_in(trees):
            _check_dense("a tree", tensor)  # a split between missing and known values has an infinite threshold
        Trees.from_dict(trees)
    _check_notes(boosted, flags["pred_len"])


def _check_notes(boosted: dict, pred_len: int) -> None:
    _check(isinstance(boosted["llm"], str), "the LLM that read its notes has no name")
    width = 1
    for column in boosted["notes"]:
        _check_note_column(column)
        width += 3 * (column["has_empty"] + column["projection"].shape[1])
    _check(len(boosted["note_effects"]) == (len(boosted["trees"]) if boosted["notes"] else 0), "it lacks note effects")
    for weights in boosted["note_effects"]:
        _check_tensor("the effect of its notes", weights)
        _check(weights.dim() == 2 and weights.shape[1] == width, "the effect of its notes has a wrong shape")
        _check(len(weights) == min(pred_len, GROUPS), "the effect of its notes has a wrong shape")


def _check_note_column(column: dict) -> None:
    names = [field.name for field in fields(NoteColumn)]
    _check(list(column) == names, "the description of its notes is incomplete")
    is_described = isinstance(column["name"], str) and isinstance(column["has_empty"], bool)
    _check(is_described, "the name of its notes is not a string")
    tensors = [column[name] for name in names[2:]]
    for tensor in tensors:
        _check_tensor("the encoding of its notes", tensor)
    mean, projection, center, axes, seen, components = (tuple(tensor.shape) for tensor in tensors)
    fits = len(projection) == len(axes) == len(seen) == len(components) == 2 and seen[0] > 0
    fits = fits and mean == center == projection[:1] == axes[:1] and seen[:1] == components[:1]
    fits = fits and (seen[1], components[1]) == (axes[1], projection[1])
    _check(fits, "the encoding of its notes has a wrong shape")


def _check_explainer(explainer: dict, channels: list[str]) -> None:
    fits = explainer["channels"] == channels and len(explainer["coefficients"]) == len(channels)
    _check(fits, "its covariates explain other channels")
    _check(_are_numbers(explainer["shares"], len(channels)), "the shares of its covariates are not finite")
    features = _check_columns(explainer["columns"])
    _check(all(_are_numbers(row, features) for row in explainer["coefficients"]), "a coefficient is not finite")


def _check_columns(columns: list[dict]) -> int:
    """Check the encodings of covariates and count their features."""
    features = 0
    for column in columns:
        _check(column.keys() == {"name", "texts", "mean", "scale"}, "the description of a covariate is incomplete")
        _check(isinstance(column["name"], str), "a covariate's name is not a string")
        _check(column["texts"] is None or _are_texts(column["texts"]), "a covariate's categories are not strings")
        own = 1 if column["texts"] is None else len(column["texts"])
        _check(_are_numbers(column["mean"], own) and _are_numbers(column["scale"], own), "a covariate is not finite")
        _check(all(scale > 0 for scale in column["scale"]), "a covariate's scale is not positive")
        features += own
    return features


def check_progress(progress: dict) -> None:
    """Check the position in the run at which `checkpoint` was written."""
    _check(isinstance(progress, dict), "its progress is not a dictionary")
    seconds = progress.get("seconds_per_step")
    _check(seconds is None or _is_number(seconds), "its seconds_per_step is not a number")


def check_training(training: dict) -> None:
    """Check the state of the trainer; the optimizer and the schedule check their own states on loading."""
    for name in ("epoch", "batch", "steps", "validated_at", "loss_count"):
        _check(_is_count(training[name]), f"its {name} is not a count")
    for name in ("seconds", "learning_seconds"):
        _check(_is_number(training.get(name, 0.0)), f"its {name} is not a number")
    _check(training["loss_sum"].shape == () and training["loss_sum"].is_floating_point(), "its loss_sum is no scalar")
    _check(all(training[name] < 2**53 for name in ("epoch", "batch", "steps")), "its position is too large")
    stopping = training["stopping"]
    _check(isinstance(stopping["lowest"], Real) and stopping["lowest"] >= 0, "its lowest loss is not a number")
    _check(_is_count(stopping["counter"]), "its early-stopping counter is not a count")
    for name in ("optimizer", "schedule"):
        _check(isinstance(training[name], dict), f"its {name} state is not a dictionary")
    _check(isinstance(training["scaler"], dict | None), "its loss scaler state is not a dictionary")
    _check(len(training["random"]) > 0, "it has no random states")
    for states in training["random"]:
        torch.Generator().set_state(states["cpu"])
    for row in training["history"]:
        _check(_are_texts(row), "its history has cells that are not strings")
        _check(len(row) >= 2 and row[0].isdecimal() and row[1].isdecimal(), "a row of its history has no steps")
        _check(all(cell == "" or math.isfinite(float(cell)) for cell in row), "a cell of its history is not a number")
    for tensor in _tensors_in(training["optimizer"]):
        _check_tensor("the optimizer state", tensor)
    for group in training["optimizer"]["param_groups"]:
        _check(_is_number(group["lr"]) and group["lr"] >= 0, "a learning rate is not a number")
    schedule = training["schedule"]
    _check(_is_number(schedule["last_epoch"]), "its schedule has no position")
    for name in ("base_lrs", "_last_lr"):
        _check(all(map(_is_number, schedule.get(name, []))), f"its schedule's {name} are not numbers")


def _tensors_in(value: object) -> list[torch.Tensor]:
    """Collect the tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _check_tensor(name: str, tensor: object) -> None:
    _check_dense(name, tensor)
    _check(bool(torch.isfinite(tensor).all()), f"{name} is not finite")


def _check_dense(name: str, tensor: object) -> None:
    is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    _check(is_plain, f"{name} is not a dense CPU tensor")
    _check(not tensor.is_complex(), f"{name} is complex")
    # With strides of 0, a foreign tensor can claim more elements than its storage holds.
    _check(tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes(), f"{name} is larger than its storage")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
