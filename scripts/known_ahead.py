"""Make two data sets of what is known in advance from files of public repositories.

vic.csv is electricity demand with temperature and public holidays. weather.csv is hourly weather with a note in words
for each six hours: a language model wrote it from reports of the weather that came, a forecast that is never wrong.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

GITHUB = "https://raw.githubusercontent.com"
STANDARD_TIME = pd.Timedelta(hours=10)  # of Victoria, ahead of UTC


class DataSet(NamedTuple):
    """A CSV made from files of a repository (bytes and SHA-256 of each), and the flags that forecast it."""

    address: str
    files: dict[str, tuple[int, str]]
    make: Callable[[Path], pd.DataFrame]
    columns: tuple[str, ...]
    flags: str

    def make_csv(self, folder: Path) -> str:
        """Make the CSV, as text, from the downloaded files in a folder."""
        frame = self.make(folder)[list(self.columns)]
        return frame.to_csv(index_label="date", date_format="%Y-%m-%d %H:%M:%S", lineterminator="\n")

    def has_header_of(self, path: Path) -> bool:
        """Return whether the first line of a file on the disk is that of this CSV."""
        header = ",".join(("date", *self.columns)).encode()
        with path.open("rb") as file:
            return file.readline(len(header) + 2).rstrip(b"\r\n") == header


def make_vic(folder: Path) -> pd.DataFrame:
    """Average the half-hourly demand (MW) and temperature (degrees Celsius) of Victoria over each hour."""
    readings = pd.read_csv(folder / "vic_electricity.csv")
    # Standard time all year round: with daylight saving time, one hour a year is missing and another occurs twice.
    local = pd.to_datetime(readings["Time"], utc=True).dt.tz_localize(None) + STANDARD_TIME
    columns = {"demand": "Demand", "temperature": "Temperature", "holiday": "Holiday"}
    hours = readings[list(columns.values())].set_axis(list(columns), axis=1).groupby(local.dt.floor("h"))
    means = hours.agg({"demand": "mean", "temperature": "mean", "holiday": "max"}).astype({"holiday": int})
    return means.round(2).iloc[1:]  # the first hour is the last one of 2011


def make_weather(folder: Path) -> pd.DataFrame:
    """Average the readings of Jena over each hour, interpolate missing hours, and add the note of each six hours."""
    paths = sorted(folder.glob("hourly_weather_raw_*.csv"))
    readings = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    hours = pd.to_datetime(readings["time"].astype(str), format="%Y%m%d%H%M").dt.floor("h")
    numbers = {
        # Cells hold a number and its unit. "No wind" counts as missing, as in the CSV that the published errors are of.
        name: readings[column].str.extract(r"(-?\d+)", expand=False).astype(float)
        for name, column in (("temperature", "temp"), ("humidity", "humidity"), ("wind", "wind_speed"))
    }
    means = pd.DataFrame(numbers).groupby(hours).mean().asfreq("h").interpolate().round(2)
    return means.assign(note=means.index.floor("6h").map(_read_notes(folder)))


def _read_notes(folder: Path) -> dict[pd.Timestamp, str]:
    """Read the note of each six hours: a list of hashes stands for its sentences."""
    dates = json.loads((folder / "wm_messages_v1.json").read_text(encoding="utf-8"))
    hashes = json.loads((folder / "hashtable.json").read_text(encoding="utf-8"))
    sentences = {digest: sentence.strip() for sentence, digest in hashes.items()}
    # One hash, at the end of some notes, is not in the table: that of the empty sentence.
    return {
        pd.to_datetime(date, format="%Y%m%d%H%M"): " ".join(sentences.get(digest, "") for digest in digests)
        for date, digests in dates.items()
    }


DATA_SETS = {
    "vic": DataSet(
        f"{GITHUB}/skforecast/skforecast-datasets/f8c3d7fe5ec41ef86f93e969c31ec4b469b7c949",
        {
            "data/vic_electricity.csv": (2870159, "6fa81bc3552f8822e984900f727584b82b3f10f41d78a1a0cdda2879a29a122e"),
        },
        make_vic,
        ("demand", "temperature", "holiday"),
        "--features S --target demand --covariates temperature,holiday",
    ),
    "weather": DataSet(
        f"{GITHUB}/VEWOXIC/Weather-Captioned/6d94d06000dcc429b18a27cfe775e00992cda516",
        {
            "raw_data/weather_report/hourly_weather_raw_2014.csv": (
                1724063,
                "817906d42cddbaf5262e8fd2bf9293b06a06a51ae92fffd69bf0f3c268e124c7",
            ),
            "raw_data/weather_report/hourly_weather_raw_2015.csv": (
                1720294,
                "ad682a3c1579677294eef67f428e74bcb5c7bfe04e871d70026be82928386787",
            ),
            "raw_data/weather_report/hourly_weather_raw_2016.csv": (
                1742627,
                "d27cbeafac7d3c012a0b4739776548bdfb5a122a80991d442721d34c8af0c62a",
            ),
            "date2hash/wm_messages_v1.json": (
                845878,
                "1a9b2201f1c10ceaf86041745dc0e0c2eb6a73a2d0a8001a4e45f4e3cf321f45",
            ),
            "hash2text/hashtable.json": (3148814, "7eefd9a8fb3ca756ab43937781bbe1651c61b1767273d935b074544806b6dc76"),
        },
        make_weather,
        ("temperature", "humidity", "wind", "note"),
        "--features S --target temperature --notes note",
    ),
}
