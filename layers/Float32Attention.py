"""Attention in float32 for an LLM that computes in 16 bits on a CPU, where torch's kernels are slower in 16 bits."""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"


def float32_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' sdpa attention in float32 and return it in the precision of `query`.

    (B, heads, n, width) -> (B, n, heads, width).
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    mixed, weights = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **options
    )
    return mixed.to(query.dtype), weights


AttentionInterface.register(NAME, float32_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_float32_attention(backbone: nn.Module) -> None:
    """Let a model with sdpa attention, on a CPU and in 16 bits, compute its attention in float32."""
    is_half = backbone.dtype in (torch.float16, torch.bfloat16)
    if backbone.device.type == "cpu" and is_half and backbone.config._attn_implementation == "sdpa":
        backbone.set_attn_implementation(NAME)
