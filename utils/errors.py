"""The exception for invalid user input, and what its messages share."""

from collections.abc import Sequence

_NAMED = 8


class UserError(Exception):
    """The user's input is wrong; the message names the cause and the remedy in one line.

    `run_main.main` prints it as ``error: <message>`` and returns exit code 2. Any other exception is a bug of ours and
    keeps its traceback.
    """


def listed(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message; its type if it has none."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
