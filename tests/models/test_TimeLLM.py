import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import build
from models.TimeLLM import Model
from tests.conftest import SHARED, largest_difference, needs_shared
from utils.cli.options import get_parser

GOLDEN = ("qwen2_ETTh1", "gpt2_ETTm1", "bert_ETTh2")
MODES = {"right": "right_padded", "left": "alone"}


def load_golden(name, padding, *more):
    """A model with the original's weights, and what the original made of them.

    It is told the original's own token ids: the last digits of the original's prompts are its CPU's.
    """
    folder = SHARED / "golden" / name
    facts = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    flags = dict(facts["flags"])
    argv = ["--llm_model_path", str(SHARED / "golden" / "llm" / flags.pop("llm")), "--prompt_padding", padding]
    argv += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    model = Model(get_parser().parse_args([*argv, *more]))
    model.load_state_dict(load_file(folder / "trainable.safetensors"))
    windows = dict(np.load(folder / "eval.npz"))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    tokens = {window.tobytes(): ids for window, ids in zip(windows["x"], prompts["tokens"], strict=True)}
    model.tokenize = lambda rows: [tokens[row.numpy().tobytes()] for row in rows]
    return model, windows, prompts, facts, MODES[padding]


@pytest.fixture(params=[(name, padding) for name in GOLDEN for padding in MODES], ids="-".join)
def golden(request):
    return load_golden(*request.param, "--mapping", "full")


@needs_shared("golden")
def test_token_ids_of_the_same_text_equal_those_of_time_llm(golden, monkeypatch):
    model, windows, prompts, *_ = golden
    monkeypatch.setattr(model.prompts, "texts", lambda rows: prompts["prompts"])
    assert model.prompts(torch.tensor(windows["x"][..., 0])) == prompts["tokens"]


@needs_shared("golden")
def test_forecasts_and_prototypes_equal_those_of_time_llm(golden):
    model, windows, _, _, mode = golden
    model.eval()
    with torch.no_grad():
        assert largest_difference(model.mapping_layer()[0], windows["prototypes_row0"]) < 1e-5
        assert largest_difference(model(torch.tensor(windows["x"])), windows[f"pred_{mode}"]) < 1e-5


@needs_shared("golden")
@pytest.mark.parametrize("more", [["--no_prefix_cache", "--mapping", "full"], ["--mapping", "compact"]])
@pytest.mark.parametrize("padding", MODES)
@pytest.mark.parametrize("name", GOLDEN)
def test_without_the_cache_and_with_the_compact_map_they_are_the_same(name, padding, more):
    model, windows, _, _, mode = load_golden(name, padding, *more)
    with torch.inference_mode():
        assert largest_difference(model.eval()(torch.tensor(windows["x"])), windows[f"pred_{mode}"]) < 1e-5


@needs_shared("golden")
def test_six_training_steps_equal_those_of_time_llm(golden):
    model, windows, _, facts, mode = golden
    x, y = torch.tensor(windows["x"]), torch.tensor(windows["y"])
    optimizer = torch.optim.Adam(model.parameters(), lr=facts["learning_rate"])
    losses = []
    for rows in facts["batch_rows"]:
        loss = torch.nn.functional.mse_loss(model.train()(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, facts["losses"][mode], rtol=1e-4)
    trained = facts["trained_sum_and_norm"][mode]
    assert set(model.state_dict()) == set(trained)
    for name, tensor in model.state_dict().items():
        assert tensor.norm().item() == pytest.approx(trained[name][1], rel=2e-3), name


def options(folder, *more):
    command = ["--data", "ETTh1", "--llm_model_path", folder, "--seq_len", "64", "--pred_len", "12"]
    return get_parser().parse_args([*command, "--d_model", "8", "--n_heads", "2", "--d_ff", "16", *more])


def random_walks(count, channels=1):
    return torch.randn(count, 64, channels, generator=torch.Generator().manual_seed(5)).cumsum(1)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "bert"])
def test_forecasts_do_not_depend_on_batch_mates(tiny_llm, family):
    model = Model(options(tiny_llm(family))).eval()
    windows = random_walks(16)
    assert len({len(ids) for ids in model.tokenize(windows[..., 0])}) > 1, "the batch must need padding"
    with torch.no_grad():
        together = model(windows)
        alone = torch.cat([model(window[None]) for window in windows])
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        shuffled = model(windows[order])
    assert largest_difference(together, alone) < 1e-5
    assert largest_difference(shuffled, together[order]) < 1e-5


