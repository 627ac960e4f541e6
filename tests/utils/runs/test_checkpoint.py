import shutil

import pytest
import safetensors.torch
import torch

from base_models.make_tiny_llm import make_tiny_llm
from data_provider.data_factory import load_series
from models import build
from utils.cli.options import get_parser
from utils.errors import UserError
from utils.runs.checkpoint import Run, read_checkpoint, save_checkpoint
from utils.runs.compatibility import load_checkpoint


def save(model, args, folder, name="run"):
    (folder / name).mkdir()
    run = Run(folder / name, vars(args), load_series(args).facts())
    save_checkpoint(run, model, {"epoch": 1, "steps": 3, "vali_loss": 0.5})
    return folder / name / "checkpoint"


def load(path, model, args):
    saved = read_checkpoint(path)
    load_checkpoint(saved, model, vars(args), load_series(args).facts())
    return saved.contents


@pytest.fixture
def saved(flags, tmp_path):
    """A model, its flags and the file it is saved in."""
    args = get_parser().parse_args(flags)
    model = build(args)
    return model, args, save(model, args, tmp_path)


def test_a_checkpoint_holds_no_weight_of_the_llm_and_opens_without_pickle(saved):
    model, args, path = saved
    contents = torch.load(path, weights_only=True)
    assert set(contents["weights"]) == set(model.state_dict())
    assert contents["flags"]["seq_len"] == args.seq_len
    assert contents["llm"]["model_type"] == "qwen2"
    assert contents["channels"][-1] == "OT"
    scaler = load_series(args).scaler
    assert contents["mean"] == scaler.mean_.tolist()
    assert contents["deviation"] == scaler.scale_.tolist()
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]


def test_loading_brings_the_weights_back(saved):
    model, args, path = saved
    torch.manual_seed(99)
    other = build(args)
    assert not torch.equal(other.mapping_layer.weight, model.mapping_layer.weight)
    assert load(path, other, args)["progress"] == {
        "epoch": 1,
        "steps": 3,
        "vali_loss": 0.5,
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--d_model", "16"], "tokenConv.weight"),
        (["--pred_len", "9"], "--pred_len 8, not 9"),
        (["--stride", "7"], "--stride 8, not 7"),
        (["--mapping", "full"], "--mapping compact, not full"),
        (["--llm_layers", "1"], "another LLM"),
        (["--load_in_4bit"], "quantization"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, flags, more, words):
    _, _, path = saved
    args = get_parser().parse_args([*flags, *more])
    with pytest.raises(UserError, match=words):
        load(path, build(args), args)


def test_a_checkpoint_of_another_llm_of_the_same_shape_is_refused(saved, flags, tmp_path):
    _, _, path = saved
    other = make_tiny_llm("qwen2", tmp_path / "other", seed=1)
    args = get_parser().parse_args([*flags, "--llm_model_path", str(other)])
    with pytest.raises(UserError, match="embedding_hash"):
        load(path, build(args), args)


def with_other_layers(folder, to):
    """Copy an LLM and draw the matrices of its layers anew; its words, and all sizes, stay."""
    shutil.copytree(folder, to)
    tensors = safetensors.torch.load((to / "model.safetensors").read_bytes())
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name:
            tensors[name] = (tensor.float().std() * torch.randn(tensor.shape, generator=generator)).half()
    safetensors.torch.save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize("more", [[], ["--llm_dtype", "bfloat16"], ["--load_in_4bit"]], ids=" ".join)
def test_an_llm_that_keeps_its_words_and_does_something_else_is_refused(flags, tiny_llm, tmp_path, more):
    args = get_parser().parse_args([*flags, *more])
    path = save(build(args), args, tmp_path)
    other = with_other_layers(tiny_llm("qwen2"), tmp_path / "other")
    args = get_parser().parse_args([*flags, *more, "--llm_model_path", other])
    with pytest.raises(UserError, match=r"another LLM \(its hidden states differ by"):
        load(path, build(args), args)


@pytest.mark.parametrize("quantization", [[], ["--load_in_4bit"]], ids=" ".join)
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "bert"])
def test_the_same_llm_in_another_precision_is_not(flags, tiny_llm, tmp_path, family, quantization):
    flags = [*flags, "--llm_model_path", tiny_llm(family), *quantization]
    for number, dtype in enumerate(("float32", "bfloat16", "float16")):
        args = get_parser().parse_args([*flags, "--llm_dtype", dtype])
        path = save(build(args), args, tmp_path, f"run{number}")
        for other in ("float32", "bfloat16", "float16"):
            args = get_parser().parse_args([*flags, "--llm_dtype", other])
            load(path, build(args), args)


def test_a_checkpoint_of_an_earlier_version_loads(saved):
    model, args, path = saved
    contents = torch.load(path, weights_only=True)
    del contents["weights"]["mapping_layer.basis"], contents["flags"]["mapping_rate"]
    del contents["llm"]["tokenizer_hash"], contents["llm"]["folder"], contents["description"]
    for name in ("llm_probe", "llm_config", "llm_embeddings", "training_hashes", "validation_hashes", "trained_rows"):
        del contents[name]
    torch.save(contents, path)
    torch.manual_seed(99)
    other = build(args)
    load(path, other, args)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_flags_that_change_forecasts_are_said(saved, flags, capsys):
    model, _, path = saved
    args = get_parser().parse_args([*flags, "--prompt_padding", "right", "--content", "Other."])
    load(path, model, args)
    said = capsys.readouterr().out
    assert "trained with --prompt_padding left, not right" in said
    assert "trained with --content Demo.  , not Other." in said


def test_other_data_is_said_unless_asked_for(saved, flags, csv_folder, tmp_path, capsys):
    model, args, path = saved
    rows = (csv_folder / "small.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.csv").write_text("\n".join(rows[:-9]) + "\n", encoding="utf-8")
    other = get_parser().parse_args([*flags, "--root_path", str(tmp_path), "--data_path", "other.csv"])
    for args.checkpoint, said in (("", True), (str(tmp_path), False)):
        other.checkpoint = args.checkpoint
        load(path, model, other)
        assert ("trained on other data: the mean" in capsys.readouterr().out) == said


def test_a_write_that_fails_leaves_the_checkpoint_whole(saved, monkeypatch):
    model, args, path = saved
    before = path.read_bytes()

    def cut_off(contents, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint: disk full"):
        save_checkpoint(Run(path.parent, vars(args), load_series(args).facts()), model, {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_foreign_files_are_refused_and_never_run(saved, tmp_path):
    model, args, path = saved
    whole = path.read_bytes()
    torch.save({"format": 1, "weights": Bomb(tmp_path / "ran")}, tmp_path / "bomb")
    torch.save({"weights": {}}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("bomb", "other", "list", "cut", "text", "empty"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name, model, args)
    assert not (tmp_path / "ran").exists()
