import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, BloomConfig, GPTNeoConfig, MistralConfig, RobertaConfig

from layers.FrozenLLM import FrozenLLM
from layers.InFloat32 import InFloat32
from tests.conftest import largest_difference
from utils.cli.options import get_parser
from utils.llm.choice import LLMFlags
from utils.llm.loading import load_llm

CAUSAL = ("qwen2", "llama", "gpt2")
FAMILIES = (*CAUSAL, "bert")
HEAD = list(range(100, 112))
PROMPTS = [HEAD + list(range(30 + number, 30 + length)) for number, length in enumerate((20, 26, 24, 23, 28))]
# What two prompts have in common must be what all have: they begin with different words behind the head.
EXAMPLES = [HEAD + list(range(60, 75)), HEAD + list(range(80, 100))]


def backbone(folder):
    return AutoModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def loaded(*argv):
    return load_llm(LLMFlags.of(get_parser().parse_args(["--data", "ETTh1", *argv]))).backbone


def patches(count=5):
    return torch.randn(count, 6, 64, generator=torch.Generator().manual_seed(1))


def frozen(model, padding="left", pad_id=0, use_prefix=True, recompute=False):
    return FrozenLLM(model, padding, pad_id, EXAMPLES, 6, torch.device("cpu"), use_prefix, recompute)


@pytest.mark.parametrize("use_prefix", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_hides_batch_mates(tiny_llm, family, use_prefix):
    llm = frozen(backbone(tiny_llm(family)), use_prefix=use_prefix)
    assert llm.uses_prefix == (use_prefix and family != "bert")
    assert not llm.padding_leaks
    together = llm(PROMPTS, patches())
    alone = torch.cat([llm([prompt], patches()[row : row + 1]) for row, prompt in enumerate(PROMPTS)])
    assert largest_difference(together, alone) < 1e-5
    order = [3, 1, 4, 0, 2]
    shuffled = llm([PROMPTS[row] for row in order], patches()[order])
    assert largest_difference(shuffled, together[order]) < 1e-5


@pytest.mark.parametrize("use_prefix", [True, False])
def test_right_padding_shows_the_pads_as_time_llm_does(tiny_llm, use_prefix):
    llm = frozen(backbone(tiny_llm("qwen2")), "right", 7, use_prefix)
    together = llm(PROMPTS, patches())
    written_out = [prompt + [7] * (37 - len(prompt)) for prompt in PROMPTS]
    assert largest_difference(together, llm(written_out, patches())) < 1e-5
    assert largest_difference(together[:1], llm(PROMPTS[:1], patches()[:1])) > 1e-3


@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_pass_of_the_plain_model_gives_the_same(tiny_llm, padding):
    plain = backbone(tiny_llm("gpt2"))
    words = plain.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    hidden = plain(inputs_embeds=torch.cat([words, patches(1)], 1)).last_hidden_state[:, -6:]
    for use_prefix in (True, False):
        llm = frozen(plain, padding, use_prefix=use_prefix)
        assert largest_difference(llm(PROMPTS[:1], patches(1)), hidden) < 1e-5


class BytesKept:
    """Count the bytes that autograd keeps for backward."""

    def __init__(self):
        self.total = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *problem):
        self.hooks.__exit__(*problem)

    def keep(self, tensor):
        self.total += tensor.nbytes * tensor.requires_grad
        return tensor


