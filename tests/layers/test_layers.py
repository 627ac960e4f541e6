import hashlib
import math

import pytest
import torch

from layers import DropoutAttention
from layers.Embed import PatchEmbedding
from layers.FlattenHead import FlattenHead
from layers.Reprogramming import CompactMappingLayer, MappingLayer, ReprogrammingLayer
from layers.StandardNorm import Normalize
from tests.conftest import largest_difference


def test_normalize_gives_back_what_it_took_off():
    windows = torch.randn(3, 50).cumsum(-1) * 30 + 1000
    scaled, statistics = Normalize()(windows)
    assert scaled.mean(-1).abs().max() < 1e-3
    torch.testing.assert_close(scaled.std(-1, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(Normalize().inverse(scaled, statistics), windows)


def test_patches_overlap_and_the_last_value_is_repeated():
    embedding = PatchEmbedding(d_model=6, patch_len=4, stride=2, dropout=0.0)
    seen = []
    embedding.value_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert embedding(torch.arange(8.0)[None]).shape == (1, embedding.count(8), 6)
    assert seen[0][0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 7, 7]]


def test_patch_count_is_that_of_the_patches():
    for seq_len in range(16, 60):
        for patch_len, stride in ((16, 8), (5, 3), (4, 7)):
            embedding = PatchEmbedding(2, patch_len, stride, 0.0)
            assert embedding(torch.zeros(1, seq_len)).shape[1] == embedding.count(seq_len)


def test_prototypes_are_mixtures_of_words():
    words = torch.randn(30, 8)
    mapping = MappingLayer(words, num_tokens=5)
    expected = torch.nn.functional.linear(words.T, mapping.weight, mapping.bias).T
    torch.testing.assert_close(mapping(), expected)
    assert set(mapping.state_dict()) == {"weight", "bias"}


def words_with_one_strong_direction(vocabulary=300, width=16):
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 1.0, width)
    return torch.randn(vocabulary, width, generator=generator) * spread + torch.randn(width, generator=generator)


def prototypes_of(layer):
    with torch.no_grad():
        return layer()


