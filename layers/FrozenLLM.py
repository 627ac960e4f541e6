"""The frozen language model: prompts and patches in, hidden states of the patches out.

The only module that handles padding, masks, positions and prefixes.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import takewhile

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
    """Stands for a `FrozenLLM` where none is run: hands the patches on."""

    reads_prompts = uses_prefix = False

    def forward(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, d_llm) -> the same."""
        return patches

    def limitations(self) -> list[str]:
        """Return no lines."""
        return []


class FrozenLLM(nn.Module):
    """Run prompts and patches through a language model that is never trained and never saved.

    A causal model's prompt cannot see the patches, and nothing trainable stands before it: its keys and values
    are constants. So the prefix that all prompts share is run once, the rest of each distinct prompt without gradient,
    and only the patches with gradient, looking back at both. A row is laid out as
    [shared prefix][pads, if left][rest of the prompt][pads, if right][patches].

    Args:
        backbone: a Hugging Face model without head, its parameters frozen, on its device.
        padding: `left`: pads are masked and positions count real tokens, so that a window's result does not
            depend on its batch-mates. `right`: pads stand between prompt and patches and are attended to like
            tokens, as in Time-LLM.
        pad_id: the token to pad with.
        examples: token ids of two or more prompts, as different as prompts can be.
        patches: P, the patches behind each prompt.
        device: where the backbone is; its token embeddings may be elsewhere, tokens are looked up where they are.
        use_prefix: False runs prompt and patches in one pass, as Time-LLM does.
        recompute: keep only what enters each block of the backbone, and compute the block again in backward.

    Attributes:
        shared_prefix: the tokens that all prompts begin with.
        padding_leaks: whether masked pads change this model's result all the same; it then gets no pads: prompts
            of one length are run together.
        uses_prefix: whether prompts are run before the patches.
        prefix_disabled_reason: why they are not, although `use_prefix` is set and the model is causal; else empty.
    """

    reads_prompts = True

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
        # Not registered as a submodule: so `train()` cannot wake its dropout, `float()` and `to()` cannot
        # break 4-bit weights, and no state dict, optimiser or process group ever sees it.
        object.__setattr__(self, "backbone", backbone.eval())
        self.padding = padding
        self.pad_id = pad_id
        self.shared_prefix = self.shared_prefix_of(examples)
        self._shared_cache: Prefix | None = None
        self._window = getattr(backbone.config.get_text_config(), "sliding_window", None)
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        self._takes_scores = False
        self.padding_leaks = self.uses_prefix = False
        self.prefix_disabled_reason = ""
        if recompute:
            for block in self.blocks(backbone):
                block.forward = partial(_checkpointed, block.forward)
        if device.type == "meta":
            # A memory plan has no numbers to compare.
            self.uses_prefix = use_prefix and _calls_itself_causal(backbone)
        else:
            self._self_test(examples[:2], patches, use_prefix, device)

    @property
    def token_embeddings(self) -> torch.Tensor:
        """The vocabulary's embeddings, (V, d_llm)."""
        return self.backbone.get_input_embeddings().weight

    @staticmethod
    def blocks(backbone: nn.Module) -> list[nn.Module]:
        """Return the layers that can be computed again in backward."""
        return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    @staticmethod
    def shared_prefix_of(prompts: Prompts) -> list[int]:
        """Return the tokens that all prompts begin with."""
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        return [tokens[0] for tokens in alike]

    def forward(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Token ids of each prompt and patches (B, P, d_llm) -> hidden states of the patches, (B, P, d_llm)."""
        longest = max(map(len, prompts)) + patches.shape[1]
        within_window = self._window is None or longest <= self._window
        run = self._run_behind_prefix if self.uses_prefix and within_window else self._run_in_one_pass
        # The LLM computes in the precision it was loaded in, whatever the layers around it do.
        device = patches.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            if self.token_embeddings.dtype != torch.float16:
                return self._run_rows(run, prompts, patches)
            scale = GradientScale()
            return scale.behind(self._run_rows(run, prompts, scale.before(patches)))

    def limitations(self) -> list[str]:
        """Return the lines to print about the limitations of this LLM."""
        lines = []
        if self.padding_leaks:
            lines.append("This LLM cannot mask pads: prompts of one length are run together (slower, as exact)")
        if self.prefix_disabled_reason:
            reason = self.prefix_disabled_reason
            lines.append(f"No prefix cache ({reason}): prompt and patches in one pass (slower, as exact)")
        return lines

    def prefix_bytes(self, tokens: int) -> int:
        """Return the size of the keys and values of so many tokens of prompts."""
        device = self.token_embeddings.device
        no_padding, first = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, 1, dtype=torch.long)
        one = self._extend(self._no_prefix(), first, no_padding, first.to(device))
        return tokens * sum(layer.keys.nbytes + layer.values.nbytes for layer in one.layers)

    def _run_rows(self, run: Callable, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Run all rows at once, or those with prompts of one length together."""
        if not self.padding_leaks:
            return run(prompts, patches)
        rows_of_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of_length.setdefault(len(prompt), []).append(row)
        groups = list(rows_of_length.values())
        order = torch.tensor([row for rows in groups for row in rows])
        parts = patches[send(order, patches.device)].split([len(rows) for rows in groups])
        hidden = [run([prompts[row] for row in rows], part) for rows, part in zip(groups, parts, strict=True)]
        return torch.cat(hidden)[send(order.argsort(), patches.device)]

    def _run_in_one_pass(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        """Run prompts and patches together.

        Before the first layer of a causal model transformers asks whether its mask hides anything, or whether its
        positions go on, and waits for the GPU to answer: once or twice a batch.
        """
        ids, is_real = self._pad(prompts)
        tokens = self._embed(ids, patches.device)
        masks = {}
        if self.padding == "left" and not is_real.all():
            is_real = functional.pad(is_real, (0, patches.shape[1]), value=1)  # (B, L + P)
            masks["attention_mask"] = _hide_pads(is_real, tokens.dtype) if self._takes_scores else is_real
            if self._takes_positions:
                masks["position_ids"] = (is_real.cumsum(-1) - 1).clamp(min=0)
        hidden = self.backbone(
            inputs_embeds=torch.cat([tokens, patches.to(tokens.dtype)], dim=1),
            use_cache=False,
            **{name: send(values, patches.device) for name, values in masks.items()},
        ).last_hidden_state
        return hidden[:, -patches.shape[1] :].to(patches.dtype)

    def _run_behind_prefix(self, prompts: Prompts, patches: torch.Tensor) -> torch.Tensor:
        device, count = patches.device, patches.shape[1]
        begins_alike = all(list(prompt[: len(self.shared_prefix)]) == self.shared_prefix for prompt in prompts)
        shared = self._cache_of_shared_prefix(device) if begins_alike else self._no_prefix()
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
        if len(distinct) < len(prompts):  # windows of like statistics: each prompt was run once
            rows = send(torch.tensor([distinct[rest] for rest in rests]), device)
            is_real, positions = is_real[rows], positions[rows]
            prefix = prefix.of_rows(rows) if ids.shape[1] else shared
        hidden = prefix.run(
            self.backbone,
            inputs_embeds=patches.to(self.token_embeddings.dtype),
            attention_mask=_look_back(is_real, count, self.token_embeddings.dtype),
            position_ids=positions[:, -count:],
        )
        return hidden.to(patches.dtype)

    def _extend(self, prefix: Prefix, ids: torch.Tensor, is_real: torch.Tensor, positions: torch.Tensor) -> Prefix:
        return prefix.extend(
            self.backbone,
            inputs_embeds=self._embed(ids, positions.device),
            attention_mask=_look_back(is_real, ids.shape[1], self.token_embeddings.dtype),
            position_ids=positions,
        )

    def _cache_of_shared_prefix(self, device: torch.device) -> Prefix:
        """Run the shared prefix, the first time it is needed."""
        if not self.shared_prefix:
            return self._no_prefix()
        if self._shared_cache is None:
            positions = torch.arange(len(self.shared_prefix), device=device)[None]
            is_real = torch.ones_like(positions, dtype=torch.bool)
            self._shared_cache = self._extend(self._no_prefix(), torch.tensor([self.shared_prefix]), is_real, positions)
        return self._shared_cache

    def _no_prefix(self) -> Prefix:
        return Prefix.empty(self.backbone.config.get_text_config().num_hidden_layers)

    def _embed(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Look tokens up where the embeddings live, (B, L) -> (B, L, d_llm)."""
        return send(self.backbone.get_input_embeddings()(send(ids, self.token_embeddings.device)), device)

    def _pad(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids, (B, L), and which of them are real, on the CPU."""
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        ids, is_real = (
            pad_sequence(values, batch_first=True, padding_value=padding, padding_side=self.padding)
            for values, padding in ((rows, self.pad_id), ([torch.ones_like(row) for row in rows], 0))
        )
        return ids, is_real

    @torch.no_grad()
    def _self_test(self, prompts: Prompts, patches: int, use_prefix: bool, device: torch.device) -> None:
        """Self-test of masking and caching, on two whole prompts and token embeddings in the place of patches.

        In float32: a wrong position changes hidden states by as little as 0.1%, which 16 bits cannot tell from
        rounding.
        """
        with InFloat32():
            self._compare(prompts, patches, use_prefix, device)
        self._shared_cache = None  # it is in float32

    def _compare(self, prompts: Prompts, patches: int, use_prefix: bool, device: torch.device) -> None:
        """Set `padding_leaks`, `uses_prefix` and `prefix_disabled_reason` by what the model says in one pass.

        With masked pads the reference is what it says of each prompt alone.
        """
        embeddings = self.token_embeddings
        stand_ins = embeddings[torch.arange(patches) % len(embeddings)].float().to(device).expand(len(prompts), -1, -1)
        reference = self._run_in_one_pass(prompts, stand_ins)
        if self.padding == "left":
            self._takes_scores = _may_take_scores(self.backbone) and self._agrees_by_scores(
                prompts, stand_ins, reference
            )
            alone = [self._run_in_one_pass([prompt], stand_ins[:1]) for prompt in prompts]
            self.padding_leaks = not _alike(reference, torch.cat(alone))
            reference = torch.cat(alone)
        if not use_prefix or not self._is_causal(prompts[0], stand_ins[:1]):
            return
        if not self._takes_positions:
            self.prefix_disabled_reason = "the model takes no position_ids"
            return
        self.uses_prefix = True
        try:
            if not _alike(self(prompts, stand_ins), reference):
                self.prefix_disabled_reason = "it gives other hidden states"
        except Exception as problem:  # of whatever kind: the line at start says it
            self.prefix_disabled_reason = f"{type(problem).__name__}: {problem}"
        self.uses_prefix = not self.prefix_disabled_reason

    def _agrees_by_scores(self, prompts: Prompts, patches: torch.Tensor, reference: torch.Tensor) -> bool:
        """Return whether the model says the same where its mask is what is added to attention scores."""
        self._takes_scores = True
        try:
            return _alike(self._run_in_one_pass(prompts, patches), reference)
        except Exception:  # of whatever kind: it wants the usual mask, which is as exact
            return False

    def _is_causal(self, prompt: Sequence[int], patches: torch.Tensor) -> bool:
        """Return whether a change of the last patch leaves the patches before it alone."""
        changed = patches.clone()
        changed[:, -1] = -changed[:, -1].flip(-1)
        one, other = (self._run_in_one_pass([prompt], values)[:, :-1] for values in (patches, changed))
        return _alike(one, other)


def _look_back(is_real: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask to add to attention scores: the last `queries` of K positions see real ones up to themselves.

    Args:
        is_real: (B, K) bool.

    Returns:
        (B, 1, queries, K): 0 where a query may look, the lowest number where not.
    """
    positions = torch.arange(is_real.shape[1], device=is_real.device)
    visible = is_real[:, None] & (positions <= positions[-queries:, None])  # (B, queries, K)
    mask = torch.zeros(visible.shape, dtype=dtype, device=is_real.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _may_take_scores(backbone: nn.Module) -> bool:
    """Return whether a model that sees both ways may take the mask that is added to attention scores as it is.

    Of one that says which tokens are real, transformers asks whether all are, and waits for the GPU to answer. Where
    some layers see near tokens alone, only transformers makes the masks.
    """
    makes = partial(hasattr, sys.modules[type(backbone).__module__])
    sees_near_alone = makes("create_bidirectional_sliding_window_mask")
    return makes("create_bidirectional_mask") and not sees_near_alone and not _calls_itself_causal(backbone)


def _hide_pads(is_real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, K), 0 for a pad -> the mask to add to attention scores, (B, 1, 1, K): nobody looks at pads."""
    return torch.zeros(is_real.shape, dtype=dtype).masked_fill_(is_real == 0, torch.finfo(dtype).min)[:, None, None]


def _checkpointed(forward: Callable, *args, **kwargs):
    """Checkpoint a block's activations: keep its input alone and run it again in backward.

    Not by transformers' own switch: that wants the blocks in training mode, where their dropout is awake, and
    takes their cache away.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _calls_itself_causal(backbone: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) for module in backbone.modules())


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two results are equal but for float32's rounding."""
    return bool((one - other).norm() <= 1e-4 * other.norm())
