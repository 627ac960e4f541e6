"""Keys and values of the tokens before the patches, in the form that Hugging Face models ask for."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PrefixComplete(Exception):  # noqa: N818 - it ends a computation, nothing is wrong
    """The last layer's keys and values are known: what the model would compute after them, nobody reads."""


class PrefixLayer(CacheLayerMixin):
    """One layer's keys and values of a prefix. `update` returns them with new ones behind, and keeps nothing.

    So a second forward, or one that is computed again in backward, sees the same prefix.

    Args:
        keys, values: (1 or B, heads, L, width), None for an empty prefix.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, heads, n, width) new keys and values -> (B, heads, L + n, width)."""
        if self.keys is None:
            return key_states, value_states
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: there is nothing to prepare."""

    def get_seq_length(self) -> int:
        """Return L."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `query_length` queries see, and the first one's position."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no limit."""
        return -1


class RecordingLayer(PrefixLayer):
    """A prefix that grows by what it is shown.

    Args:
        before: the prefix so far.
        is_last: whether it is the model's last layer: there the recording ends.
    """

    def __init__(self, before: PrefixLayer, is_last: bool):
        super().__init__(before.keys, before.values)
        self.is_last = is_last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep and return the longer prefix.

        Raises:
            PrefixComplete: from the last layer.
        """
        self.keys, self.values = super().update(key_states, value_states)
        if self.is_last:
            raise PrefixComplete
        return self.keys, self.values


class Prefix:
    """What a causal model must know of the tokens that stand before others: keys and values of each layer.

    Args:
        layers: one a layer of the model.
    """

    def __init__(self, layers: list[PrefixLayer]):
        self.layers = layers

    @classmethod
    def empty(cls, layers: int) -> "Prefix":
        """Return the prefix of no tokens for a model of so many layers."""
        return cls([PrefixLayer() for _ in range(layers)])

    def __len__(self) -> int:
        return self.layers[0].get_seq_length()

    def extend(self, model: torch.nn.Module, **inputs: torch.Tensor) -> "Prefix":
        """Return the prefix with more tokens behind, without gradient; `inputs` are those of the model."""
        last = len(self.layers) - 1
        layers = [RecordingLayer(layer, number == last) for number, layer in enumerate(self.layers)]
        with torch.no_grad():
            try:
                model(past_key_values=Cache(layers=layers), use_cache=True, **inputs)
            except PrefixComplete:
                return Prefix([PrefixLayer(layer.keys, layer.values) for layer in layers])
        raise NotImplementedError(f"{type(model).__name__} does not use its cache")

    def of_rows(self, rows: torch.Tensor) -> "Prefix":
        """Return the prefix whose row i is this one's `rows[i]`."""
        return Prefix([PrefixLayer(layer.keys[rows], layer.values[rows]) for layer in self.layers])

    def run(self, model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of tokens behind the prefix, (B, n, d_llm)."""
        return model(past_key_values=Cache(layers=self.layers), use_cache=True, **inputs).last_hidden_state
