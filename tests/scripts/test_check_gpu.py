import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from scripts import check_gpu

FOUND = {
    "memory": {"limit": 5.0, "planned": 3.5, "peak": 3.77, "loading": 3.1, "reserved": 4.0, "waits": 0}
    | {"steps_per_second": 3.6, "evaluation_windows_per_second": 78.5, "last_loss": 0.5},
    "recomputed": {"error": "torch.OutOfMemoryError: CUDA out of memory"},
    "nf4": {
        "variants": [
            {"variant": "compact map", "step_seconds": 0.1, "step_ratio": 1.5, "windows_per_second": 200.0}
            | {"evaluation_ratio": 1.2, "peak_bytes": 4.4e8}
        ]
    },
    "tests": {"exit_code": 0, "summary": ["2 passed in 9.0s"]},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_needs_a_gpu(capsys):
    assert check_gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: there is no GPU")


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(check_gpu, "is_gpu", lambda device: True)
    monkeypatch.setattr(check_gpu, "_prepare_llm", lambda *_: "made")
    monkeypatch.setattr(
        check_gpu, "_in_own_process", lambda part, flags: asked.append(flags) or FOUND.get(part, FOUND["memory"])
    )
    assert check_gpu.main(["--json", str(tmp_path / "gpu.json"), "--batch_size", "4"]) == 1
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert tuple(results) == check_gpu.PARTS
    assert all(flags[-4:] == ["--batch_size", "4", "--llm_model_path", "made"] for flags in asked)
    out = capsys.readouterr().out
    assert "| memory | 5 GiB | 3.50 GiB | 3.77 GiB | 3.10 GiB | 0 | 3.60 | 78.5 |" in out
    assert "| nf4 | compact map | 0.100 | 1.50x | 200.0 | 1.20x | 440 |" in out
    assert "2 passed in 9.0s" in out
    assert "recomputed: torch.OutOfMemoryError: CUDA out of memory" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_a_process_says_last_is_its_error():
    found = check_gpu._in_own_process("memory", [])
    assert found["error"].startswith("error: there is no GPU") and found["seconds"] > 0


def test_a_config_without_weights_gets_random_ones(tiny_llm, tmp_path):
    config_only = tmp_path / "config only"
    shutil.copytree(tiny_llm("qwen2"), config_only, ignore=shutil.ignore_patterns("*.safetensors"))
    made = check_gpu._prepare_llm(str(config_only), tmp_path / "made", torch.device("cpu"))
    assert AutoModel.from_pretrained(made).config.hidden_size == 64
    assert (
        AutoTokenizer.from_pretrained(made)("1.5").input_ids
        == AutoTokenizer.from_pretrained(config_only)("1.5").input_ids
    )
    whole = tiny_llm("qwen2")
    assert check_gpu._prepare_llm(whole, tmp_path / "unused", torch.device("cpu")) == whole
    assert not Path(tmp_path / "unused").exists()
