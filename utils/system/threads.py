"""Decide how OpenMP's threads wait for work."""

import os

# GNU's OpenMP lets a waiting thread spin 300,000 times before it sleeps, which takes several milliseconds. When more
# threads want to compute than there are cores, most of the time goes into that: two runs of the demo at once, on two
# cores that two other programs used, took 63 seconds each for 20 steps, with this limit 11.
_SPINS = "10000"
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def let_waiting_threads_sleep() -> None:
    """Let threads without work sleep early, so that programs that share cores do not stall each other.

    torch and scikit-learn bring GNU's OpenMP along on Linux. It reads the environment when it is loaded: call this
    before they are imported. Nothing is changed if one of its own variables is set; ``GOMP_SPINCOUNT=300000`` is its
    default.
    """
    if not any(name in os.environ for name in _VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
