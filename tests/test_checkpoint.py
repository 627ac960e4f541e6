import pytest
import torch

from data_provider.series import load_series
from models import build_model
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.options import get_parser


@pytest.fixture
def saved(flags, tmp_path):
    """A model, its flags and the file it is saved in."""
    args = get_parser().parse_args(flags)
    model = build_model(args)
    path = tmp_path / "checkpoint"
    save_checkpoint(path, model, args, load_series(args), {"epoch": 1, "steps": 3, "vali_loss": 0.5})
    return model, args, path


def test_a_checkpoint_holds_the_trained_tensors_alone_and_opens_without_pickle(saved):
    model, args, path = saved
    contents = torch.load(path, weights_only=True)
    assert set(contents["weights"]) == set(model.state_dict())
    assert contents["flags"]["seq_len"] == args.seq_len
    assert contents["llm"]["model_type"] == "qwen2"
    assert contents["channels"][-1] == "OT"
    assert len(contents["mean"]) == len(contents["deviation"]) == 7
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]


def test_loading_brings_the_weights_back(saved):
    model, args, path = saved
    torch.manual_seed(99)
    other = build_model(args)
    assert not torch.equal(other.mapping_layer.weight, model.mapping_layer.weight)
    assert load_checkpoint(path, other)["progress"] == {"epoch": 1, "steps": 3, "vali_loss": 0.5}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--d_model", "16"], "tokenConv.weight"),
        (["--pred_len", "9"], "output_projection"),
        (["--llm_layers", "1"], "another LLM"),
        (["--load_in_4bit"], "quantization"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, flags, more, words):
    _, _, path = saved
    with pytest.raises(UserError, match=words):
        load_checkpoint(path, build_model(get_parser().parse_args([*flags, *more])))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_foreign_files_are_refused_and_never_run(saved, tmp_path):
    model, _, path = saved
    whole = path.read_bytes()
    torch.save({"format": 1, "weights": Bomb(tmp_path / "ran")}, tmp_path / "bomb")
    torch.save({"weights": {}}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("bomb", "other", "list", "cut", "text", "empty"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name, model)
    assert not (tmp_path / "ran").exists()
