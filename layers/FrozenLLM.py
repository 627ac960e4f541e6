"""The frozen language model: prompts and patches in, hidden states of the patches out.

The only room that knows about padding, masks and positions.
"""

import inspect

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


class FrozenLLM(nn.Module):
    """Run prompts and patches through a language model that is never trained and never saved.

    Args:
        backbone: a Hugging Face model without head, its parameters frozen, on its device.
        padding: `left`: prompts are padded before their first token, pads are masked and positions count
            real tokens, so that a window's result does not depend on its batch-mates. `right`: pads stand
            between prompt and patches and are attended to like words, as in Time-LLM.
        pad_id: the token to pad with.

    Attributes:
        sees_pads: whether masked pads change this model's result all the same.
    """

    def __init__(self, backbone: nn.Module, padding: str, pad_id: int):
        super().__init__()
        # Not registered as a submodule: so `train()` cannot wake its dropout, `float()` and `to()` cannot
        # break 4-bit weights, and no state dict, optimiser or process group ever sees it.
        object.__setattr__(self, "backbone", backbone.eval())
        self.padding = padding
        self.pad_id = pad_id
        self._takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        # Such a model gets no pads: prompts of one length are run together.
        self.sees_pads = padding == "left" and self._try_pads()

    @property
    def word_embeddings(self) -> torch.Tensor:
        """The vocabulary's embeddings, (V, d_llm)."""
        return self.backbone.get_input_embeddings().weight

    def forward(self, prompts: list[list[int]], patches: torch.Tensor) -> torch.Tensor:
        """Token ids of each prompt and patches (B, P, d_llm) -> hidden states of the patches, (B, P, d_llm)."""
        if not self.sees_pads:
            return self._run(prompts, patches)
        rows_of_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of_length.setdefault(len(prompt), []).append(row)
        order = torch.tensor([row for rows in rows_of_length.values() for row in rows], device=patches.device)
        hidden = [self._run([prompts[row] for row in rows], patches[rows]) for rows in rows_of_length.values()]
        return torch.cat(hidden)[order.argsort()]

    def _run(self, prompts: list[list[int]], patches: torch.Tensor) -> torch.Tensor:
        ids, is_real = self._pad(prompts)
        words = self.backbone.get_input_embeddings()(ids.to(patches.device, non_blocking=True))  # (B, L, d_llm)
        hidden = self.backbone(
            inputs_embeds=torch.cat([words, patches.to(words.dtype)], dim=1),
            use_cache=False,
            **self._masks(is_real, patches),
        ).last_hidden_state
        return hidden[:, -patches.shape[1] :].to(patches.dtype)

    def _pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids, (B, L), and which of them are real, on the CPU."""
        rows = [torch.tensor(prompt) for prompt in prompts]
        ids, is_real = (
            pad_sequence(values, batch_first=True, padding_value=padding, padding_side=self.padding)
            for values, padding in ((rows, self.pad_id), ([torch.ones_like(row) for row in rows], 0))
        )
        return ids, is_real

    def _masks(self, is_real: torch.Tensor, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.padding == "right" or is_real.all():
            return {}
        mask = functional.pad(is_real, (0, patches.shape[1]), value=1)  # (B, L + P)
        masks = {"attention_mask": mask}
        if self._takes_positions:
            masks["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return {name: values.to(patches.device, non_blocking=True) for name, values in masks.items()}

    @torch.no_grad()
    def _try_pads(self) -> bool:
        """Return whether a masked pad changes the result: compare a padded row with the same row alone.

        Models that count positions their own way, or have no attention to mask, do.
        """
        words = self.word_embeddings
        prompt = list(range(min(12, len(words) - 1)))
        patches = words[-4:].float().expand(2, -1, -1)
        alone = self._run([prompt[:-4]], patches[:1])
        padded = self._run([prompt[:-4], prompt], patches)[:1]
        tolerance = 1e-3 if words.dtype == torch.float32 else 0.1
        return not torch.allclose(padded, alone, rtol=0, atol=tolerance * alone.abs().max().item())
