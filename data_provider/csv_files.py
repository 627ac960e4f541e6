"""Read CSV files as people have them: other separators, decimal commas, index columns; and name what cannot be read."""

import csv
import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd

from utils.errors import UserError, first_line, listed
from utils.system.files import hash_of

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

# Lines that are looked at for the separator and the header, and at the end for totals.
_FIRST_LINES, _LAST_ROWS = 100, 5

# In a file separated by commas, at least this share of a column's cells must hold a comma to be read as decimals.
_MOSTLY = 0.5

# The first cell of a line below the data.
_TOTALS = ("total", "totals", "grand total", "sum", "summe", "gesamt", "average", "mean", "总计", "合计", "平均")

_WITH_COMMA = re.compile(r"[+-]?[\d.,]+")
_DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?")
_THOUSANDS = re.compile(r"[+-]?([1-9]\d{0,2}(,\d{3})+|\d+)(\.\d+)?")

# pandas reads archives that hold a CSV.
_ARCHIVES = (".gz", ".bz2", ".zip", ".xz", ".zst", ".tar")

# As pandas calls columns without a name; a name of spaces is empty once stripped.
_NO_NAME = re.compile(r"(Unnamed: \d+(\.\d+)?)?")

# pandas reads cells of any length, such as long notes; the csv module by default at most 131,072 characters.
csv.field_size_limit(2**31 - 1)


class CsvFile(NamedTuple):
    """The cells of a CSV, the hash of the file, and how it was read where it is not plain, a line each."""

    frame: pd.DataFrame
    sha256: str
    notes: tuple[str, ...]


def read_csv(path: Path, na_values: Sequence[str] = (), text_columns: Sequence[str] = ()) -> CsvFile:
    """Read a CSV with its header in the first line.

    Args:
        na_values: further cells that mean that a value is missing.
        text_columns: columns whose cells are texts even if they look like numbers.

    Raises:
        UserError: if the file is not a CSV in UTF-8 with a valid header, with the line, or changes while it is read.
    """
    before, separator = _size_and_time(path), ","
    try:
        sha256 = hash_of(path)
        lines = _first_lines(path)
        separator = _find_separator(lines)
        _check_header(path, lines, separator)
        texts = dict.fromkeys(_as_spelled(lines, separator, text_columns), str)
        frame = pd.read_csv(path, encoding="utf-8-sig", sep=separator, dtype=texts, na_values=[*na_values])
    except UserError:
        _refuse_change(path, before)
        raise
    except Exception as problem:  # of any type: an empty or ragged file, a broken archive, a missing permission
        _refuse_change(path, before)
        _explain(path, separator, problem)
    _refuse_change(path, before)
    _refuse_wide_rows(path, frame, lines, separator)
    notes = [f"cells are separated by {_SEPARATORS[separator]}"] if separator != "," else []
    frame, spaced = _strip_names(frame)
    if frame.columns[0] not in text_columns:
        _refuse_totals(path, frame, separator)  # before the rows of an index are checked, which totals do not have
    frame, unnamed = _drop_unnamed(path, frame)
    if unnamed and frame.shape[1] and frame.columns[0] not in text_columns:
        _refuse_totals(path, frame, separator)
    frame, numbers = _convert_numbers(path, frame, separator, text_columns, na_values)
    return CsvFile(frame, sha256, (*notes, *spaced, *unnamed, *numbers))


def _first_lines(path: Path) -> list[str]:
    """Read the first lines; none of an archive."""
    if path.suffix in _ARCHIVES:
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(itertools.islice(file, _FIRST_LINES))


def _split(lines: Sequence[str], separator: str) -> list[list[str]]:
    """Split lines into cells without surrounding spaces."""
    return [[cell.strip() for cell in cells] for cells in csv.reader(lines, delimiter=separator)]


def _as_spelled(lines: Sequence[str], separator: str, columns: Sequence[str]) -> list[str]:
    """List names of columns, as they are and with the spaces that the header has around them, for pandas."""
    header = next((cells for cells in csv.reader(lines, delimiter=separator) if "".join(cells).strip()), [])
    return [*columns, *(name for name in header if name.strip() in columns)]


