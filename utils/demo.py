"""What --demo says, so that the next command is the reader's own."""

import argparse

from utils.command import command_line
from utils.options import csv_path, get_parser


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
    return (
        f"The demo makes a series of its own, {csv_path(args)}, and a tiny LLM, {args.llm_model_path}, and runs\n"
        f"    {command_behind(args)}\n"
        "Each of these flags may be given beside --demo, with another value."
    )


def farewell(args: argparse.Namespace) -> str:
    """Return what to print when the demo has run: what to type next."""
    yours = "python run_main.py --data custom --data_path my.csv --seq_len 96 --pred_len 24 --predict"
    return "\n".join(
        (
            "What to type next:",
            "    python run_main.py --demo --is_training 0             test the trained layers again",
            "    python run_main.py --demo --is_training 0 --predict   forecast again, when the CSV has grown",
            "    python scripts/fetch.py smollm2                       a real LLM (0.3 GB); qwen2.5-3b is the big one",
            "Your own CSV, with a column 'date' and columns of numbers, goes into dataset/:",
            f"    {yours} --llm_model_path base_models/SmolLM2-135M",
            f"    {yours} --llm_model QWEN --load_in_4bit",
        )
    )
