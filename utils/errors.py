"""The exceptions of this project, and helpers for their messages."""

from collections.abc import Sequence

_MAX_LISTED = 8


class UserError(Exception):
    """Invalid user input; the message names the cause and the remedy in one line.

    `run_main.main` prints it as ``error: <message>`` and returns exit code 2. Any other exception is a bug in this
    project and keeps its traceback.
    """


class NoPlanError(Exception):
    """The training step of this LLM cannot run on meta tensors; with real tensors it may."""


def listed(names: Sequence[str]) -> str:
    """Join the first names for a message, and count the rest."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message, or the exception's type if the message is empty."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
