"""Keys and values of the tokens before the patches, as a cache for Hugging Face models."""

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PrefixComplete(Exception):  # noqa: N818 - it ends a computation and is no error
    """Raised once the last layer's keys and values are known, because the rest of the forward pass is not needed."""


class PrefixLayer(DynamicLayer):
    """The keys and values of a prefix in one layer of the model.

    `update` returns them with new ones appended and stores nothing, so that a second forward pass, or one recomputed
    in the backward pass, sees the same prefix.

    Args:
        keys, values: (1 or B, heads, L, head_dim); None for an empty prefix.
    """

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Append keys and values, (B, heads, n, head_dim) -> (B, heads, L + n, head_dim) each."""
        if self.keys is None:
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


class RecordingLayer(PrefixLayer):
    """A prefix layer that stores what is appended to it.

    Args:
        before: the layer to start from, which stays unchanged.
        is_last: whether it is the last layer of the model, after which the forward pass may end.
    """

    def __init__(self, before: PrefixLayer, is_last: bool):
        super().__init__(before.keys, before.values)
        self.is_last = is_last

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """Store and return the longer prefix.

        Raises:
            PrefixComplete: from the last layer.
        """
        self.keys, self.values = super().update(key_states, value_states)
        self.is_initialized = True
        if self.is_last:
            raise PrefixComplete
        return self.keys, self.values


class Prefix:
    """The keys and values of a prefix, one `PrefixLayer` for each layer of the model."""

    def __init__(self, layers: list[PrefixLayer]):
        self.layers = layers

    @classmethod
    def empty(cls, layers: int) -> "Prefix":
        """Build the prefix without tokens for a model with this number of layers."""
        return cls([PrefixLayer() for _ in range(layers)])

    def __len__(self) -> int:
        return self.layers[0].get_seq_length()

    def extend(self, model: torch.nn.Module, **inputs: torch.Tensor) -> "Prefix":
        """Run the model on further tokens without gradient and return the longer prefix."""
        last = len(self.layers) - 1
        layers = [RecordingLayer(layer, number == last) for number, layer in enumerate(self.layers)]
        with torch.no_grad():
            try:
                model(past_key_values=Cache(layers=layers), use_cache=True, **inputs)
            except PrefixComplete:
                return Prefix([PrefixLayer(layer.keys, layer.values) for layer in layers])
        raise NotImplementedError(f"{type(model).__name__} does not use its cache")

    def select(self, rows: torch.Tensor) -> "Prefix":
        """Select rows of the batch; a row may be repeated."""
        return Prefix([PrefixLayer(layer.keys[rows], layer.values[rows]) for layer in self.layers])

    def run(self, model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        """Run the model on tokens after the prefix and return their last hidden states, (B, n, d_llm)."""
        return model(past_key_values=Cache(layers=self.layers), use_cache=True, **inputs).last_hidden_state
