"""The named data sets: how their rows are split into training, validation and test rows."""

from dataclasses import dataclass

SPLITS = ("train", "val", "test")

_MONTH_HOURS = 30 * 24


@dataclass(frozen=True)
class Layout:
    """The split of a data set.

    Without `val`, `train` and `test` are shares of the rows, and the remaining rows are for validation; with `val`, all
    three are numbers of rows. `quarter_hours` adds the quarter of the hour to the integer time marks.
    """

    train: float
    test: float
    val: int | None = None
    quarter_hours: bool = False

    def rows(self, total: int) -> tuple[int, int, int]:
        """Count the training, validation and test rows."""
        if self.val is not None:
            return int(self.train), self.val, int(self.test)
        train, test = int(total * self.train), int(total * self.test)
        return train, total - train - test, test


def _ett(rows_per_hour: int) -> Layout:
    month = _MONTH_HOURS * rows_per_hour
    return Layout(12 * month, 4 * month, val=4 * month, quarter_hours=rows_per_hour > 1)


LAYOUTS = {
    **dict.fromkeys(("ETTh1", "ETTh2"), _ett(1)),
    **dict.fromkeys(("ETTm1", "ETTm2"), _ett(4)),
    **dict.fromkeys(("custom", "ECL", "Traffic", "Weather"), Layout(0.7, 0.2)),
}