def _strip_names(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Strip the spaces around the names of columns."""
    names = [str(name).strip() for name in frame.columns]
    spaced = [repr(name) for name, given in zip(names, frame.columns, strict=True) if name not in ("", given)]
    notes = [f"spaces around column names are left out: {listed(spaced)}"] if spaced else []
    return frame.set_axis(names, axis=1), notes


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row, none of a blank line, with the number of the row's last line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        for cells in reader:
            yield reader.line_num, cells if len(cells) > 1 or "".join(cells).strip() else []


def _find_separator(lines: Sequence[str]) -> str:
    """Find the separator that splits the most lines into the same number of cells, above all the header."""

    def score(separator: str) -> tuple[bool, float, int]:
        counts = [len(cells) for cells in _split(lines, separator) if cells]
        usual = statistics.mode(counts) if counts else 1
        if usual < 2:
            return False, 0.0, 1
        return counts[0] == usual, counts.count(usual) / len(counts), usual

    return max(_SEPARATORS, key=score)  # commas if there is no difference


def _check_header(path: Path, lines: Sequence[str], separator: str) -> None:
    """Refuse a title above the header, and a name that occurs twice."""
    rows = [(number, cells) for number, cells in enumerate(_split(lines, separator), 1) if len(cells) > 1 or any(cells)]
    if not rows:
        return
    usual = statistics.mode(len(cells) for _, cells in rows)
    first, header = rows[0]
    filled = [cell for cell in header if cell]
    # A title is shorter than the rows; so is a header without all names, but texts alone do not follow on it.
    if len(filled) < usual and (len(filled) < 2 or len(header) != usual):
        below = [(number, cells) for number, cells in rows[1:] if len(cells) == usual and all(cells)]
        for number, cells in below:
            if all(map(_is_word, cells if len(filled) > 1 else cells[:1])):
                raise UserError(
                    f"{path}, line {first} is {separator.join(filled) or separator.join(header)!r}, and line {number}"
                    " looks like the header: delete the lines above it"
                )
    names = [name for name in header if name]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path}: the name {twice[0]!r} occurs twice in the header: rename one of the columns")


def _refuse_wide_rows(path: Path, frame: pd.DataFrame, lines: Sequence[str], separator: str) -> None:
    """Refuse rows of more cells than the header, whose first cells pandas takes as index."""
    wide = (number for number, cells in enumerate(_split(lines, separator), 1) if len(cells) > frame.shape[1])
    # First cells that count up by one make a RangeIndex, too.
    if (line := next(wide, 0)) or not isinstance(frame.index, pd.RangeIndex):
        text = lines[line - 1].strip() if line else ""
        raise UserError(
            f"{path} has rows with more cells than its header, line {line or 2} first, {text!r}: give every column a"
            " name, or put cells that contain the separator in quotes"
        )


def _is_word(cell: str) -> bool:
    """Return whether a cell begins neither as a number nor as a date of digits."""
    return not re.match(r"[+-]?[\d.,]", cell)


def _explain(path: Path, separator: str, problem: Exception) -> NoReturn:
    """Raise a UserError that says why a file cannot be read."""
    if isinstance(problem, UnicodeDecodeError):
        raise UserError(f"{path} is not UTF-8 but {_guess_encoding(path)}: save it as UTF-8") from problem
    match = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(problem))
    if match and path.suffix not in _ARCHIVES:
        expected, row, seen = map(int, match.groups())
        # pandas counts a row with line breaks in its cells as one line.
        line, cells = next(itertools.islice(_records(path, separator), row - 1, None), (row, []))
        text = separator.join(cells)
        raise UserError(
            f"{path} is not a CSV with a header line: line {line}, {text!r}, has {seen} cells, but the header"
            f" {expected}: correct it, or put cells that contain the separator in quotes"
        ) from problem
    raise UserError(f"{path} is not a CSV with a header line: {first_line(problem)}") from problem


def _refuse_change(path: Path, before: tuple[int, int] | None) -> None:
    if _size_and_time(path) != before:  # rows may be missing, and the last cell may be cut off
        raise UserError(f"{path} changed while it was read: run again once no other program writes to it")


def _size_and_time(path: Path) -> tuple[int, int] | None:
    """Read a file's size and modification time; None if the file does not exist."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _guess_encoding(path: Path) -> str:
    """Guess the encoding of a text file that is not UTF-8."""
    if path.suffix in _ARCHIVES:
        return "another encoding"
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in content[:100_000]:
        return "UTF-16"
    # The first letter that is not ASCII may stand far below, in a note.
    first = re.search(rb"[\x80-\xff]", content)
    start = content[first.start() if first else 0 :][:100_000]
    # Chinese characters are pairs of bytes of which the first is high; a letter with an accent is a single one.
    high = re.findall(rb"[\x80-\xff]+", start)
    if high and sum(len(run) == 1 for run in high) > len(high) / 2:
        return "Latin-1 (Windows-1252)"
    try:
        start.decode("gbk")
    except UnicodeDecodeError as problem:
        # The last character may be cut off.
        return "GBK" if problem.end >= len(start) - 1 else "another encoding"
    return "GBK"


def _drop_unnamed(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Drop columns without a name that are empty or count the rows; refuse others."""
    notes, kept = [], []
    for number, name in enumerate(frame.columns, 1):
        if not _NO_NAME.fullmatch(name):
            kept.append(number - 1)
            continue
        values = frame.iloc[:, number - 1]
        counts_up = pd.api.types.is_integer_dtype(values) and len(values) and (np.diff(values) == 1).all()
        if not counts_up and values.notna().any():
            raise UserError(f"{path}: column {number} has no name: give it one, or delete it")
        notes += [f"column {number} has no name and counts the rows: it is left out"] if counts_up else []
    return frame if len(kept) == frame.shape[1] else frame.iloc[:, kept], notes


def _refuse_totals(path: Path, frame: pd.DataFrame, separator: str) -> None:
    """Refuse a line of totals below the data."""
    # Numbers with a name may be what is forecast, and the last rows without them those to forecast.
    if not len(frame) or (pd.api.types.is_numeric_dtype(frame.iloc[:, 0]) and not _NO_NAME.fullmatch(frame.columns[0])):
        return
    first = frame.iloc[-_LAST_ROWS:, 0]
    is_total = first.astype(str).str.strip(" :").str.lower().isin(_TOTALS).to_numpy(copy=True)
    is_filled = frame.iloc[-_LAST_ROWS:, 1:].notna().any(axis=1).to_numpy()
    looks_dated = frame.iloc[:-1, 0].notna().all() and str(frame.iloc[0, 0])[:1].isdigit()
    is_total[-1] |= bool(looks_dated and pd.isna(first.iloc[-1]))
    if (wrong := is_total & is_filled).any():
        row = frame.index[-len(first) :][wrong.argmax()]
        line = row + 2
        if path.suffix not in _ARCHIVES:  # blank lines and line breaks in cells count
            filled = (number for number, cells in _records(path, separator) if cells)
            line = next(itertools.islice(filled, row + 1, None), line)
        text = separator.join("" if pd.isna(cell) else str(cell) for cell in frame.loc[row])
        raise UserError(f"{path}, line {line}: {text!r} looks like a line of totals: delete it")


def _convert_numbers(
    path: Path, frame: pd.DataFrame, separator: str, text_columns: Sequence[str], na_values: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Convert columns of numbers with decimal commas or separated thousands."""
    changed, notes = {}, []
    # pandas knows -999 in all columns of numbers, but these are texts to it, such as -999,00.
    marks = pd.to_numeric(pd.Series(na_values, dtype=str), errors="coerce").dropna()
    for name in frame.columns:
        if pd.api.types.is_numeric_dtype(frame[name]) or name in text_columns:
            continue
        if not _all_match(frame[name].head(_FIRST_LINES).dropna().astype(str).str.strip(), _WITH_COMMA):
            continue  # without a look at millions of dates
        texts = frame[name].dropna().astype(str).str.strip()
        if not _all_match(texts, _WITH_COMMA) or not texts.str.contains(",").any():
            continue
        has_points, has_commas = _all_match(texts, _THOUSANDS), _all_match(texts, _DECIMAL_COMMA)
        if has_points and has_commas and separator != ",":
            cell = texts[texts.str.contains(",")].iloc[0]
            raise UserError(
                f"{path}, column {name!r}: {cell!r} may be {cell.replace(',', '.')} or {cell.replace(',', '')}: save"
                " the file with points as decimals and without separated thousands"
            )
        if has_points:
            plain = texts.str.replace(",", "")
            notes.append(f"commas in column {name!r} separate thousands")
        elif has_commas and (separator != "," or texts.str.contains(",").mean() >= _MOSTLY):
            plain = texts.str.replace(".", "").str.replace(",", ".")
            notes.append(f"decimal commas in column {name!r} are read as points")
        else:
            continue
        numbers = pd.to_numeric(plain)
        changed[name] = numbers.mask(numbers.isin(marks)).reindex(frame.index)
    return frame.assign(**changed) if changed else frame, notes


def _all_match(texts: pd.Series, pattern: re.Pattern) -> bool:
    """Return whether all texts match."""
    return bool(texts.str.fullmatch(pattern).all())
