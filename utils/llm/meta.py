"""Build an LLM of meta tensors, which have shapes but no data, to plan memory and to check the shapes of weights."""

import copy
import re
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa

from utils.llm.choice import LLMChoice, use_first_layers
from utils.llm.identity import LLMIdentity, LLMTraces
from utils.llm.loading import LoadedLLM


class _KernelAttention(torch.autograd.Function):
    """Attention that saves the same tensors as the fused kernels: query, key, value, output, log-sum-exp per query."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _plan_attention(module: nn.Module, query, key, value, attention_mask, **_kwargs) -> tuple[torch.Tensor, None]:
    """Replace transformers' sdpa attention: (B, heads, n, width) -> (B, n, heads, width)."""
    if hasattr(module, "num_key_value_groups") and not use_gqa_in_sdpa(attention_mask, key, value):
        key, value = (repeat_kv(tensor, module.num_key_value_groups) for tensor in (key, value))
    return _KernelAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("memory_plan", _plan_attention)


class _TokenCounter:
    """A stand-in for a tokenizer, with a token for each digit, word and punctuation mark; only their number matters."""

    def __call__(self, texts: list[str], **_kwargs) -> SimpleNamespace:
        words = [re.findall(r"\d|[^\W\d]+|[^\w\s]", text) for text in texts]
        return SimpleNamespace(input_ids=[[hash(word) % 97 for word in row] for row in words])

    def num_special_tokens_to_add(self) -> int:
        return 0


def llm_without_weights(choice: LLMChoice, layers: int, dtype: torch.dtype) -> LoadedLLM:
    """Build the first layers of an LLM from meta tensors."""
    config = copy.deepcopy(choice.config)
    text_config = config.get_text_config()
    use_first_layers(text_config, layers, choice.source)
    if choice.is_quantized:
        del config.quantization_config
    with torch.device("meta") as meta:
        llm = AutoModel.from_config(config, dtype=dtype, attn_implementation="memory_plan", trust_remote_code=False)
    identity = LLMIdentity(config.model_type, text_config.hidden_size, text_config.vocab_size, layers, "none", "", "")
    return LoadedLLM(
        backbone=llm.requires_grad_(False).eval(),
        tokenizer=_TokenCounter(),
        pad_id=0,
        device=meta,
        source=choice.source,
        total_layers=choice.total_layers,
        identity=identity,
        traces=LLMTraces({}, torch.empty(0)),
    )
