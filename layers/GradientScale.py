"""Gradient scaling around a float16 model."""

import torch


class GradientScale:
    """Scale the gradient that enters a model's backward pass, and unscale the gradient that leaves it.

    The gradient of a mean over thousands of values underflows in float16. Here its largest entry is scaled to between
    1 and 2 by a power of two, which is exact. The factor is computed for each backward pass on the device: there is no
    state to save, and no step is skipped. It is applied in float32: for gradients below 2^-16 it overflows in float16.

    Use one object per pass: `before` on the inputs of the model, `after` on its outputs. Both return them unchanged.
    """

    def __init__(self):
        self._factor: torch.Tensor | None = None

    def before(self, inputs: torch.Tensor) -> torch.Tensor:
        """Mark the inputs of the model."""
        return _GradientHook.apply(inputs, self._unscale)

    def after(self, outputs: torch.Tensor) -> torch.Tensor:
        """Mark the outputs of the model."""
        return _GradientHook.apply(outputs, self._scale)

    def _scale(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.abs().amax().float()
        self._factor = torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0)
        return (gradient.float() * self._factor).to(gradient.dtype)

    def _unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient.float() / self._factor).to(gradient.dtype)


class _GradientHook(torch.autograd.Function):
    """The identity, with a function applied to the gradient."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, hook) -> torch.Tensor:
        ctx.hook = hook
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.hook(gradient), None
