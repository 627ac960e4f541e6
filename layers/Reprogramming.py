"""Text prototypes and the cross-attention to them (section 3.1 of the paper, "Patch Reprogramming")."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from layers.DropoutAttention import attention_with_dropout
from layers.FrozenLinear import frozen_product


class _EvalCache:
    """Cache one result while gradients are disabled, so that it is computed once per evaluation and not per batch."""

    def __init__(self):
        self._sources = self._versions = self._result = None

    def __call__(self, sources: list[torch.Tensor], compute: Callable[[], object]) -> object:
        """Return `compute()`, or the cached result if `sources`, all tensors it depends on, have not changed."""
        if torch.is_grad_enabled():
            self._sources = self._versions = self._result = None  # training needs the graph, and its memory
            return compute()
        versions = [(id(part), part.data_ptr(), None if part.is_inference() else part._version) for part in sources]
        if versions != self._versions:
            self._result = compute()
            # The sources are kept, because another tensor may get the id and the address of one that is freed.
            self._sources, self._versions = sources, versions
        return self._result


class _Prototypes(nn.Linear):
    """Text prototypes weight @ basis + bias, (num_tokens, d_llm); subclasses define the basis.

    The entries of an LLM's token embeddings are small, about 0.1 in SmolLM2-135M and 0.02 in Qwen2.5, and so are those
    of prototypes. Attention to them is then almost uniform, and maps all patches to the same vector up to 1%.
    `normalized` prototypes differ from the start.
    """

    def __init__(
        self, in_features: int, embeddings: torch.Tensor, num_tokens: int, device: torch.device | None, normalized: bool
    ):
        super().__init__(in_features, num_tokens, device=device or embeddings.device)
        self.normalized = normalized
        # In a tuple, so that the LLM's parameter is not registered as one of this module.
        self._embeddings = (embeddings,)
        self._cached = _EvalCache()

    def forward(self) -> torch.Tensor:
        """Compute the prototypes, (num_tokens, d_llm)."""
        return self._cached([*self.parameters(), *self.buffers()], self._prototypes)

    @torch.no_grad()
    def token_weights(self, indices: Sequence[int]) -> torch.Tensor:
        """Express some prototypes, before bias and normalization, as weighted sums of token embeddings.

        These weights are the W of least norm with the same W E. A full map's own W differs from it only by what cancels
        out in W E; a compact map has no W.

        Returns:
            (indices, V) float64, on the device of E.
        """
        embeddings = self._embeddings[0]
        mixed = (self._mix()[indices] - self.bias[indices, None]).to(embeddings.device, torch.float64)
        solved = mixed @ torch.linalg.pinv(_gram(embeddings), hermitian=True)
        return torch.cat([solved @ chunk.T for chunk in _chunks(embeddings, torch.float64)], dim=1)

    def _prototypes(self) -> torch.Tensor:
        mixed = self._mix()
        return functional.rms_norm(mixed, mixed.shape[-1:]) if self.normalized else mixed

    def _mix(self) -> torch.Tensor:
        return frozen_product(self.weight, self._basis().T) + self.bias[:, None]


class MappingLayer(_Prototypes):
    """Map the LLM's frozen token embeddings E, (V, d_llm), to a small number of text prototypes, W E + b.

    Args:
        embeddings: E, on `device`; it is not trained and in no state dict.
        num_tokens: number of prototypes.
        device: device of the layer, None for that of E.
        normalized: whether each prototype is scaled to a root mean square of 1.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        num_tokens: int = 1000,
        device: torch.device | None = None,
        normalized: bool = False,
    ):
        super().__init__(len(embeddings), embeddings, num_tokens, device, normalized)

    def _basis(self) -> torch.Tensor:
        return self._embeddings[0].to(self.weight.dtype)