def with_and_without_the_cache(folder, *flags):
    """Two models with the same weights."""
    torch.manual_seed(0)
    cached, plain = (Model(options(folder, "--dropout", "0", *flags, *more)) for more in ([], ["--no_prefix_cache"]))
    plain.load_state_dict(cached.state_dict())
    assert (cached.llm.uses_prefix, plain.llm.uses_prefix) == (True, False)
    return cached, plain


def gradients(model, windows):
    model.zero_grad()
    model.train()(windows).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mapping", ["full", "compact"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_two_steps_and_evaluations_between_are_the_same_with_and_without_the_cache(tiny_llm, family, padding, mapping):
    models = with_and_without_the_cache(tiny_llm(family), "--prompt_padding", padding, "--mapping", mapping)
    windows = random_walks(6)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    for _ in range(2):
        with torch.inference_mode():
            one, other = (model.eval()(windows) for model in models)
        assert largest_difference(one, other) < 1e-5
        one, other = (torch.cat([g.flatten() for g in gradients(model, windows).values()]) for model in models)
        assert (one - other).norm() < 1e-5 * other.norm()
        for optimizer in optimizers:
            optimizer.step()
    with torch.inference_mode():
        one, other = (model.eval()(windows) for model in models)
    assert largest_difference(one, other) < 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_the_gradient_of_every_tensor_is_the_same_but_for_rounding(tiny_llm, family, padding):
    """In float64, where the gradients that nearly cancel are not made of rounding."""
    models = with_and_without_the_cache(tiny_llm(family), "--prompt_padding", padding, "--mapping", "full")
    for model in models:
        model.double()
        model.llm.backbone.double()
        model.llm._shared_cache = None
    one, other = (gradients(model, random_walks(6).double()) for model in models)
    for name, gradient in other.items():
        # A key's bias shifts all of a query's scores alike: its gradient is rounding and nothing else.
        if name != "reprogramming_layer.key_projection.bias":
            assert largest_difference(one[name], gradient) < 1e-9, name


def test_channels_are_windows_of_their_own(tiny_llm):
    model = Model(options(tiny_llm("qwen2"))).eval()
    windows = random_walks(2, channels=3)
    with torch.no_grad():
        forecast = model(windows)
        one_by_one = torch.cat([model(windows[..., channel : channel + 1]) for channel in range(3)], dim=-1)
    assert forecast.shape == (2, 12, 3)
    assert largest_difference(forecast, one_by_one) < 1e-5


def test_only_the_small_layers_are_trained_and_saved(tiny_llm):
    model = build(options(tiny_llm("qwen2")))
    names = {"patch_embedding.value_embedding.tokenConv.weight"}
    for layer in (
        *("mapping_layer", "output_projection.linear"),
        *(f"reprogramming_layer.{part}_projection" for part in ("query", "key", "value", "out")),
    ):
        names |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(model.state_dict()) == names | {"mapping_layer.basis"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    model(random_walks(2)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "key" not in name)
    assert model.state_dict()["mapping_layer.weight"].shape == (1000, 64)
    full = build(options(tiny_llm("qwen2"), "--mapping", "full"))
    assert full.state_dict()["mapping_layer.weight"].shape == (1000, 512)


def test_dropout_acts_in_training_alone(tiny_llm):
    model = Model(options(tiny_llm("qwen2"), "--dropout", "0.5"))
    windows = random_walks(2)
    with torch.no_grad():
        assert not torch.equal(model.train()(windows), model(windows))
        assert torch.equal(model.eval()(windows), model(windows))


def test_a_constant_window_is_forecast_finite(tiny_llm):
    model = Model(options(tiny_llm("qwen2"))).eval()
    assert model(torch.full((2, 64, 1), 3.0)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--load_in_4bit"]])
def test_the_whole_model_runs_on_the_gpu(tiny_llm, more):
    model = Model(options(tiny_llm("qwen2"), "--llm_dtype", "float32", *more)).eval()
    assert model.mapping_layer.weight.is_cuda
    forecast = model(random_walks(4))  # the windows stay on the host, as in training
    assert forecast.is_cuda and forecast.isfinite().all()
