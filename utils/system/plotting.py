"""Import matplotlib despite an invalid environment variable MPLBACKEND; saving plots to files needs no backend."""

import os
import sys

from utils.errors import UserError

_refusal = ""
if "matplotlib" not in sys.modules:
    # matplotlib reads the variable when it is imported, and cannot be imported again after a failure.
    _backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
        try:
            matplotlib.rcParams["backend"] = _backend
        except ValueError as problem:
            _refusal = f"matplotlib refuses the environment variable MPLBACKEND ({problem}): unset it"


def check_backend() -> None:
    """Raise a UserError if matplotlib does not know the value of MPLBACKEND."""
    if _refusal:
        raise UserError(_refusal)
