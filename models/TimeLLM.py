"""Time-LLM (Jin et al., ICLR 2024): forecasting by reprogramming a frozen large language model."""

import argparse

import torch
from torch import nn

from layers.Embed import PatchEmbedding
from layers.FlattenHead import FlattenHead
from layers.FrozenLLM import FrozenLLM
from layers.Reprogramming import CompactMappingLayer, MappingLayer, ReprogrammingLayer
from layers.StandardNorm import Normalize
from utils.errors import UserError
from utils.llm.loading import LoadedLLM, load_llm
from utils.llm.prompt import PromptBuilder, load_description


class Model(nn.Module):
    """The model of the paper's figure 2; only the small layers around the LLM are trained and saved.

    Args:
        configs: the parsed flags of `run_main.py`.
        llm: an LLM that is loaded already; None loads the one that the flags name.
        basis: of the compact map, if it is known, from a checkpoint; None works it out.

    Raises:
        UserError: if the flags do not fit the LLM.
    """

    def __init__(self, configs: argparse.Namespace, llm: LoadedLLM | None = None, basis: torch.Tensor | None = None):
        super().__init__()
        self.llm_info = llm or load_llm(configs)
        d_llm = self.llm_info.identity.hidden_size
        if configs.d_ff > d_llm:
            raise UserError(f"--d_ff {configs.d_ff} is wider than the LLM: give at most {d_llm}, its hidden size")
        if configs.gradient_checkpointing and not FrozenLLM.blocks(self.llm_info.backbone):
            raise UserError(f"{self.llm_info.source} has no blocks to recompute: leave out --gradient_checkpointing")
        self.d_ff = configs.d_ff
        self.normalize = Normalize()
        self.patch_embedding = PatchEmbedding(configs.d_model, configs.patch_len, configs.stride, configs.dropout)
        patches = self.patch_embedding.count(configs.seq_len)
        self.prompts = PromptBuilder(
            self.llm_info.tokenizer,
            load_description(configs),
            configs.seq_len,
            configs.pred_len,
            configs.prompt_decimals,
            patches,
            self.llm_info.context,
        )
        self.llm = None  # --ablation no_llm
        if configs.ablation != "no_llm":
            self.llm = FrozenLLM(
                self.llm_info.backbone,
                configs.prompt_padding,
                self.llm_info.pad_id,
                self.prompts.examples(),
                patches,
                self.device,
                use_prefix=not configs.no_prefix_cache,
                recompute=configs.gradient_checkpointing,
            )
        words = self.llm_info.backbone.get_input_embeddings().weight
        if configs.mapping == "full":
            self.mapping_layer = MappingLayer(words, device=self.device)
        else:
            fits = basis is not None and len(basis) == d_llm  # else it is another LLM's, as loading will say
            self.mapping_layer = CompactMappingLayer(words, device=self.device, basis=basis if fits else None)
        self.reprogramming_layer = ReprogrammingLayer(
            configs.d_model, configs.n_heads, configs.d_ff, d_llm, configs.dropout
        )
        self.output_projection = FlattenHead(configs.d_ff, patches, configs.pred_len, configs.dropout)
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
        prompts = self.tokenize(windows) if self.llm else []  # B*N lists of token ids
        windows, statistics = self.normalize(windows.to(self.device, non_blocking=True))
        patches = self.patch_embedding(windows)  # (B*N, P, d_model)
        prototypes = self.mapping_layer()  # (1000, d_llm)
        patches = self.reprogramming_layer(patches, prototypes)  # (B*N, P, d_llm)
        hidden = self.llm(prompts, patches) if self.llm else patches  # (B*N, P, d_llm)
        forecast = self.output_projection(hidden[..., : self.d_ff])  # (B*N, pred_len)
        forecast = self.normalize.inverse(forecast, statistics)
        return forecast.unflatten(0, (len(x_enc), -1)).transpose(1, 2)  # (B, pred_len, N)

    @torch.inference_mode()
    def map_state(self, x_enc: torch.Tensor) -> dict[str, float]:
        """Return whether the map to the prototypes is sound, measured on windows (B, seq_len, N).

        `attention_entropy`: of a patch's shares of the prototypes, in nats, the mean over patches and heads. It begins
        near ln 1000 = 6.9; near 0 each patch is one prototype. `prototype_rms`: the size of their entries.
        """
        windows, _ = self.normalize(x_enc.transpose(1, 2).flatten(0, 1).to(self.device))
        was_training, prototypes = self.training, self.mapping_layer()
        self.eval()
        shares = self.reprogramming_layer.attention(self.patch_embedding(windows), prototypes)
        self.train(was_training)
        return {
            "attention_entropy": torch.special.entr(shares).sum(-1).mean().item(),
            "prototype_rms": prototypes.square().mean().sqrt().item(),
        }

    @property
    def device(self) -> torch.device:
        """Where the LLM is, and the layers around it."""
        return self.llm_info.device

    def tokenize(self, windows: torch.Tensor) -> list[list[int]]:
        """Return the token ids of the prompts of windows (B, seq_len)."""
        return self.prompts(windows.detach().cpu())
