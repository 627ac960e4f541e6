"""Text prototypes and the cross-attention onto them (section 3.1 of the paper, "Patch Reprogramming")."""

import math

import torch
from torch import nn
from torch.nn import functional


class MappingLayer(nn.Linear):
    """Mix the LLM's frozen word embeddings E (V, d_llm) into a few text prototypes W E + b.

    Args:
        word_embeddings: E. It is read, never trained, and is in no state dict.
        num_tokens: how many prototypes.
    """

    def __init__(self, word_embeddings: torch.Tensor, num_tokens: int = 1000):
        super().__init__(word_embeddings.shape[0], num_tokens, device=word_embeddings.device)
        # In a tuple, so that the module does not take the LLM's parameter for one of its own.
        self._word_embeddings = (word_embeddings,)

    def forward(self) -> torch.Tensor:
        """Return the prototypes, (num_tokens, d_llm)."""
        words = self._word_embeddings[0].to(self.weight.dtype)
        return torch.addmm(self.bias[:, None], self.weight, words)


class ReprogrammingLayer(nn.Module):
    """Re-express patches as mixtures of text prototypes, by multi-head cross-attention.

    Args:
        d_model: width of a patch embedding.
        n_heads: attention heads.
        d_keys: width of a head.
        d_llm: width of a prototype, and of the output.
        dropout: dropout of the attention weights.
    """

    def __init__(self, d_model: int, n_heads: int, d_keys: int, d_llm: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query_projection = nn.Linear(d_model, d_keys * n_heads)
        self.key_projection = nn.Linear(d_llm, d_keys * n_heads)
        self.value_projection = nn.Linear(d_llm, d_keys * n_heads)
        self.out_projection = nn.Linear(d_keys * n_heads, d_llm)

    def forward(self, patches: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """(B, P, d_model) patches and (S, d_llm) prototypes -> (B, P, d_llm)."""
        batch, count, _ = patches.shape
        # Each patch looks at the prototypes by itself, so the whole batch is one long row of queries.
        queries = self._heads(self.query_projection(patches.flatten(0, 1)))  # (1, H, B*P, d_keys)
        keys = self._heads(self.key_projection(prototypes))  # (1, H, S, d_keys)
        values = self._heads(self.value_projection(prototypes))
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(queries.shape[-1]),
        )
        mixed = mixed.squeeze(0).transpose(0, 1).reshape(batch, count, -1)  # (B, P, H*d_keys)
        return self.out_projection(mixed)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (self.n_heads, -1)).transpose(0, 1).unsqueeze(0)
