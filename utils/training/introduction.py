"""What a run says before it starts."""

from accelerate import Accelerator
from torch import nn

from utils.llm.loading import llm_of
from utils.training.evaluation import Split


def introduce(accelerator: Accelerator, model: nn.Module, splits: dict[str, Split], eval_windows: int) -> None:
    """Print the LLM, the parameters, the windows and one prompt.

    Raises:
        UserError: if a prompt and the patches do not fit into the LLM.
    """
    llm = llm_of(model)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    if llm:
        accelerator.print(llm.describe())
        for line in model.llm.limitations():
            accelerator.print(line)
    frozen = llm.backbone.num_parameters() if llm else 0
    accelerator.print(f"Parameters: {trainable:,} trainable, {frozen:,} frozen")
    counts = ", ".join(f"{name} {len(split.windows)}" for name, split in splits.items())
    windows = splits["train"].windows
    accelerator.print(f"Windows: {counts}, of {len(windows.channels)} channels")
    if eval_windows:
        accelerator.print(f"Evaluating on at most {eval_windows} evenly spaced windows (--eval_windows)")
    if llm and model.llm.reads_prompts:
        context = windows.__getitems__([0])[0][..., 0]
        tokens = len(model.tokenize(context)[0])
        accelerator.print(f"Prompt of the first window ({tokens} tokens): {model.prompts.texts(context)[0]}")
