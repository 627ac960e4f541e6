"""Text prototypes and the cross-attention onto them (section 3.1 of the paper, "Patch Reprogramming")."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from layers.EvalCache import EvalCache
from layers.FrozenLinear import frozen_product


class _Prototypes(nn.Linear):
    """Text prototypes weight @ basis + bias, (out_features, d_llm); what the basis is, the subclasses say.

    An LLM's token embeddings are small (of SmolLM2-135M and Qwen2.5: 0.1 and 0.02 an entry), prototypes of them too.
    Attention onto them is all but uniform then, and every patch of every window becomes the same vector but for a
    hundredth of it. `normalized` ones differ from the start.
    """

    def __init__(
        self,
        in_features: int,
        num_tokens: int,
        embeddings: torch.Tensor,
        device: torch.device | None,
        normalized: bool,
    ):
        super().__init__(in_features, num_tokens, device=device or embeddings.device)
        self.normalized = normalized
        # In a tuple, so that the module does not take the LLM's parameter for one of its own.
        self._embeddings = (embeddings,)
        self._cached = EvalCache()

    def forward(self) -> torch.Tensor:
        """Return the prototypes, (num_tokens, d_llm)."""
        return self._cached([*self.parameters(), *self.buffers()], self._prototypes)

    @torch.no_grad()
    def token_weights(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return the weights of the tokens in some prototypes: the least W whose W E these are, but for the bias.

        What else a full map's W holds cancels out in W E, and a compact map has no W of its own.

        Args:
            numbers: which prototypes.

        Returns:
            (numbers, V) float64, where E is.
        """
        embeddings = self._embeddings[0]
        mixed = (self._mix()[numbers] - self.bias[numbers, None]).to(embeddings.device, torch.float64)
        solved = mixed @ torch.linalg.pinv(_gram(embeddings), hermitian=True)
        return torch.cat([solved @ chunk.T for _, chunk in _numbered_chunks(embeddings, torch.float64)], dim=1)

    def _prototypes(self) -> torch.Tensor:
        mixed = self._mix()
        return functional.rms_norm(mixed, mixed.shape[-1:]) if self.normalized else mixed

    def _mix(self) -> torch.Tensor:
        return frozen_product(self.weight, self._basis().T) + self.bias[:, None]


