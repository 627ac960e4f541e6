"""The frozen language model: prompts and patches in, hidden states of the patches out.

The only module that handles padding, masks, positions and prefixes.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, takewhile

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from layers.GradientScale import GradientScale
from layers.HostToDevice import send
from layers.InFloat32 import InFloat32
from layers.PrefixCache import Prefix

Prompts = Sequence[Sequence[int]]


class NoLLM(nn.Module):
    """Stands in for a `FrozenLLM` if the LLM is not run: returns the patches unchanged."""

    uses_prefix = False

    def forward(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, d_llm) -> (B, P, d_llm)."""
        return patches

    def limitations(self) -> list[str]:
        """Return no lines."""
        return []


class FrozenLLM(nn.Module):
    """Run prompts and patches through a language model that is never trained and never saved.

    In a causal model a prompt does not attend to the patches, and no trainable layer precedes it, so its keys and
    values are constants. The prefix that all prompts share is run once, the rest of each distinct prompt without
    gradient, and only the patches with gradient, attending to both. The layout of a row is
    [shared prefix][left padding][rest of the prompt][right padding][patches].

    Args:
        backbone: a Hugging Face model without a head, on `device`, its parameters frozen.
        padding: `left` masks the padding and counts positions from the first real token, so that a forecast does not
            depend on the rest of the batch. `right` pads between prompt and patches, and the padding is attended to,
            as in Time-LLM.
        pad_id: the id of the padding token.
        examples: token ids of two or more prompts that have as little in common as possible.
        patches: P, the number of patches after each prompt.
        device: the device of the backbone; its token embeddings may be on another.
        use_prefix: whether prompts may be run before the patches; otherwise both in one pass, as in Time-LLM.
        recompute: whether to recompute the activations of each block in the backward pass.

    Attributes:
        shared_prefix: the tokens that all prompts begin with.
        padding_leaks: whether masked padding changes the results; then prompts are run in groups of equal length.
        uses_prefix: whether prompts are run before the patches.
        prefix_disabled_reason: why the prefix cache of a causal model was disabled by the self-test; else empty.
    """

    def __init__(
        self,
        backbone: nn.Module,
        padding: str,
        pad_id: int,
        examples: Prompts,
        patches: int,
        device: torch.device,
        use_prefix: bool = True,
        recompute: bool = False,
    ):
        super().__init__()
        # Not registered as a submodule: `train()` cannot enable its dropout, `float()` and `to()` cannot break 4-bit
        # weights, and no state dict, optimizer or process group contains it.
        object.__setattr__(self, "backbone", backbone.eval())
        self.padding = padding
        self.pad_id = pad_id
        self.shared_prefix = self.shared_prefix_of(examples)
        self._shared_cache: Prefix | None = None
        self._window = getattr(backbone.config.get_text_config(), "sliding_window", None)
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self._uses_additive_mask = self.padding_leaks = self.uses_prefix = False
        self.prefix_disabled_reason = ""
        if recompute:
            for block in self.blocks(backbone):
                block.forward = partial(_checkpointed, block.forward)
        if device.type == "meta":  # a memory plan has no values to compare
            self.uses_prefix = use_prefix and _is_declared_causal(backbone)
            return
        # In float32: a wrong position changes hidden states by as little as 0.1%, less than the rounding of 16 bits.
        is_float32 = all(one.dtype == torch.float32 for one in backbone.parameters())
        with nullcontext() if is_float32 else InFloat32():
            self._self_test(examples[:2], patches, use_prefix, device)
        self._shared_cache = None  # it is in float32

    @property
    def token_embeddings(self) -> torch.Tensor:
        """The token embeddings of the vocabulary, (V, d_llm)."""
        return self.backbone.get_input_embeddings().weight

    @staticmethod
    def blocks(backbone: nn.Module) -> list[nn.Module]:
        """List the blocks that support gradient checkpointing."""
        return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    @staticmethod
    def shared_prefix_of(prompts: Prompts) -> list[int]:
        """Find the tokens that all prompts begin with."""
        columns = zip(*prompts, strict=False)
        return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]

    def forward(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Token ids of each prompt and patches (B, P, d_llm) -> hidden states of the patches, (B, P, d_llm)."""
        longest = max(map(len, prompts)) + patches.shape[1]
        within_window = self._window is None or longest <= self._window
        run = self._run_after_prefix if self.uses_prefix and within_window else self._run_in_one_pass
        # The LLM computes in the precision in which it was loaded, whatever the precision of the other layers.
        device = patches.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            if self.token_embeddings.dtype != torch.float16:
                return self._run_by_length(run, prompts, patches)
            scale = GradientScale()
            return scale.after(self._run_by_length(run, prompts, scale.before(patches)))

    def limitations(self) -> list[str]:
        """List the limitations of this LLM, a printable line each."""
        lines = []
        if self.padding_leaks:
            lines.append("This LLM cannot mask pads: prompts of one length are run together (slower, as exact)")
        if reason := self.prefix_disabled_reason:
            lines.append(f"No prefix cache ({reason}): prompt and patches in one pass (slower, as exact)")
        return lines

    def prefix_bytes(self, tokens: int) -> int:
        """Compute the size in bytes of the keys and values of `tokens` prompt tokens."""
        device = self.token_embeddings.device
        is_real, first = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, 1, dtype=torch.long)
        one_token = self._extend(self._empty_prefix(), first, is_real, first.to(device))
        return tokens * sum(layer.keys.nbytes + layer.values.nbytes for layer in one_token.layers)

    def _run_by_length(self, run: Callable, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Run the whole batch at once or, if padding leaks, in groups of prompts of equal length."""
        if not self.padding_leaks:
            return run(prompts, patches)
        length_of = [len(prompt) for prompt in prompts].__getitem__
        rows = sorted(range(len(prompts)), key=length_of)
        groups = [list(group) for _, group in groupby(rows, key=length_of)]
        order = torch.tensor(rows)
        parts = patches[send(order, patches.device)].split([len(group) for group in groups])
        hidden = [run([prompts[row] for row in group], part) for group, part in zip(groups, parts, strict=True)]
        return torch.cat(hidden)[send(order.argsort(), patches.device)]

    def _run_in_one_pass(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Run prompts and patches together."""
        # With a causal model transformers inspects the mask and the positions, which waits for the GPU once or twice.
        ids, is_real = self._pad(prompts)
        tokens = self._embed(ids, patches.device)
        masks = {}
        if self.padding == "left" and not is_real.all():
            is_real = functional.pad(is_real, (0, patches.shape[1]), value=1)  # (B, L + P)
            masks["attention_mask"] = _padding_mask(is_real, tokens.dtype) if self._uses_additive_mask else is_real
            if self._takes_positions:
                masks["position_ids"] = (is_real.cumsum(-1) - 1).clamp(min=0)
        hidden = self.backbone(
            inputs_embeds=torch.cat([tokens, patches.to(tokens.dtype)], dim=1),
            use_cache=False,
            **{name: send(values, patches.device) for name, values in masks.items()},
        ).last_hidden_state
        return hidden[:, -patches.shape[1] :].to(patches.dtype)

    def _run_after_prefix(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Run each distinct prompt without gradient, then the patches."""
        device, count = patches.device, patches.shape[1]
        share_prefix = all(list(prompt[: len(self.shared_prefix)]) == self.shared_prefix for prompt in prompts)
        shared = self._cache_of_shared_prefix(device) if share_prefix else self._empty_prefix()
        rests = [tuple(prompt[len(shared) :]) for prompt in prompts]
        distinct = {rest: number for number, rest in enumerate(dict.fromkeys(rests))}
        ids, is_real = self._pad(list(distinct))
        if self.padding == "right":
            is_real = torch.ones_like(is_real)
        is_real = send(functional.pad(is_real, (len(shared), count), value=1), device).bool()  # (distinct, L + P)
        positions = (is_real.long().cumsum(-1) - 1).clamp(min=0)
        prefix = shared
        if ids.shape[1]:
            prefix = self._extend(shared, ids, is_real[:, :-count], positions[:, len(shared) : -count])
        if len(distinct) < len(prompts):  # several windows have the same prompt
            rows = send(torch.tensor([distinct[rest] for rest in rests]), device)
            is_real, positions = is_real[rows], positions[rows]
            prefix = prefix.select(rows) if ids.shape[1] else shared
        hidden = prefix.run(
            self.backbone,
            inputs_embeds=patches.to(self.token_embeddings.dtype),
            attention_mask=_causal_mask(is_real, count, self.token_embeddings.dtype),
            position_ids=positions[:, -count:],
        )
        return hidden.to(patches.dtype)

    def _extend(self, prefix: Prefix, ids: torch.Tensor, is_real: torch.Tensor, positions: torch.Tensor) -> Prefix:
        return prefix.extend(
            self.backbone,
            inputs_embeds=self._embed(ids, positions.device),
            attention_mask=_causal_mask(is_real, ids.shape[1], self.token_embeddings.dtype),
            position_ids=positions,
        )

    def _cache_of_shared_prefix(self, device: torch.device) -> Prefix:
        """Run the shared prefix when it is first needed."""
        if not self.shared_prefix:
            return self._empty_prefix()
        if self._shared_cache is None:
            ids = torch.tensor([self.shared_prefix])
            positions = torch.arange(ids.shape[1], device=device)[None]
            is_real = torch.ones_like(positions, dtype=torch.bool)
            self._shared_cache = self._extend(self._empty_prefix(), ids, is_real, positions)
        return self._shared_cache

    def _empty_prefix(self) -> Prefix:
        return Prefix.empty(self.backbone.config.get_text_config().num_hidden_layers)

    def _embed(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Look up token embeddings on their own device, (B, L) -> (B, L, d_llm) on `device`."""
        return send(self.backbone.get_input_embeddings()(send(ids, self.token_embeddings.device)), device)

    def _pad(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad prompts to token ids (B, L) and a mask, 1 for real tokens, (B, L), on the CPU."""
        pad = partial(pad_sequence, batch_first=True, padding_side=self.padding)
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        return pad(rows, padding_value=self.pad_id), pad([torch.ones_like(row) for row in rows])

    @torch.no_grad()
    def _self_test(self, prompts: Prompts, patches: int, use_prefix: bool, device: torch.device) -> None:
        """Test padding, masks and the prefix cache with two prompts, and token embeddings in place of patches."""
        embeddings = self.token_embeddings
        inputs = embeddings[torch.arange(patches) % len(embeddings)].float().to(device).expand(len(prompts), -1, -1)
        reference = self._run_in_one_pass(prompts, inputs)
        if self.padding == "left":
            self._uses_additive_mask = _may_use_additive_mask(self.backbone) and self._additive_mask_works(
                prompts, inputs, reference
            )
            alone = torch.cat([self._run_in_one_pass([prompt], inputs[:1]) for prompt in prompts])
            self.padding_leaks = not _allclose(reference, alone)
            reference = alone
        if not use_prefix or not self._is_causal(prompts[0], inputs[:1]):
            return
        if not self._takes_positions:
            self.prefix_disabled_reason = "the model takes no position_ids"
            return
        self.uses_prefix = True
        try:
            if not _allclose(self(prompts, inputs), reference):
                self.prefix_disabled_reason = "it gives other hidden states"
        except Exception as problem:  # of any type: the reason is printed at start
            self.prefix_disabled_reason = f"{type(problem).__name__}: {problem}"
        self.uses_prefix = not self.prefix_disabled_reason

    def _additive_mask_works(self, prompts: Prompts, patches: torch.Tensor, reference: torch.Tensor) -> bool:
        """Return whether an additive attention mask gives the same hidden states."""
        self._uses_additive_mask = True
        try:
            return _allclose(self._run_in_one_pass(prompts, patches), reference)
        except Exception:  # of any type: the usual mask is as exact
            return False

    def _is_causal(self, prompt: Sequence[int], patches: torch.Tensor) -> bool:
        """Return whether a change of the last patch leaves the hidden states before it unchanged."""
        changed = patches.clone()
        changed[:, -1] = -changed[:, -1].flip(-1)
        return _allclose(*(self._run_in_one_pass([prompt], values)[:, :-1] for values in (patches, changed)))


def _causal_mask(is_real: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """Build the additive causal mask of the last positions, (B, 1, queries, K), given the real ones, (B, K) bool."""
    positions = torch.arange(is_real.shape[1], device=is_real.device)
    visible = is_real[:, None] & (positions <= positions[-queries:, None])  # (B, queries, K)
    mask = torch.zeros(visible.shape, dtype=dtype, device=is_real.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _padding_mask(is_real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Build the additive mask that hides padding, (B, K), 0 for padding -> (B, 1, 1, K)."""
    return torch.zeros(is_real.shape, dtype=dtype).masked_fill_(is_real == 0, torch.finfo(dtype).min)[:, None, None]


def _may_use_additive_mask(backbone: nn.Module) -> bool:
    """Return whether a bidirectional model may accept an additive attention mask."""
    # Given a mask of real tokens instead, transformers checks whether all are real, which waits for the GPU.
    # A model with sliding windows needs the masks that transformers builds.
    has = partial(hasattr, sys.modules[type(backbone).__module__])
    has_sliding_window = has("create_bidirectional_sliding_window_mask")
    return has("create_bidirectional_mask") and not has_sliding_window and not _is_declared_causal(backbone)


def _checkpointed(forward: Callable, *args, **kwargs):
    """Run a block with gradient checkpointing."""
    # That of transformers works only in training mode, which enables dropout, and it disables the cache.
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _is_declared_causal(backbone: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) for module in backbone.modules())


def _allclose(result: torch.Tensor, reference: torch.Tensor) -> bool:
    """Return whether two results are equal up to float32 rounding."""
    return bool((result - reference).norm() <= 1e-4 * reference.norm())
