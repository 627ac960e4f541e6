import ast
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModel, AutoTokenizer, ElectraConfig, T5Config, ViTConfig

from layers.FrozenLLM import FrozenLLM
from tests.conftest import largest_difference
from utils.cli.options import get_parser
from utils.errors import UserError
from utils.llm import loading as llm_module
from utils.llm.choice import KNOWN_LLMS, LLMFlags, choose_dtype
from utils.llm.loading import load_llm


def options(*argv):
    return LLMFlags.of(get_parser().parse_args(["--data", "ETTh1", *map(str, argv)]))


def load(folder, *argv):
    return load_llm(options("--llm_model_path", folder, *argv))


def test_known_names_are_hub_ids_until_the_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [options("--llm_model", name).choose_source() for name in KNOWN_LLMS] == [
        ("huggyllama/llama-7b", 6),
        ("openai-community/gpt2", 6),
        ("google-bert/bert-base-uncased", 6),
        ("Qwen/Qwen2.5-3B-Instruct", None),
    ]
    (tmp_path / "base_models" / "gpt2").mkdir(parents=True)
    assert options("--llm_model", "GPT2").choose_source() == (str(Path("base_models", "gpt2")), 6)
    assert options("--llm_model", "GPT2", "--llm_model_path", "x/y").choose_source() == ("x/y", None)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "bert"])
def test_first_layers_are_those_of_the_whole_model(tiny_llm, family):
    whole, cut = load(tiny_llm(family)), load(tiny_llm(family), "--llm_layers", "1")
    assert (whole.identity.layers, cut.identity.layers, cut.total_layers) == (2, 1, 2)
    assert f"{family}, 1 of 2 layers" in cut.describe()
    ids = torch.arange(20, 30)[None]
    hidden = whole.backbone(ids, output_hidden_states=True).hidden_states[1]
    captured = cut.backbone(ids, output_hidden_states=True).hidden_states[-1]
    if family in ("qwen2", "llama"):
        hidden = whole.backbone.norm(hidden)
    elif family == "gpt2":
        hidden = whole.backbone.ln_f(hidden)
    torch.testing.assert_close(captured, hidden)


def test_nothing_of_the_llm_is_trainable(tiny_llm):
    loaded = load(tiny_llm("qwen2"))
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    assert not loaded.backbone.training
    assert loaded.backbone.dtype == torch.float32


def test_dtype_is_as_asked_or_as_the_device_has_it(tiny_llm):
    assert load(tiny_llm("qwen2"), "--llm_dtype", "bfloat16").backbone.dtype == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_it_says_what_it_loads(tiny_llm, capsys):
    load(tiny_llm("qwen2"))
    assert capsys.readouterr().out == f"Loading generic model from: {tiny_llm('qwen2')}\n"
    load(tiny_llm("qwen2"), "--load_in_4bit")
    assert capsys.readouterr().out.endswith("Enabling 4-bit quantization...\n")


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "bert"])
def test_4bit_weights_are_nf4_close_to_the_original(tiny_llm, family):
    whole, packed = load(tiny_llm(family)), load(tiny_llm(family), "--load_in_4bit")
    weights = [m.weight for m in packed.backbone.modules() if type(m).__name__ == "Linear4bit"]
    assert weights
    assert all(weight.quant_state.quant_type == "nf4" and weight.quant_state.nested for weight in weights)
    assert packed.backbone.num_parameters() == whole.backbone.num_parameters()
    ids = torch.arange(20, 50)[None]
    difference = largest_difference(packed.backbone(ids).last_hidden_state, whole.backbone(ids).last_hidden_state)
    assert 1e-4 < difference < 0.5


def test_4bit_gradients_are_right_after_an_evaluation(tiny_llm):
    prompts = [list(range(30, 50)), list(range(31, 45))]
    llm = FrozenLLM(load(tiny_llm("qwen2"), "--load_in_4bit").backbone, "left", 0, prompts, 5, torch.device("cpu"))

    start = torch.linspace(-1, 1, 2 * 5 * 64).reshape(2, 5, 64)

    def gradient():
        patches = start.clone().requires_grad_()
        llm(prompts, patches)[..., :32].square().sum().backward()
        return patches.grad

    before = gradient()
    with torch.no_grad():
        llm(prompts, torch.ones(2, 5, 64))
    torch.testing.assert_close(gradient(), before)
    # And right in themselves: the same slope as by taking a small step.
    step = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        up, down = (llm(prompts, start + sign * 1e-3 * step)[..., :32].double().square().sum() for sign in (1, -1))
    assert (before * step).sum().item() == pytest.approx((up - down).item() / 2e-3, rel=1e-2)


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def test_wrong_sizes_name_the_right_ones(assert_refused, flags):
    assert_refused([*flags, "--llm_dim", "768"], "--llm_dim 768", "give 64")
    assert_refused([*flags, "--llm_layers", "3"], "--llm_layers 3", "at most 2")
    assert_refused([*flags, "--d_ff", "65"], "--d_ff 65", "at most 64")


