import json
import os

import pytest

from scripts.quantize_llm import main


@pytest.fixture(scope="module")
def quantized(tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4") / "tiny"
    assert main([tiny_llm("qwen2"), str(folder)]) == 0
    return folder


def test_quantized_once_is_as_quantized_at_every_start(run, flags, quantized):
    first = run(*flags, "--load_in_4bit")
    mse = first.metrics()["mse"]
    capsized = run(*flags, "--llm_model_path", quantized, "--des", "once")
    assert "LLM: qwen2, 2 of 2 layers, hidden size 64, NF4, computing in float32" in capsized.out
    for folder in capsized.folders:
        assert json.loads((folder / "metrics.json").read_text())["mse"] == mse


def test_a_checkpoint_of_one_way_loads_in_the_other(run, flags, quantized):
    trained = run(*flags, "--load_in_4bit")
    again = run(*flags, "--llm_model_path", quantized, "--is_training", "0")
    assert again.code == 0
    assert again.metrics()["mse"] == json.loads((trained.folder / "metrics.json").read_text())["mse"]


def test_fewer_layers_of_a_quantized_llm(run, flags, quantized):
    done = run(*flags, "--llm_model_path", quantized, "--llm_layers", "1")
    assert "LLM: qwen2, 1 of 2 layers, hidden size 64, NF4" in done.out
    assert done.metrics()["mse"] == run(*flags, "--load_in_4bit", "--llm_layers", "1").metrics()["mse"]


def test_it_computes_in_the_precision_asked_for(run, flags, quantized):
    assert "NF4, computing in bfloat16" in run(*flags, "--llm_model_path", quantized, "--llm_dtype", "bfloat16").out


def test_wrong_input_is_refused(quantized, tiny_llm, tmp_path, capsys):
    for source, target, words in (
        (tiny_llm("qwen2"), quantized, "already exists"),
        (str(quantized), tmp_path / "twice", "already quantized"),
        (str(tmp_path), tmp_path / "nothing", "cannot load"),
    ):
        assert main([source, str(target)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege under Windows")
def test_a_planted_link_is_not_written_through(tiny_llm, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "nf4.unfinished").symlink_to(tmp_path / "precious")
    assert main([tiny_llm("qwen2"), str(tmp_path / "nf4")]) == 0
    assert (tmp_path / "nf4" / "config.json").exists() and not list((tmp_path / "precious").iterdir())
