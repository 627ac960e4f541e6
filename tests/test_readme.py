"""The docs' commands, run with small substitutes, so that they cannot rot."""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import run_main
from base_models.make_tiny_llm import make_tiny_llm
from dataset.demo import demo_frame, write_demo_csv
from tests.flags_table import flags_table, split_page
from utils.cli.options import FLAGS, get_parser

pytestmark = pytest.mark.draws

ROOT = Path(__file__).resolve().parents[1]
# Each page in English with its Chinese twin, in the reader's order.
TOPICS = ("data", "reference", "running", "python", "results", "experiments", "memory", "faithful")
PAGES = {
    "README.md": "README.zh-CN.md",
    **{f"docs/{name}.md": f"docs/zh-CN/{name}.md" for name in TOPICS},
}
ALL_PAGES = (*PAGES, *PAGES.values())

# What makes a run small enough for a test. Of the documented flags those that shape it stay.
SMALL = [
    *("--max_steps", "1", "--eval_steps", "0", "--eval_windows", "7", "--test_windows", "-1", "--batch_size", "4"),
    *("--d_model", "8"),
]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return the language and the commands of each block that is to be typed into a shell."""
    found = re.findall(r"^```(shell|powershell|bash)\n(.*?)^```$", text, re.M | re.S)
    return [(language, body.splitlines()) for language, body in found]


def examples(text: str) -> list[str]:
    """Return the examples in Python."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[str]:
    """Return every command, those of the blocks and those that stand in a sentence or a table."""
    in_sentences = re.findall(r"`((?:python|pip) [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return [command for _, lines in blocks(text) for command in lines] + in_sentences


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.fixture
def house(tmp_path, tiny_llm, monkeypatch) -> Path:
    """A folder with small substitutes for all that the READMEs speak of."""
    for name, step in (("ETTh1", "h"), ("ETTh2", "h"), ("ETTm1", "15min")):
        write_demo_csv(
            tmp_path / "dataset" / f"{name}.csv", rows=20 * 30 * 24 * (4 if name == "ETTm1" else 1), step=step
        )
    dates = pd.date_range("2024-01-01", periods=2500, freq="10min").strftime("%Y-%m-%d %H:%M:%S")
    mine = demo_frame(2500).iloc[:, :4].set_axis(["date", "load", "wind", "temperature"], axis=1).assign(date=dates)
    mine.to_csv(tmp_path / "dataset" / "my.csv", index=False)
    mine.assign(load=mine["load"].where(mine.index < 2450)).to_csv(tmp_path / "dataset" / "my-weather.csv", index=False)
    note = np.where(mine.index // 36 % 3 == 0, "", np.where(mine.index % 2, "Calm.", "Gusts from the west until noon."))
    known = mine.assign(
        load=mine["load"].where(mine.index < 2450), wind=mine["wind"].where(mine.index < 2450), note=note
    )
    known.to_csv(tmp_path / "dataset" / "my-notes.csv", index=False)
    hourly = known.head(900).assign(date=pd.date_range("2024-01-01", periods=900, freq="h"))
    vic = hourly.rename(columns={"load": "demand"})[["date", "demand", "temperature"]].assign(
        holiday=hourly.index % 7 > 4
    )
    vic.to_csv(tmp_path / "dataset" / "vic.csv", index=False)
    hourly.rename(columns={"load": "humidity"}).to_csv(tmp_path / "dataset" / "weather.csv", index=False)
    series = hourly[["date", "load"]].set_axis(["ds", "y"], axis=1)
    pd.concat([series.assign(unique_id=name) for name in "ab"]).to_csv(
        tmp_path / "dataset" / "my-series.csv", index=False
    )
    mine.rename(columns={"load": "负荷"}).to_csv(tmp_path / "dataset" / "my-gbk.csv", index=False, encoding="gbk")
    shutil.copytree(tiny_llm("qwen2"), tmp_path / "base_models" / "Qwen2.5-3B")
    make_tiny_llm("llama", tmp_path / "base_models" / "SmolLM2-135M", layers=6)
    # A linear forecast of all of ETTm1 takes a second.
    monkeypatch.setattr("data_provider.windows._FITTED_WINDOWS", 500)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(command: list[str]) -> int:
    """Run run_main.py in this process."""
    assert Path(command[1]).name == "run_main.py"
    return run_main.main(command[2:])


def forecaster(words: list[str]) -> None:
    """python run_main.py ..."""
    small = [] if "--plan" in words or "--help" in words else SMALL
    enough = ["--eval_windows", "140"] if "--level" in words else []  # 20 of each of the demo's channels
    assert run_main.main([*words, *small, *enough]) == 0


def fetch(words: list[str]) -> None:
    """Only read: tests/scripts/test_fetch.py fetches."""
    importlib.import_module("scripts.fetch").get_parser().parse_args(words)


def launch(words: list[str]) -> None:
    assert importlib.import_module("scripts.launch").main([*words, "--dry_run"]) == 0


def compare(words: list[str]) -> None:
    # A way's own flags come last, and would make its run a long one again.
    words = [
        f"{word} {' '.join(SMALL)}" if before == "--way" and "=" in word else word
        for before, word in pairwise(["", *words])
    ]
    assert importlib.import_module("scripts.compare").main([*words, *SMALL, "--seeds", "1"]) == 0


def prototypes(words: list[str]) -> None:
    assert words == ["checkpoints/RUN"]
    trained = next(path.parent for path in Path("checkpoints").rglob("checkpoint") if "_TimeLLM_" in str(path))
    assert importlib.import_module("scripts.prototypes").main([str(trained)]) == 0
    assert (trained / "prototypes.png").is_file()


def benchmark(words: list[str]) -> None:
    small = ["--rounds", "1", "--root_path", "dataset", "--batch_size", "2"]
    assert importlib.import_module("scripts.benchmark").main([*words, *small]) == 0


def check_gpu(words: list[str]) -> None:
    if not torch.cuda.is_available():
        assert importlib.import_module("scripts.check_gpu").main(words) == 2


def quantize_llm(words: list[str]) -> None:
    assert importlib.import_module("scripts.quantize_llm").main(words) == 0
    forecaster(["--data", "ETTh1", "--llm_model_path", words[1], "--model_id", "quantized"])


SCRIPTS: dict[str, Callable[[list[str]], None]] = {
    "fetch": fetch,
    "compare": compare,
    "prototypes": prototypes,
    "benchmark": benchmark,
    "check_gpu": check_gpu,
    "quantize_llm": quantize_llm,
}


def execute(command: str) -> None:
    """Do what a command of the README does, in this process and small."""
    first, *words = shlex.split(command.replace("\\", "/"))
    if first == "pip":
        assert all((ROOT / words[place + 1]).is_file() for place, word in enumerate(words) if word == "-r")
    elif first.endswith((".bat", ".sh")):
        assert (ROOT / first).is_file()
        launch([Path(first).stem, *words])
    elif first in ("accelerate", "torchrun"):
        parser = get_args_parser() if first == "torchrun" else launch_command_parser()
        told = parser.parse_args(words if first == "torchrun" else words[1:])
        assert told.training_script == "run_main.py"
        forecaster(told.training_script_args)
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[0] == "-c":
        exec(words[1], {})  # the README's own line
    elif words[0] == "run_main.py":
        forecaster(words[1:])
    else:
        assert first == "python" and (ROOT / words[0]).is_file()
        SCRIPTS[Path(words[0]).stem](words[1:])


@pytest.mark.slow  # a minute
def test_every_command_works(house, monkeypatch, capsys):
    monkeypatch.setattr("scripts.compare.run_child", run_here)
    for command in dict.fromkeys(command for page in PAGES for command in commands(text_of(page))):  # each once
        try:
            execute(command)
        except AssertionError as problem:
            raise AssertionError(f"{command}\n{capsys.readouterr().err}") from problem
    (written,) = Path("checkpoints").glob("*_mine_*/forecast.csv")
    forecast = pd.read_csv(written, parse_dates=["date"])
    bounds = [f"{name}-{bound}" for name in ("load", "wind", "temperature") for bound in ("lo-80", "hi-95")]
    assert {"date", "load", "wind", "temperature", *bounds} <= set(forecast.columns)
    assert np.all(forecast["date"].diff().dropna() == pd.Timedelta("10min"))


def test_the_examples_in_python_work(house, capsys):
    """From a DataFrame to a plot and on, then the README's lines with the run that was trained."""
    names = {}
    for example in examples(text_of("docs/python.md")):
        exec(example.replace("--level 80 95", "--level 80 95 --max_steps 2 --eval_windows 90"), names)
    assert Path("forecast.png").is_file() and len(names["forecast"]) == 36
    (band,) = names["axis"].collections
    shown, drawn = names["axis"].get_xlim(), band.get_paths()[0].get_extents()
    assert shown[0] < drawn.x0 < drawn.x1 < shown[1], "the band is outside of the picture"
    (example,) = examples(text_of("README.md"))
    exec(example.replace("checkpoints/RUN", names["folder"].as_posix()), {})
    assert "2024-01-18 14:30:00" in capsys.readouterr().out


def test_the_script_that_counts_words_works(house, monkeypatch, capsys):
    """In place of an LLM, which is not loaded."""
    (script,) = examples(text_of("docs/experiments.md"))
    words = ["--csv", "dataset/weather.csv", "--features", "S", "--target", "humidity", "--notes", "note", *SMALL]
    words += ["--model", "DLinear", "--llm_model_path", "nowhere", "--seq_len", "24", "--pred_len", "6"]
    monkeypatch.setattr("sys.argv", ["counted.py", *words])
    monkeypatch.setattr("utils.llm.notes.read_notes", None)  # restored afterwards
    with pytest.raises(SystemExit) as ended:
        exec(script.replace("TruncatedSVD(300", "TruncatedSVD(3").replace("min_df=2", "min_df=1"), {})
    assert ended.value.code == 0, capsys.readouterr().err
    assert list(Path("checkpoints").glob("*/notes.csv"))


@pytest.mark.parametrize(("page", "twin"), PAGES.items())
def test_both_languages_have_the_same_commands_pictures_and_figures(page, twin):
    english, chinese = text_of(page), text_of(twin)
    assert commands(chinese) == commands(english)
    assert blocks(chinese) == blocks(english)
    assert examples(chinese) == examples(english)
    pictures = [re.findall(r"!\[[^]]*\]\((?:\.\./)*([^)]+)\)", text) for text in (english, chinese)]
    assert pictures[0] == pictures[1]
    assert len(re.findall("^## ", english, re.M)) == len(re.findall("^## ", chinese, re.M))
    numbers = [sorted(re.findall(r"\d+\.\d+", text)) for text in (english, chinese)]
    assert numbers[0] == numbers[1], "a figure differs"


def test_the_first_page_is_short_and_leads_to_the_others():
    for page, others in (("README.md", PAGES), ("README.zh-CN.md", PAGES.values())):
        text = text_of(page)
        assert len(text.encode()) < 12_000
        assert "demo-forecast.png" in text
        assert all(f"({other})" in text for other in others if other != page)


@pytest.mark.parametrize("name", ALL_PAGES)
def test_commands_of_every_shell_are_on_one_line(name):
    for language, lines in blocks(text_of(name)):
        assert language == "shell" or not any(line.startswith("python") for line in lines)
        assert not any(line.endswith(("`", "^", "\\")) for line in lines)


def test_the_table_of_flags_is_that_of_the_parser():
    """`python -m tests.flags_table` writes it anew."""
    _, english, _ = split_page(text_of("docs/reference.md"))
    _, chinese, _ = split_page(text_of("docs/zh-CN/reference.md"))
    assert english.strip() == flags_table().strip()
    rows = [re.findall(r"^\| (`--\w+`) \| (.*?) ?\| (.+) \|$", table, re.M) for table in (english, chinese)]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    assert len(rows[0]) == len(FLAGS)


@pytest.mark.parametrize("name", ALL_PAGES)
def test_nothing_is_left_to_be_filled_in(name):
    assert not re.findall("@[A-Z]+@|TODO", text_of(name))


@pytest.mark.parametrize("name", [*ALL_PAGES, "CONTRIBUTING.md"])
def test_flags_and_links_are_there(name):
    text = text_of(name)
    known = {flag for action in get_parser()._actions for flag in action.option_strings}
    known |= {*("--way", "--seeds", "--out", "--rank", "--dry_run", "--again", "--mirror", "--from_package", "--check")}
    known |= {*("--num_processes", "--cpu", "--nproc_per_node", "--nnodes", "--node_rank", "--kills", "--fuzz")}
    known |= {"--master_addr", "--master_port", "--basetemp"}
    assert not set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) - known
    for target, heading in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", text):
        page = (ROOT / name).parent / target
        assert page.exists(), target
        assert not heading or heading in anchors(page.read_text(encoding="utf-8")), f"{target}#{heading}"


@pytest.mark.skipif(sys.platform == "win32", reason="the tests' own commands are for the shells of Linux")
def test_contributing_names_what_is_there():
    text = text_of("CONTRIBUTING.md")
    for name in re.findall(r"`((?:utils|layers|models|data_provider|base_models|scripts|tests)/[\w./*-]+)`", text):
        assert list(ROOT.glob(name.replace("NAME", "*"))), name
    for name, module in (("KNOWN_LLMS", "utils.llm.choice"), ("LAYOUTS", "data_provider.series")):
        assert name in text and hasattr(importlib.import_module(module), name)
