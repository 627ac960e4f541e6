import pytest
import torch

from layers.GradientScale import GradientScale


def through_half_precision(values, matrix, scale=None):
    if scale is None:
        return (values.half() @ matrix.half()).float()
    return scale.after((scale.before(values).half() @ matrix.half()).float())


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1.0, 1e7, 1e15])
def test_gradients_of_any_size_pass_through_half_precision(size):
    generator = torch.Generator().manual_seed(0)
    values, matrix = (torch.randn(8, 8, generator=generator) for _ in range(2))
    gradient = size * torch.randn(8, 8, generator=generator)
    values.requires_grad_()
    through_half_precision(values, matrix, GradientScale()).backward(gradient)
    exact = gradient @ matrix.T
    assert (values.grad - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("size", [1e-7, 1e-6, 2e-5, 1.0, 1e4])
def test_gradients_that_come_in_half_precision_keep_their_digits(size):
    """As under float16's autocast: a power of two for them does not fit into float16 itself."""
    values = torch.ones(8, 8, dtype=torch.float16, requires_grad=True)
    scale = GradientScale()
    gradient = torch.full((8, 8), size, dtype=torch.float16)
    scale.after(scale.before(values) * 1).backward(gradient)
    torch.testing.assert_close(values.grad, gradient)


def test_without_it_small_gradients_vanish():
    values = torch.ones(8, 8, requires_grad=True)
    through_half_precision(values, torch.ones(8, 8)).backward(torch.full((8, 8), 1e-9))
    assert not values.grad.any()


def test_no_gradient_stays_no_gradient():
    values = torch.ones(4, 4, requires_grad=True)
    through_half_precision(values, torch.ones(4, 4), GradientScale()).backward(torch.zeros(4, 4))
    assert values.grad.isfinite().all() and not values.grad.any()


def test_an_infinite_gradient_is_not_hidden():
    values = torch.ones(4, 4, requires_grad=True)
    through_half_precision(values, torch.ones(4, 4), GradientScale()).backward(torch.full((4, 4), torch.inf))
    assert not values.grad.isfinite().all()