def test_a_hub_id_out_of_reach_gets_one_line(assert_refused, flags):
    assert_refused([*flags, "--llm_model_path", "nobody/nothing"], "nobody/nothing", "--llm_model_path")


def test_damaged_folders_are_refused(assert_refused, flags, tiny_llm, tmp_path_factory):
    for number, (damage, word) in enumerate(
        [
            (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100), "cannot load"),
            (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
            (lambda folder: (folder / "config.json").unlink(), "config.json"),
            (drop_a_weight, "lacks 1 weights"),
            (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
            (lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"), "cannot load"),
            (lambda folder: edit_config(folder, num_hidden_layers=3), "cannot load"),
            (lambda folder: edit_config(folder, hidden_act="none"), "cannot load"),
            (lambda folder: edit_config(folder, hidden_size="64"), "cannot load"),
        ]
    ):
        folder = copy_of(tiny_llm("qwen2"), tmp_path_factory.mktemp("damaged") / str(number))
        damage(folder)
        assert_refused([*flags, "--llm_model_path", folder], str(folder), word)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def drop_a_weight(folder):
    # As bytes: Windows lets nobody write to a file that is mapped into memory.
    weights = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    weights.pop("layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_encoder_decoder_is_refused(tmp_path):
    T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        load(tmp_path)


def test_models_that_do_not_fit_are_refused(tmp_path, tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm("qwen2"))
    configs = {
        "no vocab_size": ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        "embeddings of width": ElectraConfig(
            vocab_size=600, embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    }
    for word, config in configs.items():
        folder = tmp_path / word
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=word):
            load(folder)


def test_right_padding_uses_the_end_of_text_else_a_pad_token(tiny_llm):
    for family, token in (("qwen2", "<|endoftext|>"), ("llama", "</s>"), ("bert", "[PAD]")):
        loaded = load(tiny_llm(family), "--prompt_padding", "right")
        assert loaded.pad_id == loaded.tokenizer.convert_tokens_to_ids(token)


def test_no_foreign_code_is_ever_run(tiny_llm, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    folder = copy_of(tiny_llm("qwen2"), tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "foreign"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(UserError, match="code of its own, which is never run"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    # Where the model is known, code of its own is left alone, its tokenizer's, too.
    config["model_type"] = "qwen2"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    load(folder)
    own_tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own_tokenizer), encoding="utf-8")
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_config_names_no_kernels(tiny_llm, tmp_path):
    """With the package kernels, transformers would fetch them from the Hub and run them."""
    folder = copy_of(tiny_llm("qwen2"), tmp_path / "kernels")
    edit_config(folder, attn_implementation="nobody/kernels")
    assert load(folder).backbone.config._attn_implementation == "sdpa"


def test_every_loading_says_that_no_code_is_run():
    root = Path(llm_module.__file__).parents[2]
    folders = [root / name for name in ("layers", "models", "scripts", "utils")]
    for path in [*(root / "base_models").glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("from_pretrained", "from_config"):
                names = [keyword.arg for keyword in call.keywords]
                assert "trust_remote_code" in names or None in names, f"{path}:{call.lineno}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16 anyway")
@pytest.mark.parametrize(
    ("has_amx", "more", "is_told"),
    [
        (True, [], True),
        (False, [], False),
        (True, ["--llm_dtype", "float32"], False),
        (True, ["--ablation", "no_llm"], False),
    ],
)
def test_a_cpu_that_is_faster_in_bfloat16_is_told(run, flags, monkeypatch, has_amx, more, is_told):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    done = run(*flags, "--max_steps", "1", *more)
    assert done.code == 0
    assert ("--llm_dtype bfloat16 takes it" in done.out) == is_told
