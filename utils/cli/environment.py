"""Check environment variables that would change a run. Nothing here imports torch."""

import os

from utils.errors import UserError

# Features that accelerate enables from the environment and that this program neither supports nor tests.
_UNSUPPORTED = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

# A launcher sets all three for each process; none has a meaning without the others.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def _is_true(name: str) -> bool:
    """Return whether accelerate reads a variable as true."""
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "on")


def check_environment() -> None:
    """Refuse unsupported features of accelerate and an incomplete set of launcher variables.

    Raises:
        UserError: names the variable.
    """
    for name in filter(_is_true, _UNSUPPORTED):
        raise UserError(f"{name}={os.environ[name]} is not supported: unset it, or launch without it")
    if _is_true("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says: set ACCELERATE_USE_CPU=1 and"
            " start the processes with torchrun --nproc_per_node"
        )
    given = {name: os.environ[name] for name in _LAUNCHER_VARIABLES if name in os.environ}
    for name, value in given.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value} is not a whole number: unset it, or start with accelerate launch")
    # A single process may be given its rank without a local rank, as by Kubernetes' PyTorchJob.
    needed = [name for name in _LAUNCHER_VARIABLES if name != "LOCAL_RANK" or given.get("WORLD_SIZE") != "1"]
    missing = [name for name in needed if name not in given]
    if missing and {"RANK", "LOCAL_RANK"} & given.keys():
        name, value = next(iter(given.items()))
        raise UserError(f"{name}={value} is set but {missing[0]} is not: unset it, or start with accelerate launch")


def overruled_variables(mixed_precision: str, grad_accum: int) -> list[str]:
    """Write a note for each variable of accelerate that the flags overrule.

    Args:
        mixed_precision: no, fp16 or bf16, as --use_amp and the device decide.
        grad_accum: the flag of that name.
    """
    decided = {
        "ACCELERATE_MIXED_PRECISION": (mixed_precision, "--use_amp"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (str(grad_accum), "--grad_accum"),
        "ACCELERATE_DYNAMO_BACKEND": ("no", "no flag, nothing is compiled"),
    }
    lines = []
    for name, (value, flag) in decided.items():
        given = os.environ.get(name, "").lower()
        is_launcher_default = name == "ACCELERATE_MIXED_PRECISION" and given == "no"
        if given and given != value and not is_launcher_default:
            lines.append(f"Note: {name}={os.environ[name]} has no effect, the flags decide ({flag})")
    return lines
