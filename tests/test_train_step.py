"""The arithmetic of a step: micro-batches change nothing, clipping bounds, a NaN anywhere shows."""

from contextlib import nullcontext

import pytest
import torch

from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.train.step import backward, clip, cross_entropy, evaluate

CONFIG = DecoderConfig(vocab_size=11, width=8, layers=1, heads=2, hidden=8, context=6)


@pytest.fixture
def model():
    return Decoder(CONFIG).double()


@pytest.fixture
def batch():
    tokens = torch.randint(0, 11, (4, 7))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model, batch, pieces):
    model.zero_grad()
    loss = backward(model, *batch, pieces=pieces, precision=nullcontext())
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_give_the_loss_and_gradient_of_the_batch(model, batch, pieces):
    whole, wanted = gradients(model, batch, 1)
    parts, got = gradients(model, batch, pieces)
    # The loss is computed in float32; 10 x the worst of 200 draws.
    assert abs(whole - parts) < 2e-6
    assert all((x - y).abs().max() < 2e-6 for x, y in zip(wanted, got, strict=True))


@pytest.mark.parametrize("piece", [0, 3])
def test_a_nan_in_one_micro_batch_shows_in_the_loss(model, batch, piece):
    spoil = iter(range(4))
    model.register_forward_hook(
        lambda module, inputs, logits: logits * torch.nan if next(spoil) == piece else logits
    )
    loss, grads = gradients(model, batch, 4)
    assert loss.isnan()
    assert any(grad.isnan().any() for grad in grads)


def test_loss_is_the_mean_of_minus_the_log_probabilities(model, batch):
    log_p = model(batch[0]).log_softmax(-1)
    wanted = -log_p.gather(-1, batch[1][..., None]).mean()
    assert abs(cross_entropy(model, *batch) - wanted) < 1e-5


def test_clip_returns_the_norm_and_bounds_it():
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip([parameter], None) == 5 and parameter.grad.norm() == 5
    assert clip([parameter], 1.0) == 5
    assert abs(parameter.grad.norm() - 1) < 1e-5


def test_evaluate_sums_over_all_tokens_and_returns_to_training(model, batch):
    empty = (batch[0][:0], batch[1][:0])
    loss, count = evaluate(model, [batch, empty])
    assert count == 24
    assert abs(loss / count - cross_entropy(model, *batch).item()) < 1e-5
    assert model.training and all(p.grad is None for p in model.parameters())
