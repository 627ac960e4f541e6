"""Whether what a file of a run holds can be what a run has written: it may be damaged, or a stranger's.

Each check raises an exception, of whatever kind, if it cannot.
"""

import math
from numbers import Real

import torch

from utils.cli.options import check_types

_LLM_TEXTS = ("model_type", "quantization", "config_hash", "embedding_hash", "dtype", "source")
_FLAGS_IN_USE = ("data", "model", "batch_size", "grad_accum", "max_steps", "train_epochs", "patience")
_LLM_SIZES = ("hidden_size", "vocab_size", "layers")


def check_contents(contents: dict) -> None:
    """Check what `checkpoint` and `last` have in common."""
    _check(isinstance(contents["weights"], dict), "its weights are none")
    for name, tensor in contents["weights"].items():
        _check(isinstance(name, str), "a weight has no name")
        _check_tensor(name, tensor)
    missing = [name for name in _FLAGS_IN_USE if name not in contents["flags"]]
    _check(not missing, f"its flags lack {missing[:1]}")
    check_types(contents["flags"])
    _check_llm(contents)
    _check_data(contents)


def _check_llm(contents: dict) -> None:
    llm = contents["llm"]
    if llm is None:
        return
    _check(all(isinstance(llm[name], str) for name in _LLM_TEXTS), "its LLM is not described")
    _check(all(_is_count(llm[name]) for name in _LLM_SIZES), "its LLM has no sizes")
    _check(isinstance(llm.get("folder"), str | None), "its LLM's folder is none")
    _check(isinstance(contents["llm_config"], dict | None), "its LLM's config is none")
    _check(isinstance(contents["description"], str | None), "its description is no text")
    for name, width in (("llm_probe", llm["hidden_size"]), ("llm_embeddings", 5)):
        if contents[name] is not None:
            _check_tensor(name, contents[name])
            _check(contents[name].dim() == 2 and contents[name].shape[1] == width, f"{name} has another shape")


def _check_data(contents: dict) -> None:
    channels = contents["channels"]
    _check(_are_texts(channels) and len(set(channels)) == len(channels) > 0, "its channels have no names")
    count = len(channels)
    _check(_are_numbers(contents["mean"], count), "its means are not finite")
    _check(_are_numbers(contents["deviation"], count), "its deviations are not finite")
    _check(all(deviation > 0 for deviation in contents["deviation"]), "a deviation is not above 0")
    _check(isinstance(contents["is_long"], bool), "it is neither long nor wide")
    for name in ("training_hashes", "validation_hashes"):
        _check(_are_texts(contents[name]) and len(contents[name]) in (0, count), f"its {name} are incomplete")
    _check(all(type(row) is int for row in contents["trained_rows"]), "its trained_rows are no numbers")
    _check(_is_count(contents["one_in"]) and contents["one_in"] > 0, "its one_in is no number")
    if contents["explainer"] is not None:
        _check_explainer(contents["explainer"], channels)


def _check_explainer(explainer: dict, channels: list[str]) -> None:
    _check(explainer["channels"] == channels, "its covariates explain other channels")
    _check(_are_numbers(explainer["shares"], len(channels)), "its covariates' shares are not finite")
    features = 0
    for column in explainer["columns"]:
        _check(column.keys() == {"name", "texts", "mean", "scale"}, "a covariate is not described")
        _check(isinstance(column["name"], str), "a covariate has no name")
        _check(column["texts"] is None or _are_texts(column["texts"]), "a covariate's texts are none")
        own = 1 if column["texts"] is None else len(column["texts"])
        _check(_are_numbers(column["mean"], own) and _are_numbers(column["scale"], own), "a covariate is not finite")
        _check(all(scale > 0 for scale in column["scale"]), "a covariate's scale is not above 0")
        features += own
    _check(len(explainer["coefficients"]) == len(channels), "its covariates explain other channels")
    _check(all(_are_numbers(row, features) for row in explainer["coefficients"]), "a coefficient is not finite")


def check_progress(progress: dict) -> None:
    """Check what `checkpoint` says of when it was written."""
    _check(isinstance(progress, dict), "its progress is none")
    seconds = progress.get("seconds_per_step")
    _check(seconds is None or _is_number(seconds), "its seconds are no number")


def check_training(training: dict) -> None:
    """Check the trainer's own state; the optimiser's and the schedule's, they check themselves."""
    for name in ("epoch", "batch", "steps", "validated_at", "loss_count"):
        _check(_is_count(training[name]), f"its {name} is no number")
    for name in ("seconds", "learning_seconds"):
        _check(_is_number(training.get(name, 0.0)), f"its {name} are no number")
    _check(training["loss_sum"].shape == (), "its loss is no number")
    stopping = training["stopping"]
    _check(isinstance(stopping["lowest"], Real) and stopping["lowest"] >= 0, "its lowest loss is no number")
    _check(_is_count(stopping["counter"]), "its counter is no number")
    for name in ("optimizer", "schedule"):
        _check(isinstance(training[name], dict), f"its {name} is none")
    _check(isinstance(training["scaler"], dict | None), "its scaler is none")
    _check(len(training["random"]) > 0, "it has no random states")
    for states in training["random"]:
        torch.Generator().set_state(states["cpu"])
    _check(all(_are_texts(row) for row in training["history"]), "its history is none")
    for tensor in _tensors_in(training["optimizer"]):
        _check_tensor("the optimiser's state", tensor)


def _tensors_in(value: object) -> list[torch.Tensor]:
    """Return the tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _check_tensor(name: str, tensor: object) -> None:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    _check(plain, f"{name} is no tensor")
    _check(not tensor.is_complex(), f"{name} is complex")
    # A stranger's tensor may claim more elements than it holds, by steps of 0 from one to the next.
    _check(tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes(), f"{name} is not all there")
    _check(bool(torch.isfinite(tensor).all()), f"{name} is not finite")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
