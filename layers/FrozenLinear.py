"""Products with frozen matrices, by the fastest available kernel."""

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class FrozenLinear(nn.Module):
    """A linear layer with frozen weight (out, in) and bias (out,) or None; gradients flow to its input alone."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return frozen_product(inputs, self.weight, self.bias)


def freeze_linears(model: nn.Module) -> None:
    """Replace every float32 linear layer on the CPU by a `FrozenLinear` that shares its weights.

    Other layers stay: torch has fast kernels for half precision, and bitsandbytes has its own for 4 bits.
    """
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or not _is_float32_on_cpu(module.weight):
            continue
        weight = module.weight if type(module) is nn.Linear else module.weight.T  # GPT-2's Conv1D has (in, out)
        model.set_submodule(name, FrozenLinear(weight, module.bias))


def frozen_product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute inputs @ weight.T + bias, with a gradient for `inputs` alone.

    For float32 on a CPU torch calls MKL, which does not use the wide vector registers of CPUs that are not Intel's.
    oneDNN is more than twice as fast on AMD's Zen 5. `torch.backends.mkldnn.enabled = False` selects MKL.

    Args:
        inputs: (..., in).
        weight: (out, in), with any strides.
        bias: (out,) or None.
    """
    use_onednn = (
        torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _is_float32_on_cpu(inputs)
        and _is_float32_on_cpu(weight)
        and not torch.is_autocast_enabled("cpu")
    )
    return _OneDNNProduct.apply(inputs, weight, bias) if use_onednn else functional.linear(inputs, weight, bias)


def _is_float32_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


class _OneDNNProduct(torch.autograd.Function):
    """inputs @ weight.T + bias, and the gradient of `inputs`."""

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _by_onednn(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _by_onednn(gradient, weight.T, None), None, None


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