@pytest.mark.parametrize("use_prefix", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_computing_blocks_again_gives_the_same_and_keeps_less(tiny_llm, family, use_prefix):
    results = []
    for recompute in (False, True):
        llm = frozen(backbone(tiny_llm(family)), use_prefix=use_prefix, recompute=recompute)
        for _ in range(2):
            inputs = patches().requires_grad_()
            with BytesKept() as kept:
                hidden = llm(PROMPTS, inputs)
            hidden[..., :20].square().sum().backward()
        results.append((hidden, inputs.grad, kept.total))
    (hidden, gradient, much), (again, gradient_again, little) = results
    assert largest_difference(again, hidden) < 1e-5
    assert largest_difference(gradient_again, gradient) < 1e-5
    assert little < much / 3


def test_words_are_looked_up_where_they_are(tiny_llm):
    model = backbone(tiny_llm("qwen2")).to("meta")
    model.set_input_embeddings(torch.nn.Embedding(512, 64))  # on the CPU
    llm = FrozenLLM(model, "left", 0, EXAMPLES, 6, torch.device("meta"))
    assert llm(PROMPTS, patches().to("meta")).is_meta


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_and_one_pass_agree_in_forecast_and_gradient(tiny_llm, family, padding):
    model = backbone(tiny_llm(family))
    results = []
    for use_prefix in (True, False):
        llm = frozen(model, padding, 5, use_prefix)
        assert llm.uses_prefix is use_prefix
        for _ in range(2):  # the second time, the head's keys and values are there already
            inputs = patches().requires_grad_()
            hidden = llm(PROMPTS, inputs)
            hidden[..., :20].square().sum().backward()
            results.append((hidden, inputs.grad))
    for hidden, gradient in results[:-1]:
        assert largest_difference(hidden, results[-1][0]) < 1e-5
        assert largest_difference(gradient, results[-1][1]) < 1e-5


def test_an_evaluation_between_two_steps_changes_nothing(tiny_llm):
    llm = frozen(backbone(tiny_llm("qwen2")))
    llm._shared_cache = None

    def gradient():
        inputs = patches().requires_grad_()
        llm(PROMPTS, inputs)[..., :20].square().sum().backward()
        return inputs.grad

    with torch.inference_mode():  # the first to ask for the head's keys and values
        evaluated = llm(PROMPTS, patches())
    before = gradient()
    with torch.inference_mode():
        assert torch.equal(llm(PROMPTS, patches()), evaluated)
    assert torch.equal(gradient(), before)


def test_the_head_goes_through_the_llm_once_and_the_patches_alone_with_gradient(tiny_llm):
    model = backbone(tiny_llm("qwen2"))
    llm = frozen(model)
    llm._shared_cache = None
    lengths, mlp_lengths = [], []
    model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: lengths.append(args[0].shape), with_kwargs=True)
    model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: mlp_lengths.append(args[0].shape[1]))
    for _ in range(2):
        llm(PROMPTS, patches().requires_grad_())
    assert [tuple(shape[:2]) for shape in lengths] == [(1, 12), (5, 25), (5, 6), (5, 25), (5, 6)]
    assert mlp_lengths == [6, 6], "behind the last layer's keys and values nothing of a prefix is needed"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_prompt_that_several_windows_have_goes_through_the_llm_once(tiny_llm, padding):
    model = backbone(tiny_llm("qwen2"))
    llm, one_pass = frozen(model, padding), frozen(model, padding, use_prefix=False)
    for order in ([0, 1, 0, 2, 1], [3] * 5):
        prompts = [PROMPTS[number] for number in order]
        rows = []
        handle = model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, rows=rows: rows.append(args[0].shape[0]), with_kwargs=True
        )
        inputs = patches().requires_grad_()
        hidden = llm(prompts, inputs)
        handle.remove()
        assert rows[-2:] == [len(set(order)), 5]
        (gradient,) = torch.autograd.grad(hidden[..., :20].square().sum(), inputs)
        reference = one_pass(prompts, inputs)
        assert largest_difference(hidden, reference) < 1e-5
        assert largest_difference(gradient, *torch.autograd.grad(reference[..., :20].square().sum(), inputs)) < 1e-5


def test_a_prompt_with_another_head_is_run_whole(tiny_llm):
    llm = frozen(backbone(tiny_llm("llama")))
    odd = [PROMPTS[0], [5, *PROMPTS[1]], HEAD]
    one_pass = frozen(llm.backbone, use_prefix=False)
    assert largest_difference(llm(odd, patches(3)), one_pass(odd, patches(3))) < 1e-5
    # A prompt that is the head and nothing else leaves no rest to run.
    assert largest_difference(llm([HEAD], patches(1)), one_pass([HEAD], patches(1))) < 1e-5


def test_half_precision_and_4_bits_keep_the_prefix(tiny_llm):
    for more in (["--llm_dtype", "bfloat16"], ["--load_in_4bit"]):
        model = loaded("--llm_model_path", tiny_llm("qwen2"), *more)
        llm, one_pass = frozen(model), frozen(model, use_prefix=False)
        assert llm.uses_prefix
        assert (llm(PROMPTS, patches()) - one_pass(PROMPTS, patches())).norm() < 0.02 * one_pass(
            PROMPTS, patches()
        ).norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [["--llm_dtype", "float16"], ["--load_in_4bit", "--llm_dtype", "float16"]])
def test_in_float32_a_model_of_few_bits_does_what_its_weights_say(tiny_llm, family, more):
    """The tiny LLMs' weights are exact in float16, so nothing but the computation's own rounding is left."""
    ids = torch.arange(40, 60)[None]
    argv = ["--llm_model_path", tiny_llm(family), *more]
    exact = loaded(*argv, "--llm_dtype", "float32")(ids).last_hidden_state
    model = loaded(*argv)
    assert largest_difference(model(ids).last_hidden_state.float(), exact) > 1e-4
    with InFloat32(), torch.no_grad():
        assert largest_difference(model(ids).last_hidden_state, exact) < 1e-5


