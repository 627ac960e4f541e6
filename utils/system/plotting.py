"""Import matplotlib whatever the environment variable MPLBACKEND says; pictures go to files and need no backend."""

import os
import sys

from utils.errors import UserError

_refusal = ""
if "matplotlib" not in sys.modules:
    # matplotlib reads the variable when it is imported, and cannot be imported again after it has refused it.
    _backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
        try:
            matplotlib.rcParams["backend"] = _backend
        except ValueError as problem:
            _refusal = f"matplotlib refuses the environment variable MPLBACKEND ({problem}): unset it"


def check_backend() -> None:
    """Refuse a value of MPLBACKEND that matplotlib does not know.

    Raises:
        UserError: if there is one.
    """
    if _refusal:
        raise UserError(_refusal)