def test_the_compact_map_reaches_what_the_full_map_reaches():
    words = words_with_one_strong_direction()
    full, compact = MappingLayer(words, 50), CompactMappingLayer(words, 50)
    assert compact.weight.shape == (50, 16)
    compact.load_state_dict(full.state_dict())  # converts
    assert largest_difference(prototypes_of(compact), prototypes_of(full)) < 1e-5
    again = CompactMappingLayer(words, 50)
    again.load_state_dict(compact.state_dict())
    assert torch.equal(again.weight, compact.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        compact.load_state_dict({"weight": torch.zeros(50, 299), "bias": torch.zeros(50)})


def test_a_compact_map_is_loaded_with_the_basis_it_was_trained_with():
    words = words_with_one_strong_direction()
    trained = CompactMappingLayer(words, 50)
    # In another precision the basis would come out otherwise, by as much as its stretch is rounded.
    loaded = CompactMappingLayer((words * 1.02).bfloat16(), 50)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(prototypes_of(loaded), prototypes_of(trained))
    known = CompactMappingLayer(words, 50, basis=trained.basis)
    assert known.weight.std().item() == pytest.approx(trained.weight.std().item(), rel=0.2)
    earlier = {name: tensor for name, tensor in trained.state_dict().items() if name != "basis"}
    known.load_state_dict(earlier)
    assert torch.equal(prototypes_of(known), prototypes_of(trained))


def prototypes_after_one_step(share):
    """A map over as many words as a real LLM has, after one step of Adam at a rate of 1e-3."""
    torch.manual_seed(0)
    layer = CompactMappingLayer(0.1 * torch.randn(49_152, 64), 100)
    attention = ReprogrammingLayer(d_model=16, n_heads=8, d_keys=32, d_llm=64, dropout=0.0)
    patches, aim = torch.randn(8, 20, 16), torch.randn(8, 20, 64)
    sizes = [prototypes_of(layer).square().mean().sqrt().item()]
    optimizer = torch.optim.Adam(layer.parameters(), lr=share * 1e-3)
    (attention(patches, layer()) - aim).square().mean().backward()
    optimizer.step()
    return [*sizes, prototypes_of(layer).square().mean().sqrt().item()]


def test_at_the_size_of_a_real_vocabulary_one_step_moves_the_prototypes_by_several_times_their_size():
    """Time-LLM's map does so, and ours as far; a rate of its own keeps the step in bounds."""
    before, after = prototypes_after_one_step(share=1)
    assert after > 3 * before
    before, after = prototypes_after_one_step(share=0.01)
    assert after < 1.1 * before


@pytest.mark.parametrize("kind", [MappingLayer, CompactMappingLayer])
def test_normalized_prototypes_are_the_same_in_directions_alone(kind):
    words = words_with_one_strong_direction()
    plain, normalized = kind(words, 50), kind(words, 50, normalized=True)
    normalized.load_state_dict(plain.state_dict())
    mixed, scaled = prototypes_of(plain), prototypes_of(normalized)
    expected = mixed / mixed.square().mean(-1, keepdim=True).sqrt()
    assert largest_difference(scaled, expected) < 1e-5
    assert largest_difference(normalized.token_weights([7]), plain.token_weights([7])) < 1e-9, "in units of the words"
    full, compact = MappingLayer(words, 50, normalized=True), CompactMappingLayer(words, 50, normalized=True)
    compact.load_state_dict(full.state_dict())
    assert largest_difference(prototypes_of(compact), prototypes_of(full)) < 1e-5


def test_patches_look_at_normalized_prototypes_each_in_its_own_way():
    """Of plain ones, as small as an LLM's words, they see little but the mean."""
    spread = {}
    for normalized in (False, True):
        torch.manual_seed(0)
        layer = CompactMappingLayer(0.1 * torch.randn(5000, 64), 1000, normalized=normalized)
        attention = ReprogrammingLayer(d_model=16, n_heads=8, d_keys=32, d_llm=64, dropout=0.0)
        with torch.no_grad():
            reprogrammed = attention(torch.randn(8, 20, 16), layer())
        spread[normalized] = (reprogrammed.std((0, 1)).mean() / reprogrammed.square().mean().sqrt()).item()
    assert spread[False] < 0.01 < 0.1 < spread[True]


def test_the_compact_map_needs_no_full_rank():
    words = words_with_one_strong_direction()
    words[:, 3] = words[:, 2]
    full, compact = MappingLayer(words, 50), CompactMappingLayer(words, 50)
    compact.load_state_dict(full.state_dict())
    assert largest_difference(prototypes_of(compact), prototypes_of(full)) < 1e-4


def test_both_maps_start_alike():
    torch.manual_seed(0)
    words = words_with_one_strong_direction()
    full, compact = (torch.cov(prototypes_of(kind(words, 20_000)).T) for kind in (MappingLayer, CompactMappingLayer))
    assert (compact - full).norm() < 0.05 * full.norm()


def test_adams_first_step_moves_both_maps_as_far():
    """For gradients the scale was not measured with, those that a loss on the prototypes gives."""
    torch.manual_seed(1)
    words = words_with_one_strong_direction()
    aim = torch.randn(200, 16) @ torch.randn(16, 16)
    moved = []
    for kind in (MappingLayer, CompactMappingLayer):
        layer = kind(words, 200)
        before = prototypes_of(layer)
        optimizer = torch.optim.Adam([layer.weight], lr=1e-3)
        (layer() * aim).sum().backward()
        optimizer.step()
        moved.append(prototypes_of(layer) - before)
    full, compact = moved
    assert compact.norm().item() == pytest.approx(full.norm().item(), rel=0.1)
    assert torch.cosine_similarity(full.flatten(), compact.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("kind", [MappingLayer, CompactMappingLayer])
def test_prototypes_are_computed_once_an_evaluation_and_anew_when_they_change(kind):
    layer = kind(words_with_one_strong_direction(), 50)
    with torch.inference_mode():
        first = layer()
        assert layer() is first
    trained = layer()
    assert trained.requires_grad
    trained.sum().backward()
    # As in training; it does not count a tensor's version up.
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()
    with torch.inference_mode():
        second = layer()
        assert not torch.equal(second, first)
        layer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()})
        assert layer().abs().max() == 0