class MappingLayer(_Prototypes):
    """Mix the LLM's frozen token embeddings E (V, d_llm) into a few text prototypes, W E + b.

    Args:
        embeddings: E. It is read, never trained, and is in no state dict.
        num_tokens: how many prototypes.
        device: where the layer is to be, E too; None: where E is.
        normalized: whether each prototype is scaled to entries of mean square 1.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        num_tokens: int = 1000,
        device: torch.device | None = None,
        normalized: bool = False,
    ):
        super().__init__(len(embeddings), num_tokens, embeddings, device, normalized)

    def _basis(self) -> torch.Tensor:
        return self._embeddings[0].to(self.weight.dtype)


class CompactMappingLayer(_Prototypes):
    """The same prototypes with d_llm instead of V weights each: W' B + b, where B is a multiple of E'E's root.

    Whatever W E can be, W' B can be, and nothing else: E and B span the same rows with the same inner products.
    W' starts such that W' B is distributed as W E is. B is scaled up, and W' down, such that Adam's first
    step moves W' B as far as it would move W E. From then on E is not needed, but to convert a full map.

    Of all roots the symmetric one is taken, for it turns Adam's steps the least. A Cholesky factor turns and
    shortens them more, since the embeddings of real LLMs share one strong direction; and it needs full rank.

    Loading a full map's `weight`, (num_tokens, V), converts it, exactly. W' means nothing without its B, so B is in
    the state dict; one that has none was trained with the B that is worked out here.

    Args:
        embeddings: E, wherever it is: B is worked out there.
        num_tokens: how many prototypes.
        device: where the layer is to be; None: where E is.
        basis: B, (d_llm, d_llm), if it is known: working it out takes seconds; None if not.
        normalized: whether each prototype is scaled to entries of mean square 1.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        num_tokens: int = 1000,
        device: torch.device | None = None,
        basis: torch.Tensor | None = None,
        normalized: bool = False,
    ):
        super().__init__(embeddings.shape[1], num_tokens, embeddings, device, normalized)
        if basis is None:
            basis = _work_out_basis(embeddings)
        self.register_buffer("basis", basis.to(self.weight.device))
        # B has the norm of E but for its scale.
        scale = 1.0 if embeddings.is_meta else basis.norm().item() / _norm(embeddings)
        with torch.no_grad():  # nn.Linear's default for V inputs, less what B is scaled up
            self.weight.uniform_(-1, 1).div_(math.sqrt(len(embeddings)) * scale)
            self.bias.uniform_(-1, 1).div_(math.sqrt(len(embeddings)))

    def _basis(self) -> torch.Tensor:
        return self.basis

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        state_dict = {f"{prefix}basis": self.basis, **state_dict}
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape == (self.out_features, len(self._embeddings[0])):
            state_dict = {**state_dict, f"{prefix}weight": self._from_full(weight)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _from_full(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the W' of the same prototypes as a full map's W, (num_tokens, V)."""
        embeddings = self._embeddings[0]
        mixed = sum(
            weight[:, start : start + len(chunk)].to(chunk) @ chunk
            for start, chunk in _numbered_chunks(embeddings, torch.float64)
        )
        return (mixed @ torch.linalg.pinv(self.basis.to(mixed), hermitian=True)).to(self.weight)


_CHUNK_ROWS = 8192


def _numbered_chunks(embeddings: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield E a few rows at a time, in another precision, with the number of the first row."""
    for start in range(0, len(embeddings), _CHUNK_ROWS):
        yield start, embeddings[start : start + _CHUNK_ROWS].to(dtype)


def _chunks(embeddings: torch.Tensor) -> Iterator[torch.Tensor]:
    return (chunk for _, chunk in _numbered_chunks(embeddings, torch.float32))


def _norm(embeddings: torch.Tensor) -> float:
    """Return the root of the sum of E's squares."""
    return math.hypot(*(chunk.norm().item() for chunk in _chunks(embeddings)))


def _work_out_basis(embeddings: torch.Tensor) -> torch.Tensor:
    """Return B, (d_llm, d_llm) float32."""
    root = _symmetric_root(embeddings)
    return root.float() if embeddings.is_meta else (_scale_of(embeddings, root) * root).float()


@torch.no_grad()
def _symmetric_root(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the symmetric root of E'E, (d_llm, d_llm) float64."""
    squares, directions = torch.linalg.eigh(_gram(embeddings))
    return (directions * squares.clamp(min=0).sqrt()) @ directions.T


def _gram(embeddings: torch.Tensor) -> torch.Tensor:
    """Return E'E, (d_llm, d_llm) float64."""
    return sum(chunk.T @ chunk for _, chunk in _numbered_chunks(embeddings, torch.float64))


def _scale_of(embeddings: torch.Tensor, root: torch.Tensor) -> float:
    """Measure how much farther Adam's first step moves W E than W' root."""
    ratio = _adam_step(embeddings, _chunks(embeddings)) / _adam_step(embeddings, [root.float()])
    return float(f"{ratio:.2g}")  # two digits: the same number for the same embeddings in another precision


@torch.no_grad()
def _adam_step(embeddings: torch.Tensor, basis: Iterable[torch.Tensor], gradients: int = 64) -> float:
    """Measure how far Adam's first step moves prototypes W basis, for random gradients of the prototypes.

    That step is the sign of each weight's gradient: of g basis' for a gradient g of the prototype.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(gradients, embeddings.shape[1], generator=generator).to(embeddings.device)
    return sum(torch.sign(drawn @ chunk.T) @ chunk for chunk in basis).norm().item()


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
        self._cached = EvalCache()

    def forward(self, patches: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """(B, P, d_model) patches and (S, d_llm) prototypes -> (B, P, d_llm)."""
        batch, count, _ = patches.shape
        # Each patch looks at the prototypes by itself, so the whole batch is one long row of queries.
        queries = self._heads(self.query_projection(patches.flatten(0, 1)))  # (1, H, B*P, d_keys)
        keys, values = self._cached(
            [prototypes, *self.key_projection.parameters(), *self.value_projection.parameters()],
            lambda: (self._heads(self.key_projection(prototypes)), self._heads(self.value_projection(prototypes))),
        )  # (1, H, S, d_keys) each
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1 / math.sqrt(queries.shape[-1]),
        )
        mixed = mixed.squeeze(0).transpose(0, 1).reshape(batch, count, -1)  # (B, P, H*d_keys)
        return self.out_projection(mixed)

    def attention(self, patches: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Return the shares by which `forward` mixes the prototypes for each patch, if none are dropped.

        (B, P, d_model) patches and (S, d_llm) prototypes -> (B, H, P, S).
        """
        queries = self._heads(self.query_projection(patches.flatten(0, 1)))  # (1, H, B*P, d_keys)
        keys = self._heads(self.key_projection(prototypes))  # (1, H, S, d_keys)
        shares = (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(-1)  # (1, H, B*P, S)
        return shares.squeeze(0).unflatten(1, patches.shape[:2]).transpose(0, 1)

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (self.n_heads, -1)).transpose(0, 1).unsqueeze(0)
