"""Train, test and compare forecasters that reprogram a frozen large language model.

    python run_main.py --demo                                        nothing to download
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit  train, then test
    python run_main.py --data ETTm1 --llm_model QWEN --load_in_4bit --is_training 0
    accelerate launch run_main.py --data ETTm1 ...                   on several processes

--help lists the flags, docs/reference.md too. What a run does is told in `utils/training/experiment.py`.
"""

import argparse
import sys
from collections.abc import Sequence

from utils.cli.checks import check_environment, check_options, check_paths
from utils.cli.command import exit_code_of, is_first_process
from utils.cli.demo import farewell, introduction
from utils.cli.options import get_parser
from utils.cli.places import hint_after_interrupt
from utils.cli.signals import Interrupts, leave
from utils.system.threads import let_waiting_threads_sleep

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = get_parser().parse_args(argv)
    except SystemExit as stop:  # argparse's way to end after --help or a flag it does not know
        return int(stop.code or 0)
    interrupts = Interrupts()
    return exit_code_of(lambda: execute(args, argv, interrupts), lambda: hint_after_interrupt(args), interrupts)


def execute(args: argparse.Namespace, argv: Sequence[str], interrupts: Interrupts) -> None:
    """Do what the flags ask for: print a plan, or run all repetitions of an experiment.

    Args:
        args: the parsed flags.
        argv: the command line that they were parsed from.
        interrupts: tells when to stop.

    Raises:
        UserError: if the flags, the files or the environment are wrong.
    """
    check_environment()
    check_options(args)
    check_paths(args)
    let_waiting_threads_sleep()
    # torch and transformers take seconds to import: only now, so that --help and a wrong flag are answered at once.
    from utils.training.experiment import Experiment

    experiment = Experiment(args, interrupts)
    experiment.prepare()
    if args.plan:
        print(experiment.memory_plan())
        return
    show_demo_hints = args.demo and is_first_process()
    if show_demo_hints:
        print(introduction(args))
    experiment.run()
    if show_demo_hints:
        print(farewell(argv))


if __name__ == "__main__":
    leave(main)
