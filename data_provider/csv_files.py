"""Read CSV files as people have them: other separators, decimal commas, index columns; and name what cannot be read."""

import csv
import itertools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd

from utils.errors import UserError, first_line
from utils.system.files import hash_of

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

# Lines that are looked at for the separator and the header, and at the end for totals.
_FIRST_LINES, _LAST_ROWS = 100, 5

# Where commas separate cells, a column has decimal commas only if this share of its cells has.
_MOSTLY = 0.5

# The first cell of a line below the data.
_TOTALS = ("total", "totals", "grand total", "sum", "summe", "gesamt", "average", "mean", "总计", "合计", "平均")

_WITH_COMMA = re.compile(r"[+-]?[\d.,]+")
_DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?")
_THOUSANDS = re.compile(r"[+-]?([1-9]\d{0,2}(,\d{3})+|\d+)(\.\d+)?")

# pandas reads archives that hold a CSV.
_ARCHIVES = (".gz", ".bz2", ".zip", ".xz", ".zst", ".tar")


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
    before = _size_and_time(path)
    try:
        sha256 = hash_of(path)
        lines = _first_lines(path)
        separator = _find_separator(lines)
        _check_header(path, lines, separator)
        frame = pd.read_csv(
            path, encoding="utf-8-sig", sep=separator, dtype=dict.fromkeys(text_columns, str), na_values=[*na_values]
        )
    except UserError:
        raise
    except Exception as problem:  # of any type: an empty or ragged file, a broken archive, a missing permission
        _refuse_change(path, before)
        _explain(path, problem)
    _refuse_change(path, before)
    if not isinstance(frame.index, pd.RangeIndex):
        line = next(
            (number for number, cells in enumerate(_split(lines, separator), 1) if len(cells) > frame.shape[1]), 2
        )
        text = lines[line - 1].strip() if lines else ""
        raise UserError(
            f"{path} has rows with more cells than its header, line {line} first, {text!r}: give every column a name,"
            " or put cells that contain the separator in quotes"
        )
    frame = frame.set_axis([str(name).strip() for name in frame.columns], axis=1)
    notes = [f"cells are separated by {_SEPARATORS[separator]}"] if separator != "," else []
    frame, unnamed = _drop_unnamed(path, frame)
    if frame.shape[1] and frame.columns[0] not in text_columns:
        _refuse_totals(path, frame)
    frame, numbers = _convert_numbers(path, frame, separator, text_columns)
    return CsvFile(frame, sha256, (*notes, *unnamed, *numbers))


def _first_lines(path: Path) -> list[str]:
    """Read the first lines; none of an archive."""
    if path.suffix in _ARCHIVES:
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(itertools.islice(file, _FIRST_LINES))


def _split(lines: Sequence[str], separator: str) -> list[list[str]]:
    """Split lines into cells without surrounding spaces."""
    return [[cell.strip() for cell in cells] for cells in csv.reader(lines, delimiter=separator)]


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
    rows = [(number, cells) for number, cells in enumerate(_split(lines, separator), 1) if any(cells)]
    if not rows:
        return
    usual = statistics.mode(len(cells) for _, cells in rows)
    first, header = rows[0]
    if usual > 1 and header[0] and not any(header[1:]):
        line = next((number for number, cells in rows[1:] if len(cells) == usual and all(cells)), 0)
        raise UserError(
            f"{path}, line {first} is {header[0]!r}, and line {line} looks like the header: delete the lines above it"
        )
    names = [name for name in header if name]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path}: the name {twice[0]!r} occurs twice in the header: rename one of the columns")


def _explain(path: Path, problem: Exception) -> NoReturn:
    """Raise a UserError that says why a file cannot be read."""
    if isinstance(problem, UnicodeDecodeError):
        raise UserError(f"{path} is not UTF-8 but {_guess_encoding(path)}: save it as UTF-8") from problem
    if match := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(problem)):
        expected, line, seen = map(int, match.groups())
        with path.open(encoding="utf-8-sig") as file:
            text = next(itertools.islice(file, line - 1, None), "").strip()
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
    start = path.read_bytes()[:100_000]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start:
        return "UTF-16"
    # Chinese characters are pairs of bytes of which the first is high; a letter with an accent is a single one.
    high = re.findall(rb"[\x80-\xff]+", start)
    if high and sum(len(run) == 1 for run in high) > len(high) / 2:
        return "Latin-1 (Windows-1252)"
    try:
        start[: len(start) // 2 * 2].decode("gbk")
    except UnicodeDecodeError as problem:
        # The last character may be cut off.
        return "GBK" if problem.end >= len(start) - 1 else "another encoding"
    return "GBK"


def _drop_unnamed(path: Path, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Drop columns without a name that are empty or count the rows; refuse others."""
    notes = []
    for number, name in enumerate(frame.columns, 1):
        if not re.fullmatch(r"Unnamed: \d+", name):
            continue
        values = frame[name]
        counts_up = pd.api.types.is_integer_dtype(values) and len(values) and (np.diff(values) == 1).all()
        if not counts_up and values.notna().any():
            raise UserError(f"{path}: column {number} has no name: give it one, or delete it")
        notes += [f"column {number} has no name and counts the rows: it is left out"] if counts_up else []
        frame = frame.drop(columns=name)
    return frame, notes


def _refuse_totals(path: Path, frame: pd.DataFrame) -> None:
    """Refuse a line of totals below the data."""
    if not len(frame) or not frame.shape[1] or pd.api.types.is_numeric_dtype(frame.iloc[:, 0]):
        return
    first = frame.iloc[-_LAST_ROWS:, 0]
    is_total = first.astype(str).str.strip(" :").str.lower().isin(_TOTALS).to_numpy(copy=True)
    is_filled = frame.iloc[-_LAST_ROWS:, 1:].notna().any(axis=1).to_numpy()
    looks_dated = frame.iloc[:-1, 0].notna().all() and str(frame.iloc[0, 0])[:1].isdigit()
    is_total[-1] |= bool(looks_dated and pd.isna(first.iloc[-1]))
    if (wrong := is_total & is_filled).any():
        row = frame.index[-len(first) :][wrong.argmax()]
        text = ",".join("" if pd.isna(cell) else str(cell) for cell in frame.loc[row])
        raise UserError(f"{path}, line {row + 2}: {text!r} looks like a line of totals: delete it")


def _convert_numbers(
    path: Path, frame: pd.DataFrame, separator: str, text_columns: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Convert columns of numbers with decimal commas or separated thousands."""
    changed, notes = {}, []
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
        changed[name] = pd.to_numeric(plain).reindex(frame.index)
    return frame.assign(**changed) if changed else frame, notes


def _all_match(texts: pd.Series, pattern: re.Pattern) -> bool:
    """Return whether all texts match."""
    return bool(texts.str.fullmatch(pattern).all())
