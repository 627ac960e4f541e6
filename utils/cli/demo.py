"""What --demo says, so that the next command is the reader's own."""

import argparse
from collections.abc import Sequence

from utils.cli.command import command_line
from utils.cli.options import get_parser, has_llm
from utils.cli.places import csv_path, is_demo_default


def command_behind(args: argparse.Namespace) -> str:
    """Return the command that --demo stands for, with all flags that are not at their defaults."""
    words = ["python", "run_main.py"]
    parser = get_parser()
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in ("help", "demo") or value == parser.get_default(action.dest):
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:  # else it is a switch
            words.append(str(value))
    return command_line(words)


def introduction(args: argparse.Namespace) -> str:
    """Return what to print before the demo runs."""
    made = [f"a series, {csv_path(args)}"] if is_demo_default(args, "data_path") else []
    if has_llm(args) and is_demo_default(args, "llm_model_path"):
        made.append(f"a tiny LLM, {args.llm_model_path}")
    return (
        f"The demo makes {' and '.join(made)}. " if made else ""
    ) + f"It stands for\n    {command_behind(args)}\nEach of these flags may be given beside --demo."


def _without(argv: Sequence[str], switch: str, flag: str) -> list[str]:
    """Return a command line without a switch, and without a flag and its value."""
    words = [word for word in argv if word != switch and not word.startswith(f"{flag}=")]
    return [word for before, word in zip(["", *words], words, strict=False) if flag not in (before, word)]


def farewell(argv: Sequence[str]) -> str:
    """Return what to print when the demo has run: what to type next.

    Args:
        argv: the demo's own command line.
    """
    again = command_line(["python", "run_main.py", *_without(argv, "--predict", "--is_training"), "--is_training", "0"])
    yours = "python run_main.py --data custom --data_path my.csv --seq_len 96 --pred_len 24 --predict"
    return "\n".join(
        (
            "What to type next, to test the trained layers again, and to forecast again when the CSV has grown:",
            f"    {again}",
            f"    {again} --predict",
            "For a real LLM, of 0.3 GB or of 6 GB:",
            "    python scripts/fetch.py smollm2",
            "    python scripts/fetch.py qwen2.5-3b",
            "For your own CSV in dataset/, with a column 'date' and columns of numbers:",
            f"    {yours} --llm_model_path base_models/SmolLM2-135M",
            f"    {yours} --llm_model QWEN --load_in_4bit",
        )
    )
