"""Time-LLM (Jin et al., ICLR 2024): forecasting by reprogramming a frozen large language model."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from data_provider.windows import evenly_spaced
from layers.Embed import PatchEmbedding
from layers.FlattenHead import FlattenHead
from layers.FrozenLLM import FrozenLLM, NoLLM
from layers.LinearResidual import LinearResidual, NoResidual
from layers.Reprogramming import CompactMappingLayer, MappingLayer, ReprogrammingLayer
from layers.StandardNorm import Normalize
from utils.errors import UserError
from utils.llm.loading import LLMFlags, LoadedLLM, load_llm
from utils.llm.prompt import NoPrompts, PromptBuilder, load_description
from utils.runs.scores import ChannelWindows

# Windows that the linear residual is fitted to at most, and how many are read at a time.
_FITTED_WINDOWS = 200_000
_FITTED_WITH_GAPS = 50_000  # they are read several times
_FITTED_AT_ONCE = 4096


@dataclass(frozen=True)
class Parts:
    """What the model is built around.

    Attributes:
        llm: the frozen LLM and its tokenizer.
        description: of the data set, for the prompts.
        basis: of the compact map, if it is known, from a checkpoint; None works it out.
    """

    llm: LoadedLLM
    description: str
    basis: torch.Tensor | None = None


def load_parts(configs: argparse.Namespace, basis: torch.Tensor | None = None) -> Parts:
    """Load the parts that the flags name.

    Raises:
        UserError: if the LLM or the description is not there, or does not fit the flags.
    """
    return Parts(load_llm(LLMFlags.of(configs)), _description(configs), basis)


class Model(nn.Module):
    """The model of the paper's figure 2; only the small layers around the LLM are trained and saved.

    Args:
        configs: the parsed flags of `run_main.py`.
        parts: what it is built around; None loads what the flags name.

    Raises:
        UserError: if the flags do not fit the LLM.
    """

    def __init__(self, configs: argparse.Namespace, parts: Parts | None = None):
        super().__init__()
        parts = parts or load_parts(configs)
        self.llm_info = parts.llm
        self.description = None if configs.ablation == "no_llm" else parts.description
        self.d_ff = configs.d_ff
        self.pred_len = configs.pred_len
        d_llm = parts.llm.identity.hidden_size
        if configs.d_ff > d_llm:
            raise UserError(f"--d_ff {configs.d_ff} is wider than the LLM: give at most {d_llm}, its hidden size")
        self.normalize = Normalize()
        self.patch_embedding = PatchEmbedding(configs.d_model, configs.patch_len, configs.stride, configs.dropout)
        patches = self.patch_embedding.count(configs.seq_len)
        self.prompts, self.llm = _prompts_and_llm(configs, parts, patches)
        embeddings = parts.llm.backbone.get_input_embeddings().weight
        if configs.mapping == "full":
            self.mapping_layer = MappingLayer(embeddings, device=self.device, normalized=configs.normalize_prototypes)
        else:
            # A basis of another width is another LLM's, as loading the checkpoint will say.
            basis = parts.basis if parts.basis is not None and len(parts.basis) == d_llm else None
            self.mapping_layer = CompactMappingLayer(
                embeddings, device=self.device, basis=basis, normalized=configs.normalize_prototypes
            )
        self.reprogramming_layer = ReprogrammingLayer(
            configs.d_model, configs.n_heads, configs.d_ff, d_llm, configs.dropout
        )
        self.output_projection = FlattenHead(configs.d_ff, patches, configs.pred_len, configs.dropout)
        self.residual: LinearResidual | NoResidual = NoResidual()
        if configs.residual == "linear":
            self.residual = LinearResidual(configs.seq_len, configs.pred_len)
            self.output_projection.start_at_zero()  # so that the forecast begins as the line's
        self.to(self.device)

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N), in the units of `x_enc`.

        Each of the N channels is a window of its own. Windows may stay on the CPU whatever the device: their
        prompts are written there. The other arguments are Time-LLM's and are not looked at.
        """
        windows = x_enc.transpose(1, 2).flatten(0, 1)  # (B*N, seq_len)
        prompts = self.tokenize(windows)  # B*N lists of token ids
        windows, statistics = self.normalize(windows.to(self.device, non_blocking=True))
        patches = self.patch_embedding(windows)  # (B*N, P, d_model)
        prototypes = self.mapping_layer()  # (1000, d_llm)
        patches = self.reprogramming_layer(patches, prototypes)  # (B*N, P, d_llm)
        hidden = self.llm(prompts, patches)  # (B*N, P, d_llm)
        forecast = self.output_projection(hidden[..., : self.d_ff])  # (B*N, pred_len)
        forecast = self.residual(forecast, windows)
        forecast = self.normalize.inverse(forecast, statistics)
        return forecast.unflatten(0, (len(x_enc), -1)).transpose(1, 2)  # (B, pred_len, N)

    def start_from(self, training: ChannelWindows, validation: ChannelWindows) -> float:
        """Fit the linear residual before training: the forecast begins as its.

        Args:
            training: windows to fit it to, (B, seq_len, 1) and what follows.
            validation: windows to choose its penalty by.

        Returns:
            Its mean squared error on those, of all channels.
        """
        return self.residual.fit(partial(self._pairs, training), partial(self._pairs, validation))

    def _pairs(self, windows: ChannelWindows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield contexts (B, seq_len) and what follows them, (B, pred_len), of windows spread evenly over all."""
        numbers = evenly_spaced(len(windows), _FITTED_WITH_GAPS if windows.has_gaps else _FITTED_WINDOWS)
        for some in np.array_split(numbers, math.ceil(len(numbers) / _FITTED_AT_ONCE)):
            context, following, *_ = windows.__getitems__(some)
            yield context[..., 0], following[:, -self.pred_len :, 0]

    @torch.inference_mode()
    def map_state(self, x_enc: torch.Tensor) -> dict[str, float]:
        """Return whether the map to the prototypes is sound, measured on windows (B, seq_len, N).

        `attention_entropy`: of a patch's shares of the prototypes, in nats, the mean over patches and heads. It begins
        near ln 1000 = 6.9; near 0 each patch is one prototype. `prototype_rms`: the size of their entries.
        """
        windows, _ = self.normalize(x_enc.transpose(1, 2).flatten(0, 1).to(self.device))
        was_training, prototypes = self.training, self.mapping_layer()
        self.eval()
        entropies = []
        for window in windows.split(1):  # one by one: the shares of many would need more memory than a training step
            shares = self.reprogramming_layer.attention(self.patch_embedding(window), prototypes)
            entropies.append(torch.special.entr(shares).sum(-1).mean())
        self.train(was_training)
        return {
            "attention_entropy": torch.stack(entropies).mean().item(),
            "prototype_rms": prototypes.square().mean().sqrt().item(),
        }

    @property
    def device(self) -> torch.device:
        """Where the LLM is, and the layers around it."""
        return self.llm_info.device

    def tokenize(self, windows: torch.Tensor) -> list[list[int]]:
        """Return the token ids of the prompts of windows (B, seq_len)."""
        return self.prompts(windows.detach().cpu())


def build_around(configs: argparse.Namespace, llm: LoadedLLM) -> Model:
    """Return the model that the flags describe, built around an LLM that is loaded, or a stand-in for one."""
    return Model(configs, Parts(llm, _description(configs)))


def _description(configs: argparse.Namespace) -> str:
    return load_description(configs.content, configs.prompt_file, configs.prompt_domain, configs.data)


def _prompts_and_llm(
    configs: argparse.Namespace, parts: Parts, patches: int
) -> tuple[PromptBuilder | NoPrompts, FrozenLLM | NoLLM]:
    """Return what writes the prompts of windows and what runs them with their patches."""
    llm = parts.llm
    if configs.ablation == "no_llm":
        return NoPrompts(), NoLLM()
    if configs.gradient_checkpointing and not FrozenLLM.blocks(llm.backbone):
        raise UserError(f"{llm.source} has no blocks to recompute: leave out --gradient_checkpointing")
    prompts = PromptBuilder(
        llm.tokenizer,
        parts.description,
        configs.seq_len,
        configs.pred_len,
        configs.prompt_decimals,
        patches,
        llm.context,
    )
    frozen = FrozenLLM(
        llm.backbone,
        configs.prompt_padding,
        llm.pad_id,
        prompts.examples(),
        patches,
        llm.device,
        use_prefix=not configs.no_prefix_cache,
        recompute=configs.gradient_checkpointing,
    )
    return prompts, frozen
