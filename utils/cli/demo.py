"""Print what --demo does and which commands to try next."""

import argparse
from collections.abc import Sequence

from utils.cli.command import command_line
from utils.cli.options import FLAGS, has_llm
from utils.cli.places import csv_path, is_demo_default


def command_behind(args: argparse.Namespace) -> str:
    """Write out the command that --demo stands for, with every flag that differs from its default."""
    words = ["python", "run_main.py"]
    for name, flag in FLAGS.items():
        value = getattr(args, name)
        if name != "demo" and value != flag.default:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values if flag.type is not bool else [])]
    return command_line(words)


def introduction(args: argparse.Namespace) -> str:
    """Write the text to print before the demo runs."""
    created = [f"a synthetic series, {csv_path(args)}"] if is_demo_default(args, "data_path") else []
    if has_llm(args) and is_demo_default(args, "llm_model_path"):
        created.append(f"a tiny LLM, {args.llm_model_path}")
    creates = f"The demo creates {' and '.join(created)}. " if created else ""
    return f"{creates}It stands for\n    {command_behind(args)}\nAny of these flags can be given along with --demo."


def farewell(argv: Sequence[str]) -> str:
    """Write the text to print after the demo with the command line `argv`: what to type next."""
    words = [word for word in argv if word != "--predict" and not word.startswith("--is_training=")]
    words = [word for before, word in zip(["", *words], words, strict=False) if "--is_training" not in (before, word)]
    test = command_line(["python", "run_main.py", *words, "--is_training", "0"])
    own = 'python run_main.py --csv my.csv --content "What the columns are." --seq_len 96 --pred_len 24 --predict'
    return f"""What to type next, to test the trained layers again, or to forecast again once the CSV has grown:
    {test}
    {test} --predict
For a real LLM, of 0.3 GB or of 6 GB:
    python scripts/fetch.py smollm2
    python scripts/fetch.py qwen2.5-3b
For your own CSV, with a column of dates and columns of numbers:
    {own} --llm_model_path base_models/SmolLM2-135M
    {own} --llm_model QWEN --load_in_4bit"""
