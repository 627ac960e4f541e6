"""An LLM of 16 bits on a CPU computes its attention in float32."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from layers.Float32Attention import NAME, float32_attention
from models.TimeLLM import Model
from run_main import get_parser
from tests.conftest import largest_difference


def test_it_is_attention_in_float32_with_grouped_keys():
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bfloat16).masked_fill_(torch.ones(5, 5).triu(1).bool(), -1e30)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mixed, _ = float32_attention(module, query, key, value, mask, scaling=0.5)
    keys, values = (tensor.float().repeat_interleave(2, dim=1) for tensor in (key, value))
    expected = functional.scaled_dot_product_attention(query.float(), keys, values, mask.float(), scale=0.5)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, expected.transpose(1, 2).bfloat16())


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("more", [[], ["--no_prefix_cache"]], ids=["cache", "one pass"])
def test_it_changes_forecasts_no_more_than_rounding(family, more, flags, tiny_llm):
    flags = [*flags, "--llm_model_path", tiny_llm(family), "--dropout", "0", *more]
    windows = torch.randn(3, 48, 1, generator=torch.Generator().manual_seed(0)).cumsum(1)
    torch.manual_seed(0)
    half = Model(get_parser().parse_args([*flags, "--llm_dtype", "bfloat16"])).eval()
    torch.manual_seed(0)
    whole = Model(get_parser().parse_args(flags)).eval()
    assert half.llm.backbone.config._attn_implementation == NAME
    assert whole.llm.backbone.config._attn_implementation == "sdpa"
    assert half.llm.limitations() == whole.llm.limitations()
    with torch.no_grad():
        assert largest_difference(half(windows), whole(windows)) < 0.05
