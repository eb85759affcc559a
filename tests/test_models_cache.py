"""models.cache: reading token by token gives the logits of reading at once; refusals leave it usable."""

import pytest
import torch

from lowrank_geo.models.cache import causal_mask
from lowrank_geo.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=50, width=24, layers=3, heads=2, hidden=40, context=12)


@pytest.fixture
def model() -> Decoder:
    return Decoder(CONFIG).double()


@pytest.mark.parametrize("pieces", [(1,) * 12, (12,), (5, 1, 1), (1, 4, 7), (3, 0, 2)], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model, pieces):
    tokens = torch.randint(50, (3, sum(pieces)))
    cache = model.new_cache()
    parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-12)
    assert cache.length == sum(pieces)


@torch.no_grad()
def test_a_cached_step_reads_only_the_new_token(model):
    widths = []
    model.blocks[1].mlp.up.register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    cache = model.new_cache()
    for piece in torch.randint(50, (2, 6)).split((4, 1, 1), dim=1):
        model(piece, cache=cache)
    assert widths == [4, 1, 1]


@torch.no_grad()
def test_a_full_cache_refuses_one_more_token_and_stays_as_it_was(model):
    cache, tokens = model.new_cache(), torch.randint(50, (1, 11))
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="at most 12 tokens, got 2 after 11 in the cache; shorten"):
        model(tokens[:, :2], cache=cache)
    model(tokens[:, :1], cache=cache)
    assert cache.length == 12


@torch.no_grad()
def test_refuses_another_batch_and_stays_as_it_was(model):
    cache, tokens = model.new_cache(), torch.randint(50, (2, 4))
    model(tokens[:, :3], cache=cache)
    with pytest.raises(ValueError, match="batch of 2, as in its first call, got 1"):
        model(tokens[:1, 3:], cache=cache)
    last = model(tokens[:, 3:], cache=cache)
    assert torch.allclose(last, model(tokens)[:, 3:], rtol=0, atol=1e-12)


def test_refuses_gradients(model):
    with pytest.raises(RuntimeError, match="gradients to be off .* call it under torch.no_grad"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=model.new_cache())


def test_a_single_query_needs_no_mask():
    assert causal_mask(1, 5, torch.device("cpu")) is None