def test_keys_and_values_follow_the_prototypes():
    layer = ReprogrammingLayer(d_model=6, n_heads=3, d_keys=4, d_llm=10, dropout=0.0)
    patches, one, other = torch.randn(2, 5, 6), torch.randn(7, 10), torch.randn(7, 10)
    with torch.no_grad():
        first = layer(patches, one)
        assert torch.equal(layer(patches, one), first)
        assert not torch.equal(layer(patches, other), first)
        assert torch.equal(layer(patches, one), first)
        layer.key_projection.weight.zero_()
        assert not torch.equal(layer(patches, one), first)


def test_reprogramming_is_cross_attention_written_out():
    layer = ReprogrammingLayer(d_model=6, n_heads=3, d_keys=4, d_llm=10, dropout=0.5).eval()
    patches, prototypes = torch.randn(2, 5, 6), torch.randn(7, 10)
    queries = layer.query_projection(patches).view(2, 5, 3, 4)
    keys = layer.key_projection(prototypes).view(7, 3, 4)
    values = layer.value_projection(prototypes).view(7, 3, 4)
    weights = (torch.einsum("bphe,she->bhps", queries, keys) / math.sqrt(4)).softmax(-1)
    mixed = torch.einsum("bhps,she->bphe", weights, values).reshape(2, 5, 12)
    assert largest_difference(layer(patches, prototypes), layer.out_projection(mixed)) < 1e-5


def test_reprogramming_drops_attention_in_training_alone():
    layer = ReprogrammingLayer(d_model=6, n_heads=3, d_keys=4, d_llm=10, dropout=0.5)
    patches, prototypes = torch.randn(2, 5, 6), torch.randn(7, 10)
    assert not torch.equal(layer(patches, prototypes), layer(patches, prototypes))
    layer.eval()
    assert torch.equal(layer(patches, prototypes), layer(patches, prototypes))


def test_attention_with_dropout_is_attention_whose_dropped_weights_are_zero(monkeypatch):
    monkeypatch.setattr(DropoutAttention, "_WEIGHTS_AT_A_TIME", 3 * 7 * 2)  # two queries at a time
    queries, keys, values = (torch.randn(3, count, 4, requires_grad=True) for count in (5, 7, 7))
    torch.manual_seed(1)
    mixed = DropoutAttention.attention_with_dropout(queries, keys, values, dropout=0.25, scale=0.5)
    torch.manual_seed(1)
    kept = DropoutAttention._draw_kept((3, 5, 7), 2**14, queries.device)
    written_out = ((0.5 * queries @ keys.mT).softmax(-1) * kept / 0.75) @ values
    assert largest_difference(mixed, written_out) < 1e-5
    gradient = torch.randn_like(mixed)
    inputs = (queries, keys, values)
    for own, expected in zip(
        *(torch.autograd.grad(out, inputs, gradient) for out in (mixed, written_out)), strict=True
    ):
        assert largest_difference(own, expected) < 1e-5


def test_dropped_weights_depend_on_torchs_seed_alone_and_are_as_many_as_asked():
    torch.manual_seed(3)
    kept = DropoutAttention._draw_kept((8, 64, 1000), round(0.1 * 2**16), torch.device("cpu"))
    assert kept.float().mean() == pytest.approx(0.9, abs=0.001)
    assert kept.float().mean(dim=(0, 1)).std() < 0.02  # evenly over the keys: 0.013 by chance
    assert hashlib.sha256(kept.numpy().tobytes()).hexdigest().startswith("5bd56965ddd7b237")


def test_the_head_reads_the_first_features_patches_first():
    head = FlattenHead(features=2, patches=3, pred_len=1, dropout=0.0)
    head.linear.weight.data = torch.tensor([[1.0, 10.0, 100.0, 0.0, 0.0, 0.0]])
    head.linear.bias.data.zero_()
    hidden = torch.tensor([[[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]])
    assert head(hidden).item() == 1 + 20 + 300
