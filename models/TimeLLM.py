"""Time-LLM (Jin et al., ICLR 2024): forecasting by reprogramming a frozen large language model."""

import argparse
from typing import Self

import torch
from torch import nn

from data_provider.windows import WindowDataset
from layers.Embed import PatchEmbedding
from layers.FlattenHead import FlattenHead
from layers.FrozenLLM import FrozenLLM, NoLLM
from layers.LinearResidual import LinearResidual, NoResidual
from layers.Reprogramming import CompactMappingLayer, MappingLayer, ReprogrammingLayer
from layers.StandardNorm import Normalize
from models.forecaster import Forecaster
from utils.errors import UserError
from utils.llm.choice import LLMFlags, choose_llm
from utils.llm.loading import LoadedLLM, load_llm
from utils.llm.meta import llm_without_weights
from utils.llm.prompt import DEFAULT_DESCRIPTION, NoPrompts, PromptBuilder, load_description


class Model(Forecaster):
    """The model of the paper's figure 2; only the small layers around the LLM are trained and saved.

    Args:
        configs: the parsed flags of `run_main.py`.
        llm: the frozen LLM and its tokenizer; None loads the one that the flags name.
        basis: the basis of the compact mapping layer from a checkpoint; None computes it.

    Raises:
        UserError: if the LLM or the description of the data is missing or does not fit the flags.
    """

    def __init__(self, configs: argparse.Namespace, llm: LoadedLLM | None = None, basis: torch.Tensor | None = None):
        llm = llm or load_llm(LLMFlags.of(configs))
        super().__init__(llm.device)
        description = load_description(configs.content, configs.prompt_file, configs.prompt_domain, configs.data)
        self.llm_info = llm
        self.description = None if configs.ablation == "no_llm" else description
        self.has_ett_data = configs.data.startswith("ETT")
        self.layer_rates = {"mapping_layer": configs.mapping_rate, "residual": configs.residual_rate}
        self.starts_fitted = configs.residual == "linear"
        self.d_ff = configs.d_ff
        d_llm = llm.identity.hidden_size
        if configs.d_ff > d_llm:
            raise UserError(f"--d_ff {configs.d_ff} is wider than the LLM: give at most {d_llm}, its hidden size")
        self.normalize = Normalize()
        self.patch_embedding = PatchEmbedding(configs.d_model, configs.patch_len, configs.stride, configs.dropout)
        patches = self.patch_embedding.count(configs.seq_len)
        self.prompts, self.llm = _prompts_and_llm(configs, llm, description, patches)
        embeddings, normalized = llm.backbone.get_input_embeddings().weight, configs.normalize_prototypes
        if configs.mapping == "full":
            self.mapping_layer = MappingLayer(embeddings, device=self.device, normalized=normalized)
        else:
            # A basis of another size is that of another LLM; loading the checkpoint will report it.
            basis = basis if basis is not None and len(basis) == d_llm else None
            self.mapping_layer = CompactMappingLayer(embeddings, device=self.device, basis=basis, normalized=normalized)
        self.reprogramming_layer = ReprogrammingLayer(
            configs.d_model, configs.n_heads, configs.d_ff, d_llm, configs.dropout
        )
        self.output_projection = FlattenHead(configs.d_ff, patches, configs.pred_len, configs.dropout)
        self.residual = LinearResidual(configs.seq_len, configs.pred_len) if self.starts_fitted else NoResidual()
        if self.starts_fitted:
            for parameter in self.output_projection.parameters():
                nn.init.zeros_(parameter)  # so that the initial forecast is linear
        self.to(self.device)

    @classmethod
    def without_weights(cls, configs: argparse.Namespace) -> Self:
        """Build the model from meta tensors, with one layer of the LLM; see `Forecaster`."""
        with torch.device("meta"):
            return cls(configs, llm_without_weights(choose_llm(LLMFlags.of(configs)), 1, torch.float32))

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None = None,
        x_dec: torch.Tensor | None = None,
        x_mark_dec: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forecast: (B, seq_len, N) -> (B, pred_len, N), in the units of `x_enc`.

        Each of the N channels is a window of its own. Windows may stay on the CPU for any device, because their
        prompts are written there. The other arguments are Time-LLM's and are ignored.
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

    def fit_residual(self, training: WindowDataset, validation: WindowDataset) -> float | None:
        """Fit the linear residual, if there is one; see `Forecaster`."""
        return self.residual.fit(training.pairs, validation.pairs) if self.starts_fitted else None

    def start_from_line(self, line: torch.Tensor) -> None:
        """Take a line for the linear residual, if there is one; see `Forecaster`."""
        if self.starts_fitted:
            self.residual.linear.weight.data.copy_(line)

    @torch.inference_mode()
    def diagnostics(self, x_enc: torch.Tensor) -> dict[str, float]:
        """Measure the prototypes and the attention to them on windows (B, seq_len, N).

        `attention_entropy` is the entropy of the attention weights in nats, averaged over patches and heads. Initially
        it is near ln 1000 = 6.9; near 0 each patch attends to one prototype. `prototype_rms` is the root mean square of
        the prototypes' entries.
        """
        windows, _ = self.normalize(x_enc.transpose(1, 2).flatten(0, 1).to(self.device))
        was_training, prototypes = self.training, self.mapping_layer()
        self.eval()
        entropies = []
        for window in windows.split(1):  # the attention weights of many would need more memory than a training step
            weights = self.reprogramming_layer.attention(self.patch_embedding(window), prototypes)
            entropies.append(torch.special.entr(weights).sum(-1).mean())
        self.train(was_training)
        return {
            "attention_entropy": torch.stack(entropies).mean().item(),
            "prototype_rms": prototypes.square().mean().sqrt().item(),
        }

    def describe(self) -> list[str]:
        """Name the LLM and its limitations, a printable line each."""
        return [self.llm_info.describe(), *self.llm.limitations()]

    def describe_prompt(self, context: torch.Tensor) -> list[str]:
        """Quote the prompt of a window, (1, seq_len), in a printable line; no line without prompts.

        Raises:
            UserError: if a prompt and the patches exceed the LLM's context length.
        """
        if self.description is None:
            return []
        tokens = len(self.tokenize(context)[0])
        lines = [f"Prompt of the first window ({tokens} tokens): {self.prompts.texts(context)[0]}"]
        if self.description == DEFAULT_DESCRIPTION and not self.has_ett_data:
            lines.append(
                "Note: this prompt tells the LLM that the data are those of a power transformer (ETT), Time-LLM's"
                " default: describe yours with --content"
            )
        return lines

    def tokenize(self, windows: torch.Tensor) -> list[list[int]]:
        """Write the prompts of windows, (B, seq_len), as token ids."""
        return self.prompts(windows.detach().cpu())


def _prompts_and_llm(
    configs: argparse.Namespace, llm: LoadedLLM, description: str, patches: int
) -> tuple[PromptBuilder | NoPrompts, FrozenLLM | NoLLM]:
    """Build the prompt builder and the frozen LLM."""
    if configs.ablation == "no_llm":
        return NoPrompts(), NoLLM()
    if configs.gradient_checkpointing and not FrozenLLM.blocks(llm.backbone):
        raise UserError(f"{llm.source} has no blocks to recompute: leave out --gradient_checkpointing")
    prompts = PromptBuilder(
        llm.tokenizer, description, configs.seq_len, configs.pred_len, configs.prompt_decimals, patches, llm.context
    )
    return prompts, FrozenLLM(
        llm.backbone,
        configs.prompt_padding,
        llm.pad_id,
        prompts.examples(),
        patches,
        llm.device,
        use_prefix=not configs.no_prefix_cache,
        recompute=configs.gradient_checkpointing,
    )
