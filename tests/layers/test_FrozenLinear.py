import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layers.FrozenLinear import FrozenLinear, freeze_linears, frozen_product
from tests.conftest import largest_difference


@pytest.fixture
def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False), Conv1D(8, 16))
    nn.init.normal_(net[3].bias)
    return net.requires_grad_(False)


def test_frozen_linears_give_the_same_results_and_gradients(small_net):
    frozen = copy.deepcopy(small_net)
    freeze_linears(frozen)
    assert [type(module) for module in frozen] == [FrozenLinear, nn.GELU, FrozenLinear, FrozenLinear]
    results = []
    for net in (small_net, frozen):
        inputs = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = net(inputs)
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad))
    for plain, fast in zip(*results, strict=True):
        assert largest_difference(fast, plain) < 1e-5


def test_the_weights_are_shared_not_copied(small_net):
    addresses = [parameter.data_ptr() for parameter in small_net.parameters()]
    freeze_linears(small_net)
    assert [parameter.data_ptr() for parameter in small_net.parameters()] == addresses


def test_layers_of_other_precision_are_left_alone():
    net = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.float64))
    freeze_linears(net)
    assert [type(module) for module in net] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("rows", [(4,), (2, 3), ()])
def test_product_with_any_leading_shape_and_strides(rows):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(*rows, 12, generator=generator)
    weight = torch.randn(12, 20, generator=generator).T
    assert largest_difference(frozen_product(inputs, weight), inputs @ weight.T) < 1e-5


def test_onednn_can_be_switched_off(monkeypatch):
    called = []
    monkeypatch.setattr("layers.FrozenLinear._by_onednn", lambda *operands: called.append(operands))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    frozen_product(torch.ones(2, 3), torch.ones(4, 3))
    assert not called
