"""Keep gradients in the range of float16 while they pass through a float16 model."""

import torch


class GradientScale:
    """Scale the gradient that enters a model's backward pass, and unscale it on exit.

    The gradient of a mean over thousands of values lies below float16's smallest number. Here its largest entry
    is brought to between 1 and 2 by a power of two, which changes no digit. The factor is found anew for every
    backward pass, on the device; there is no state to keep, no step to skip, and the optimiser does not notice.
    It is kept and applied in float32: in float16, that for gradients below 2^-16 would be infinite.

    Use one object for one pass: `before` on what goes into the model, `behind` on what comes out.
    """

    def __init__(self):
        self._factor: torch.Tensor | None = None

    def before(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the model as they are."""
        return _Hook.apply(inputs, self._unscale)

    def behind(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model as they are."""
        return _Hook.apply(outputs, self._scale)

    def _scale(self, gradient: torch.Tensor) -> torch.Tensor:
        largest = gradient.abs().amax().float()
        self._factor = torch.where(largest > 0, torch.exp2(-torch.floor(torch.log2(largest))), 1.0)
        return (gradient.float() * self._factor).to(gradient.dtype)

    def _unscale(self, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient.float() / self._factor).to(gradient.dtype)


class _Hook(torch.autograd.Function):
    """The identity, with something done to the gradient."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, change) -> torch.Tensor:
        ctx.change = change
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.change(gradient), None
