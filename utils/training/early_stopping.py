"""Stop when the validation loss no longer falls."""

import math
from collections.abc import Callable


class EarlyStopping:
    """Remember the lowest validation loss and count the validations since.

    Args:
        patience: validations without a lower loss after which training should stop.
        report: where the lines go that say what happened.
    """

    def __init__(self, patience: int, report: Callable[[str], None] = print):
        self.patience = patience
        self.report = report
        self.lowest = math.inf
        self.counter = 0

    def update(self, loss: float) -> bool:
        """Take in a validation loss; return whether it is the lowest so far."""
        if loss < self.lowest:
            self.report(f"Validation loss decreased ({self.lowest:.6f} --> {loss:.6f}).  Saving model ...")
            self.lowest = loss
            self.counter = 0
            return True
        self.counter += 1
        self.report(f"EarlyStopping counter: {self.counter} out of {self.patience}")
        return False

    def state_dict(self) -> dict[str, float]:
        """Return the state for `load_state_dict`."""
        return {"lowest": self.lowest, "counter": self.counter}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from where another was."""
        self.lowest, self.counter = state["lowest"], state["counter"]

    @property
    def should_stop(self) -> bool:
        """Whether patience is at its end."""
        return self.counter >= self.patience
