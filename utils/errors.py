"""The exception for invalid user input."""


class UserError(Exception):
    """The input is wrong; the message names the thing and the remedy in one line.

    `run_main.main` prints it as ``error: <message>`` and returns exit code 2. Anything else that
    escapes is a bug of ours and keeps its traceback.
    """
