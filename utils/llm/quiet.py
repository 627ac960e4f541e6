"""Silence the reports and progress bars of libraries."""

import contextlib
import sys
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' messages, and its progress bars unless stderr is a terminal.

    Its load report lists the layers that were left out on purpose; the caller checks for missing weights.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