def test_a_sliding_window_that_does_not_bite_keeps_the_prefix():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=50, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModel.from_config(config).requires_grad_(False)
    llm, one_pass = frozen(model), frozen(model, use_prefix=False)
    assert llm.uses_prefix
    assert largest_difference(llm(PROMPTS, patches()), one_pass(PROMPTS, patches())) < 1e-5
    # 44 + 12 positions are more than the window: such a batch goes in one pass.
    longer = [HEAD + list(range(30, 62)), HEAD + list(range(30, 60))]
    assert torch.equal(llm(longer, patches(2).repeat(1, 2, 1)), one_pass(longer, patches(2).repeat(1, 2, 1)))


def test_a_model_whose_cache_cannot_be_trusted_is_found_out(tiny_llm):
    torch.manual_seed(0)
    bloom = AutoModel.from_config(
        BloomConfig(vocab_size=200, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
    ).requires_grad_(False)
    llm = frozen(bloom)  # counts positions from the mask: there is nothing to tell it where the patches stand
    assert not llm.uses_prefix
    assert "position_ids" in llm.prefix_disabled_reason
    assert llm(PROMPTS, patches()).isfinite().all()


@pytest.mark.parametrize("more", [[], ["--llm_dtype", "bfloat16"], ["--llm_dtype", "float16"], ["--load_in_4bit"]])
def test_wrong_positions_are_found_out_in_every_precision(tiny_llm, more):
    liar = loaded("--llm_model_path", tiny_llm("qwen2"), *more)
    assert frozen(liar).uses_prefix
    rotary = copy.deepcopy(liar.rotary_emb.forward)
    # What stands behind a prefix stands a fiftieth of a place too far. That changes the hidden states of this LLM,
    # which is made to react, by 0.1%, as a whole place changes those of real ones.
    liar.rotary_emb.forward = lambda hidden, positions: rotary(hidden, positions + 0.02 * (positions[:, :1] > 0))
    llm = frozen(liar)
    assert not llm.uses_prefix
    assert "other hidden states" in llm.prefix_disabled_reason
    assert llm.shared_prefix == HEAD


def test_an_attention_that_is_cut_where_no_config_says_so_is_found_out():
    """GPT-Neo's local attention goes by index: a prompt behind pads, or behind a cache, is cut elsewhere."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=200, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=30, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    llm = frozen(AutoModel.from_config(config).requires_grad_(False))
    together = llm(PROMPTS, patches())
    alone = torch.cat([llm([prompt], patches()[row : row + 1]) for row, prompt in enumerate(PROMPTS)])
    assert largest_difference(together, alone) < 1e-5


class LargestResult(TorchDispatchMode):
    """Note the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(part.numel() for part in tree_leaves(result) if hasattr(part, "numel"))])
        return result


def test_in_float32_a_table_of_embeddings_is_not_converted_whole():
    table = torch.nn.Embedding(5000, 8, dtype=torch.bfloat16).requires_grad_(False)
    with LargestResult() as largest, InFloat32():
        looked_up = table(torch.tensor([[3, 4, 5]]))
    assert looked_up.dtype == torch.float32
    assert largest.elements == 24
    with InFloat32(), pytest.raises(NotImplementedError, match="16 bits"):
        table.weight.add_(1)


def test_a_model_that_cannot_mask_pads_is_found_out_and_stays_exact():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    roberta = AutoModel.from_config(config).requires_grad_(False)
    llm = frozen(roberta)
    assert llm.padding_leaks  # its positions begin behind the padding token's number
    inputs = patches().requires_grad_()
    together = llm(PROMPTS, inputs)
    alone = torch.cat([llm([prompt], inputs[row : row + 1]) for row, prompt in enumerate(PROMPTS)])
    assert largest_difference(together, alone) < 1e-5
    assert not frozen(roberta, "right").padding_leaks


def test_the_llm_stays_asleep_and_out_of_sight(tiny_llm):
    config = AutoConfig.from_pretrained(tiny_llm("gpt2"))
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    llm = frozen(AutoModel.from_config(config).requires_grad_(False))
    llm.train()
    torch.testing.assert_close(llm(PROMPTS, patches()), llm(PROMPTS, patches()))
    assert not list(llm.parameters())
    assert not llm.state_dict()


def test_gradients_reach_the_patches_and_nothing_else(tiny_llm):
    llm = frozen(backbone(tiny_llm("llama")))
    inputs = patches().requires_grad_()
    llm(PROMPTS, inputs).square().sum().backward()
    assert inputs.grad.abs().amin(dim=(1, 2)).max() > 0
    assert inputs.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in llm.backbone.parameters())
