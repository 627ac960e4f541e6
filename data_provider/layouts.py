"""The data sets by name: how their rows are split into training, validation and test rows."""

from dataclasses import dataclass

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24


@dataclass(frozen=True)
class Layout:
    """How the rows of a data set are split.

    Without `val`, `train` and `test` are shares of the rows, and validation has the rest; with it, all three are
    numbers of rows. `quarter_hours` adds the quarter of the hour to the integer time marks.
    """

    train: float
    test: float
    val: int | None = None
    quarter_hours: bool = False

    def rows(self, total: int) -> tuple[int, int, int]:
        """Return the numbers of training, validation and test rows."""
        if self.val is not None:
            return int(self.train), self.val, int(self.test)
        train, test = int(total * self.train), int(total * self.test)
        return train, total - train - test, test


def _ett(rows_an_hour: int) -> Layout:
    month = _MONTH_HOURS * rows_an_hour
    return Layout(12 * month, 4 * month, val=4 * month, quarter_hours=rows_an_hour > 1)


_SHARES = Layout(0.7, 0.2)
LAYOUTS = {
    "ETTh1": _ett(1),
    "ETTh2": _ett(1),
    "ETTm1": _ett(4),
    "ETTm2": _ett(4),
    "custom": _SHARES,
    "ECL": _SHARES,
    "Traffic": _SHARES,
    "Weather": _SHARES,
}
