"""Environment variables that would change a run. Nothing here imports torch."""

import os

from utils.errors import UserError

# What accelerate takes from the environment, and no part of this program has been made or tried for.
_UNSUPPORTED = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

# What a launcher tells each process: none means anything without the others.
_OF_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def check_environment() -> None:
    """Refuse variables that speak of processes which are not there, or of ways to run that there are not.

    Raises:
        UserError: names the variable.
    """
    for name in _UNSUPPORTED:
        if os.environ.get(name, "").lower() in ("true", "1", "yes", "on"):
            raise UserError(f"{name}={os.environ[name]} is not supported: unset it, or launch without it")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes", "on")
    if on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, however many --num_processes: set ACCELERATE_USE_CPU=1 and"
            " start them with torchrun --nproc_per_node"
        )
    told = {name: os.environ[name] for name in _OF_PROCESSES if name in os.environ}
    for name, value in told.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value} is no whole number: unset it, or start with accelerate launch")
    needed = [name for name in _OF_PROCESSES if name != "LOCAL_RANK" or told.get("WORLD_SIZE") != "1"]
    if {"RANK", "LOCAL_RANK"} & told.keys() and (missing := [name for name in needed if name not in told]):
        there = next(iter(told))
        raise UserError(
            f"{there}={told[there]} is set and {missing[0]} is not: unset it, or start with accelerate launch"
        )


def overruled_variables(mixed_precision: str, grad_accum: int) -> list[str]:
    """Return a line for each variable of accelerate's that says something else than the flags, which decide.

    Args:
        mixed_precision: no, fp16 or bf16, by --use_amp and the device.
        grad_accum: the flag of that name.
    """
    decided = {
        "ACCELERATE_MIXED_PRECISION": (mixed_precision, "--use_amp"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (str(grad_accum), "--grad_accum"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "no flag, nothing is compiled"),
    }
    lines = []
    for name, (value, flag) in decided.items():
        told = os.environ.get(name, "").lower()
        is_launchers_default = name == "ACCELERATE_MIXED_PRECISION" and told == "no"
        if told and told != value and not is_launchers_default:
            lines.append(f"Note: {name}={os.environ[name]} has no effect, the flags decide ({flag})")
    return lines
