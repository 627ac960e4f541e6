import pytest
import torch
from transformers import AutoConfig, AutoModel, RobertaConfig

from layers.FrozenLLM import FrozenLLM
from tests.conftest import largest_difference

FAMILIES = ("qwen2", "llama", "gpt2", "bert")
PROMPTS = [list(range(30, 30 + length)) for length in (20, 25, 22, 20, 24)]


def backbone(folder):
    return AutoModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def patches(count=5):
    return torch.randn(count, 6, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_hides_batch_mates(tiny_llm, family):
    llm = FrozenLLM(backbone(tiny_llm(family)), "left", 0)
    assert not llm.sees_pads
    together = llm(PROMPTS, patches())
    alone = torch.cat([llm([prompt], patches()[row : row + 1]) for row, prompt in enumerate(PROMPTS)])
    assert largest_difference(together, alone) < 1e-5
    order = [3, 1, 4, 0, 2]
    shuffled = llm([PROMPTS[row] for row in order], patches()[order])
    assert largest_difference(shuffled, together[order]) < 1e-5


def test_right_padding_shows_the_pads_as_time_llm_does(tiny_llm):
    llm = FrozenLLM(backbone(tiny_llm("qwen2")), "right", 7)
    together = llm(PROMPTS, patches())
    written_out = [prompt + [7] * (25 - len(prompt)) for prompt in PROMPTS]
    torch.testing.assert_close(together, llm(written_out, patches()))
    assert largest_difference(together[:1], llm(PROMPTS[:1], patches()[:1])) > 1e-3


@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_pass_of_the_plain_model_gives_the_same(tiny_llm, padding):
    plain = backbone(tiny_llm("gpt2"))
    llm = FrozenLLM(plain, padding, 0)
    words = plain.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    hidden = plain(inputs_embeds=torch.cat([words, patches(1)], 1)).last_hidden_state[:, -6:]
    torch.testing.assert_close(llm(PROMPTS[:1], patches(1)), hidden)


def test_a_model_that_cannot_mask_pads_is_found_out_and_stays_exact():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    roberta = AutoModel.from_config(config).requires_grad_(False)
    llm = FrozenLLM(roberta, "left", 0)
    assert llm.sees_pads  # its positions begin behind the padding token's number
    inputs = patches().requires_grad_()
    together = llm(PROMPTS, inputs)
    alone = torch.cat([llm([prompt], inputs[row : row + 1]) for row, prompt in enumerate(PROMPTS)])
    assert largest_difference(together, alone) < 1e-5
    assert not FrozenLLM(roberta, "right", 0).sees_pads


def test_the_llm_stays_asleep_and_out_of_sight(tiny_llm):
    config = AutoConfig.from_pretrained(tiny_llm("gpt2"))
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    llm = FrozenLLM(AutoModel.from_config(config).requires_grad_(False), "left", 0)
    llm.train()
    torch.testing.assert_close(llm(PROMPTS, patches()), llm(PROMPTS, patches()))
    assert not list(llm.parameters())
    assert not llm.state_dict()


def test_gradients_reach_the_patches_and_nothing_else(tiny_llm):
    llm = FrozenLLM(backbone(tiny_llm("llama")), "left", 0)
    inputs = patches().requires_grad_()
    llm(PROMPTS, inputs).square().sum().backward()
    assert inputs.grad.abs().amin(dim=(1, 2)).max() > 0
    assert inputs.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in llm.backbone.parameters())
