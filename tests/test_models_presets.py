"""models.presets: sizes on `meta` against formulas written by hand, and against the table of the plan."""

import pytest
import torch

from lowrank_geo.convert import convert
from lowrank_geo.models import DECODERS, decoder
from lowrank_geo.plan import plan_ranks

PUBLISHED = {"60m": 58, "130m": 134, "350m": 368, "1b": 1339}  # millions, tables of GaLore and CoLA


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_has_the_parameters_of_the_formula(name):
    c = DECODERS[name]
    attention, mlp, norms = 4 * c.width**2, 3 * c.width * c.hidden, 2 * c.width
    formula = 2 * c.vocab_size * c.width + c.layers * (attention + mlp + norms) + c.width
    assert count(decoder(name, device="meta")) == formula


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name):
    assert round(count(decoder(name, device="meta")) / 1e6) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["1m", "2m", "10m", "30m"])
def test_the_small_ones_are_as_large_as_their_name(name):
    assert count(decoder(name, device="meta")) == pytest.approx(int(name[:-1]) * 1e6, rel=0.1)


@pytest.mark.parametrize("name", DECODERS)
def test_counts_after_conversion_equal_the_plan(name):
    model = decoder(name, device="meta")
    dense = count(model)
    plan = plan_ranks(model, budget=0.7)
    assert plan.dense_parameters == dense
    convert(model, plan)
    assert count(model) == plan.parameters <= 0.7 * dense
    assert sum(entry.rank is not None for entry in plan.entries) == 7 * DECODERS[name].layers


def test_the_demo_runs_and_other_vocabularies_and_contexts_fit():
    model = decoder("2m", vocab_size=300, context=20)
    logits = model(torch.randint(300, (1, 20)))
    assert logits.shape == (1, 20, 300) and logits.isfinite().all()
    assert (model.config.width, model.config.layers, model.config.heads) == (192, 4, 6)


def test_refuses_an_unknown_preset():
    with pytest.raises(ValueError, match="preset out of 1m, 2m, 10m, .*, 1b, got '7b'; use one"):
        decoder("7b")


def test_refuses_an_empty_vocabulary():
    with pytest.raises(ValueError, match="vocab_size >= 1, got 0"):
        decoder("1m", vocab_size=0)