class CompactMappingLayer(_Prototypes):
    """The prototypes of a `MappingLayer` with d_llm instead of V weights each, W' B + b.

    B is a multiple of the symmetric root of E'E. W' B can take the same values as W E, because the rows of B span the
    same space as those of E. W' is initialized so that W' B has the distribution of W E. B is scaled up, and W' down,
    so that Adam's first step moves W' B as far as it would move W E. After that, only converting a full map needs E.

    Of all roots the symmetric one changes Adam's steps least. A Cholesky factor changes their direction and length
    more, because the embeddings of real LLMs share a dominant direction, and it requires full rank.

    Loading a full map's `weight`, (num_tokens, V), converts it exactly. W' is meaningless without its B, so B is in the
    state dict; weights without a B were trained with the B that is computed here.

    Args:
        embeddings: E, on any device: B is computed there.
        num_tokens, device, normalized: as in `MappingLayer`.
        basis: B, (d_llm, d_llm), if known, because computing it takes seconds.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        num_tokens: int = 1000,
        device: torch.device | None = None,
        basis: torch.Tensor | None = None,
        normalized: bool = False,
    ):
        super().__init__(embeddings.shape[1], embeddings, num_tokens, device, normalized)
        if basis is None:
            basis = _compute_basis(embeddings)
        self.register_buffer("basis", basis.to(self.weight.device))
        scale = 1.0
        if not embeddings.is_meta:  # the unscaled root has the norm of E
            scale = basis.norm().item() / math.hypot(*(chunk.norm().item() for chunk in _chunks(embeddings)))
        with torch.no_grad():  # nn.Linear's default for V inputs, divided by the scale of B
            self.weight.uniform_(-1, 1).div_(math.sqrt(len(embeddings)) * scale)
            self.bias.uniform_(-1, 1).div_(math.sqrt(len(embeddings)))

    def _basis(self) -> torch.Tensor:
        return self.basis

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        state_dict = {f"{prefix}basis": self.basis, **state_dict}
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape == (self.out_features, len(self._embeddings[0])):
            state_dict[f"{prefix}weight"] = self._from_full(weight)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _from_full(self, weight: torch.Tensor) -> torch.Tensor:
        """Convert a full map's W, (num_tokens, V), to the W' of the same prototypes."""
        chunks = _chunks(self._embeddings[0], torch.float64)
        parts = weight.split(_CHUNK_ROWS, dim=1)
        mixed = sum(part.to(chunk) @ chunk for part, chunk in zip(parts, chunks, strict=True))
        return (mixed @ torch.linalg.pinv(self.basis.to(mixed), hermitian=True)).to(self.weight)


_CHUNK_ROWS = 8192


def _chunks(embeddings: torch.Tensor, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """Convert E chunk by chunk, because the whole table may not fit into memory in another dtype."""
    return (chunk.to(dtype) for chunk in embeddings.split(_CHUNK_ROWS))


@torch.no_grad()
def _compute_basis(embeddings: torch.Tensor) -> torch.Tensor:
    """Compute B, (d_llm, d_llm) float32: the symmetric root of E'E, scaled to match Adam's first steps."""
    squares, directions = torch.linalg.eigh(_gram(embeddings))
    root = (directions * squares.clamp(min=0).sqrt()) @ directions.T
    if embeddings.is_meta:
        return root.float()
    ratio = _adam_step(embeddings, _chunks(embeddings)) / _adam_step(embeddings, [root.float()])
    # Two digits: the same scale for the same embeddings in another precision.
    return (float(f"{ratio:.2g}") * root).float()


def _gram(embeddings: torch.Tensor) -> torch.Tensor:
    """Compute E'E, (d_llm, d_llm) float64."""
    return sum(chunk.T @ chunk for chunk in _chunks(embeddings, torch.float64))


def _adam_step(embeddings: torch.Tensor, basis: Iterable[torch.Tensor], gradients: int = 64) -> float:
    """Measure how far Adam's first step on W, the sign of its gradient, moves W basis, for random gradients of that."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(gradients, embeddings.shape[1], generator=generator).to(embeddings.device)
    return sum(torch.sign(drawn @ chunk.T) @ chunk for chunk in basis).norm().item()


class ReprogrammingLayer(nn.Module):
    """Reprogram patches as mixtures of text prototypes, by multi-head cross-attention.

    Args:
        d_model: size of a patch embedding.
        n_heads: number of attention heads.
        d_keys: size of a head.
        d_llm: size of a prototype and of the output.
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
        self._cached = _EvalCache()

    def forward(self, patches: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """(B, P, d_model) patches and (S, d_llm) prototypes -> (B, P, d_llm)."""
        # Patches do not attend to each other, so the whole batch is one sequence of queries.
        queries = self._heads(self.query_projection(patches.flatten(0, 1)))  # (1, H, B*P, d_keys)
        keys, values = self._cached(
            [prototypes, *self.key_projection.parameters(), *self.value_projection.parameters()],
            lambda: (self._heads(self.key_projection(prototypes)), self._heads(self.value_projection(prototypes))),
        )  # (1, H, S, d_keys) each
        dropout, scale = self.dropout if self.training else 0.0, 1 / math.sqrt(queries.shape[-1])
        if dropout and queries.device.type in ("cpu", "meta"):
            mixed = attention_with_dropout(*(rows.squeeze(0) for rows in (queries, keys, values)), dropout, scale)
        else:
            mixed = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=scale)[0]
        mixed = mixed.transpose(0, 1).reshape(*patches.shape[:2], -1)  # (B, P, H*d_keys)
        return self.out_projection(mixed)

    def attention(self, patches: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Compute the attention weights of `forward` without dropout.

        (B, P, d_model) patches and (S, d_llm) prototypes -> (B, H, P, S).
        """
        queries = self._heads(self.query_projection(patches.flatten(0, 1)))  # (1, H, B*P, d_keys)
        keys = self._heads(self.key_projection(prototypes))  # (1, H, S, d_keys)
        weights = (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(-1)  # (1, H, B*P, S)
        return weights.squeeze(0).unflatten(1, patches.shape[:2]).transpose(0, 1)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (self.n_heads, -1)).transpose(0, 1).unsqueeze(0)
