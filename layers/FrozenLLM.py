"""The frozen language model: prompts and patches in, hidden states of the patches out.

The only room that knows about padding, masks and positions.
"""

import inspect

import torch
from torch import nn


class FrozenLLM(nn.Module):
    """Run prompts and patches through a language model that is never trained and never saved.

    Args:
        backbone: a Hugging Face model without head, its parameters frozen, on its device.
        padding: `left`: prompts are padded before their first token, pads are masked and positions count
            real tokens, so that a window's result does not depend on its batch-mates. `right`: pads stand
            between prompt and patches and are attended to like words, as in Time-LLM.
        pad_id: the token that `right` pads with.
    """

    def __init__(self, backbone: nn.Module, padding: str, pad_id: int):
        super().__init__()
        # Not registered as a submodule: so `train()` cannot wake its dropout, `float()` and `to()` cannot
        # break 4-bit weights, and no state dict, optimiser or process group ever sees it.
        object.__setattr__(self, "backbone", backbone.eval())
        self.padding = padding
        self.pad_id = pad_id
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    @property
    def word_embeddings(self) -> torch.Tensor:
        """The vocabulary's embeddings, (V, d_llm)."""
        return self.backbone.get_input_embeddings().weight

    def forward(self, prompts: list[list[int]], patches: torch.Tensor) -> torch.Tensor:
        """Token ids of each prompt and patches (B, P, d_llm) -> hidden states of the patches, (B, P, d_llm)."""
        ids, is_real = self._pad(prompts, patches.device)
        words = self.backbone.get_input_embeddings()(ids)  # (B, L, d_llm)
        hidden = self.backbone(
            inputs_embeds=torch.cat([words, patches.to(words.dtype)], dim=1),
            use_cache=False,
            **self._masks(is_real, patches.shape[1]),
        ).last_hidden_state
        return hidden[:, -patches.shape[1] :].to(patches.dtype)

    def _pad(self, prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids, (B, L), and which of them are real."""
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(prompt) for prompt in prompts],
            batch_first=True,
            padding_value=self.pad_id,
            padding_side=self.padding,
        )
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        positions = torch.arange(ids.shape[1])
        if self.padding == "left":
            is_real = positions >= ids.shape[1] - lengths[:, None]
        else:
            is_real = positions < lengths[:, None]
        return ids.to(device, non_blocking=True), is_real.to(device, non_blocking=True)

    def _masks(self, is_real: torch.Tensor, patches: int) -> dict[str, torch.Tensor]:
        if self.padding == "right":
            return {}
        mask = nn.functional.pad(is_real.long(), (0, patches), value=1)  # (B, L + P)
        masks = {"attention_mask": mask}
        if self._takes_positions:
            masks["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return masks
