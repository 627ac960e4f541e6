import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from base_models.make_tiny_llm import FAMILIES, make_tiny_llm
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_small_real_and_the_same_every_time(tiny_llm, tmp_path, family):
    folder = Path(tiny_llm(family))
    again = make_tiny_llm(family, tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 600_000
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "Größe -3.14159, lags [0, 1, 95]"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in token)]
    assert all(len(token) == 1 for token in digits)
    assert model(torch.tensor([ids])).last_hidden_state.shape == (1, len(ids), 64)


def test_special_tokens_stand_where_the_family_puts_them(tiny_llm):
    around = {"qwen2": ([], []), "gpt2": ([], []), "llama": (["<s>"], []), "bert": (["[CLS]"], ["[SEP]"])}
    for family, (before, after) in around.items():
        tokenizer = AutoTokenizer.from_pretrained(tiny_llm(family))
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)
        assert tokens == [*before, "a", *after]


def test_a_folder_of_another_recipe_is_made_anew(tmp_path):
    make_tiny_llm("qwen2", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    make_tiny_llm("qwen2", tmp_path, seed=1, layers=1)
    assert torch.equal(torch.rand(1), drawn), "it must leave the caller's random numbers alone"
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 1


def test_another_llm_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="another LLM"):
        make_tiny_llm("qwen2", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "base_models.make_tiny_llm", "gpt2", str(tmp_path / "tiny gpt2")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(tmp_path / "tiny gpt2")
    assert "shards" not in done.stderr
    assert (tmp_path / "tiny gpt2" / "model.safetensors").is_file()
