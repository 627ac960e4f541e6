import math

import torch

from layers.Embed import PatchEmbedding
from layers.FlattenHead import FlattenHead
from layers.Reprogramming import MappingLayer, ReprogrammingLayer
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


def test_the_head_reads_the_first_features_patches_first():
    head = FlattenHead(features=2, patches=3, pred_len=1, dropout=0.0)
    head.linear.weight.data = torch.tensor([[1.0, 10.0, 100.0, 0.0, 0.0, 0.0]])
    head.linear.bias.data.zero_()
    hidden = torch.tensor([[[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]]])
    assert head(hidden).item() == 1 + 20 + 300
