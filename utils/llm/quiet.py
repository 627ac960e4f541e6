"""What libraries print belongs to a terminal or not at all."""

import contextlib
import sys
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' reports off the screen, and its progress bars off anything but a terminal.

    Its load report tells of the layers that were left out on purpose; what matters in it, missing weights,
    the caller checks.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
