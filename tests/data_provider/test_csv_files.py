"""Files of cells as spreadsheets and pandas write them."""

import gzip

import numpy as np
import pandas as pd
import pytest

from data_provider.csv_files import read_csv
from utils.errors import UserError

PLAIN = "date,a,text\n2024-01-01,1.5,x\n2024-01-02,,y\n2024-01-03,-3,\n"


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a text to a file and reads it."""

    def read_text(text, *more, encoding="utf-8"):
        (tmp_path / "x.csv").write_bytes(text.encode(encoding))
        return read_csv(tmp_path / "x.csv", *more)

    return read_text


def test_a_plain_file_is_read_as_by_pandas(read, tmp_path):
    file = read(PLAIN)
    pd.testing.assert_frame_equal(file.frame, pd.read_csv(tmp_path / "x.csv"))
    assert file.notes == () and len(file.sha256) == 64


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators(read, separator, name):
    file = read(PLAIN.replace(",", separator))
    pd.testing.assert_frame_equal(file.frame, read(PLAIN).frame)
    assert file.notes == (f"cells are separated by {name}",)


@pytest.mark.parametrize(
    ("cells", "separator", "numbers"),
    [
        (["1,5", "-2,25", "3"], ";", [1.5, -2.25, 3]),
        (["1.234,5", "-2,25", "12.345.678"], ";", [1234.5, -2.25, 12345678]),
        (["0,567", "1,234"], ";", [0.567, 1.234]),
        (["1,234.5", "7"], ";", [1234.5, 7]),
        (['"1,234"', '"12,345"', "7"], ",", [1234, 12345, 7]),
        (['"1,5"', '"2,5"'], ",", [1.5, 2.5]),
    ],
)
def test_commas_in_numbers(read, cells, separator, numbers):
    file = read("date" + separator + "a\n" + "".join(f"2024-01-01{separator}{cell}\n" for cell in cells))
    assert file.frame["a"].tolist() == numbers and "commas in column 'a'" in file.notes[-1]


def test_texts_stay_texts(read):
    frame = read("id;date;a\n007;31.12.2020;x, y\n1,5;01.01.2021;1,5\n", [], ["id"]).frame
    assert frame.to_numpy().tolist() == [["007", "31.12.2020", "x, y"], ["1,5", "01.01.2021", "1,5"]]


def test_marks_of_missing_values(read):
    frame = read("date,a,b\n2024-01-01,-,-999\n2024-01-02,2,-999.0\n2024-01-03,3,7\n", ["-", "-999"]).frame
    np.testing.assert_array_equal(frame["a"], [np.nan, 2, 3])
    np.testing.assert_array_equal(frame["b"], [np.nan, np.nan, 7])
    frame = read("date;a\n01.01.2024;1,5\n02.01.2024;-999,00\n", ["-999"]).frame
    np.testing.assert_array_equal(frame["a"], [1.5, np.nan])


@pytest.mark.parametrize("above", ["", "\n"])
def test_spaces_around_names(read, above):
    file = read(f"{above}unique_id ,ds, y\n007,2024-01-01,1\n", [], ["unique_id"])
    assert file.frame.columns.tolist() == ["unique_id", "ds", "y"] and file.frame["unique_id"].tolist() == ["007"]
    assert file.notes == ("spaces around column names are left out: 'unique_id', 'y'",)


def test_long_cells(read):
    assert read(f'date,note\n2024-01-01,"{"x" * 200_000}"\n').frame["note"].str.len().tolist() == [200_000]


def test_columns_without_a_name(read):
    file = read(",date,a\n0,2024-01-01,1\n1,2024-01-02,2\n")
    assert file.frame.columns.tolist() == ["date", "a"] and "column 1 has no name and counts" in file.notes[0]
    file = read("date, a ,\n2024-01-01,1,\n2024-01-02,2,\n")
    assert file.frame.columns.tolist() == ["date", "a"] and file.notes == (
        "spaces around column names are left out: 'a'",
    )
    file = read("date, ,  ,a,\n2024-01-01,,,2,\n")
    assert file.frame.columns.tolist() == ["date", "a"] and file.notes == ()
    assert read("date,,\n2024-01-01,,\n2024-01-02,,\n").frame.columns.tolist() == ["date"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("date,a,\n2024-01-01,1,5\n2024-01-02,2,9\n", "column 3 has no name"),
        ("date,a, a\n2024-01-01,1,5\n", "the name 'a' occurs twice"),
        ("Sales\n\ndate,a\n2024-01-01,1\n2024-01-02,1\n", "line 1 is 'Sales', and line 3 looks like the header"),
        ("Sales,\ndate,a\n2024-01-01,1\n2024-01-02,1\n", "line 1 is 'Sales', and line 2 looks like the header"),
        ("Sales, 2024\nA\n\ndate,a,b\n2024-01-01,1,2\n2024-01-02,1,2\n", "line 1 is 'Sales,2024', and line 4 looks"),
        (",,\ndate,a,b\n2024-01-01,1,2\n2024-01-02,1,2\n", "line 1 is ',,', and line 2 looks like the header"),
        ("date;t;a\n2024-01-01;'';1\n\n2024-01-02;\"x\ny\";2\nTotal;;3\n", "line 6: 'Total;;3' looks like"),
        (",date,a\n0,2024-01-01,1\n1,2024-01-02,2\n,Total,3\n", "line 4: ',Total,3' looks like a line of totals"),
        (",date,a\n0,2024-01-01,1\n1,2024-01-02,2\n2,Total,3\n", "line 4: 'Total,3' looks like a line of totals"),
        ('date,a\n2024-01-01,"x\ny"\n\n2024-01-02,1,7\n', "line 5, '2024-01-02,1,7', has 3 cells, but the header 2"),
        ("a,b\n0,1,7\n1,1,7\n", "more cells than its header, line 2 first, '0,1,7'"),
        ("sales\n1,5\n2,5\n", "more cells than its header, line 2 first, '1,5'"),
        ("date,a\n2024-01-01,1\nTotal:,1\n", "line 3: 'Total:,1' looks like a line of totals"),
        ("date,a\n2024-01-01,1\n2024-01-02,1\n,2\n", "line 4: ',2' looks like a line of totals"),
        ("date,a\n2024-01-01,1\n2024-01-02,1,7\n", "line 3, '2024-01-02,1,7', has 3 cells, but the header 2"),
        ("date,a\n2024-01-01,1,7\n2024-01-02,1,7\n", "more cells than its header, line 2 first, '2024-01-01,1,7'"),
        ("date;a\n2024-01-01;1,234\n2024-01-02;5,678\n", "'1,234' may be 1.234 or 1234"),
    ],
)
def test_what_would_be_a_guess_is_named(read, text, words):
    with pytest.raises(UserError) as refused:
        read(text)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("date,größe,é\n2024-01-01,1,ä\n", "latin-1", "Latin-1"),
        ("date,a,t\n" + "2024-01-01,1,x\n" * 10_000 + "2024-01-01,1,café\n", "cp1252", "Latin-1"),
        ("日期,温度计\n", "gbk", "GBK"),
        (PLAIN, "utf-16", "UTF-16"),
    ],
)
def test_other_encodings_are_named(read, text, encoding, name):
    with pytest.raises(UserError, match=f"is not UTF-8 but {name}"):
        read(text, encoding=encoding)


def test_archives(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.encode()))
    pd.testing.assert_frame_equal(read_csv(path).frame, pd.read_csv(path))
    for content, words in (
        (PLAIN.encode() + b"2024-01-04,1,x,7\n", "Expected 3 fields in line 5, saw 4"),
        ("date,größe\n".encode("latin-1"), "not UTF-8 but another encoding"),
    ):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=words):
            read_csv(path)


def test_rows_to_forecast_are_no_totals(read):
    assert len(read("a,date\n1,2024-01-01\n2,2024-01-02\n,2024-01-03\n").frame) == 3
    assert len(read("date,a,b\n2024-01-01,1,2\n2024-01-02,,3\n2024-01-03,,\n").frame) == 3
    assert len(read("unique_id,ds,y\nMean,2024-01-01,\nTotal,2024-01-01,\n", [], ["unique_id"]).frame) == 2
