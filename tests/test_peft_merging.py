"""Several adapters merged, deleted and combined, in every family of models; layer by layer in test_peft_adapters."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft_models import FAMILIES, batch, config, logits, needs_peft, tiny
from tiny_models import relative

from lowrank_geo.peft.deltas import to_matrix
from lowrank_geo.peft.layer import FixedRankLayer

every_family = pytest.mark.parametrize("family", FAMILIES)
TOL = 4e-6  # twice that of one adapter


@pytest.fixture
def both(family):
    """A model with the adapters "default" and "other"."""
    model = get_peft_model(tiny(family), config(family, task_type=None))
    model.add_adapter("other", config(family, task_type=None, r=2))
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, FixedRankLayer)]


@every_family
def test_merging_together_in_turn_and_again_is_one_sum(family, both):
    inputs = batch(family)
    both.base_model.set_adapter(["default", "other"])
    expected = logits(both, inputs)
    together, in_turn = copy.deepcopy(both), copy.deepcopy(both)
    together.merge_adapter(["default", "other"])
    in_turn.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        in_turn.merge_adapter(["other"])
    for model in (together, in_turn):
        assert relative(logits(model, inputs), expected) < TOL
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter(["default", "other"])
        assert relative(logits(model, inputs), expected) < TOL
    unloaded = both.merge_and_unload(adapter_names=["default", "other"])
    assert relative(logits(unloaded, inputs), expected) < TOL


@every_family
def test_merging_one_adapter_leaves_out_the_other(family, both):
    inputs = batch(family)
    both.set_adapter("other")
    expected = logits(both, inputs)
    both.set_adapter("default")
    merged = both.merge_and_unload(adapter_names=["other"])
    assert relative(logits(merged, inputs), expected) < TOL


@every_family
def test_a_disabled_merged_adapter_is_the_base(family, both):
    inputs = batch(family)
    both.merge_adapter()
    with both.disable_adapter():
        assert relative(logits(both, inputs), logits(tiny(family), inputs)) < TOL


@every_family
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_what_is_not_finite_is_not_merged_safely_in_any_layer(family, both, merge):
    adapted = layers(both)
    with torch.no_grad():
        adapted[-1].triples("other")[0].S[0, 0] = float("inf")
    weights = [layer.get_base_layer().weight.detach().clone() for layer in adapted]
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter other"):
        getattr(both, merge)(safe_merge=True, adapter_names=["default", "other"])
    assert layers(both) == adapted and not any(layer.merged for layer in adapted)
    for layer, weight in zip(adapted, weights, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("family", ["decoder"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_an_unknown_adapter_is_not_merged_as_nothing(family, both, merge):
    adapted = layers(both)
    with pytest.raises(ValueError, match="Adapter missing does not exist"):
        getattr(both, merge)(adapter_names=["default", "missing"])
    with pytest.raises(TypeError, match="should be a list of strings, got 'default'"):
        getattr(both, merge)(adapter_names="default")
    assert layers(both) == adapted and not any(layer.merged for layer in adapted)


@every_family
def test_active_inactive_and_unknown_adapters_are_deleted_or_refused(family, both):
    inputs = batch(family)
    first = logits(both, inputs)
    both.set_adapter("other")
    second = logits(both, inputs)
    both.delete_adapter("default")
    assert torch.equal(logits(both, inputs), second) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        both.delete_adapter("default")
    both.add_adapter("third", config(family, task_type=None))
    with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
        both.delete_adapter("other")
    assert both.active_adapters == ["third"] and set(both.peft_config) == {"third"}


@needs_peft(0, 21, "refuses to delete merged adapters")
@every_family
def test_a_merged_adapter_is_not_deleted(family, both):
    both.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter.*while they are merged"):
        both.delete_adapter("default")


@every_family
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_weighted_sum_changes_the_weights_by_the_sum(family, both, combination):
    both.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination)
    both.add_weighted_adapter(["default"], [1.0], "same", combination)
    for layer in layers(both):
        exact = 0.7 * layer.get_delta_weight("default") - 0.4 * layer.get_delta_weight("other")
        sigma = torch.linalg.svdvals(to_matrix(exact, layer.get_base_layer()))
        lost = sigma[3:].norm() if combination == "svd" else 0.0  # all but rank 3 of 5
        error = (layer.get_delta_weight("sum") - exact).norm()
        assert abs(error - lost) < 1e-5 * sigma[0]
        assert relative(layer.get_delta_weight("same"), layer.get_delta_weight("default")) < 1e-5
    alone = logits(both, batch(family))
    both.set_adapter("same")
    assert relative(logits(both, batch(family)), alone) < 1e-5


@every_family
def test_a_second_adapter_with_biases_is_refused_and_changes_nothing(family):
    model = get_peft_model(tiny(family), config(family, task_type=None, bias="all")).eval()
    before = logits(model, batch(family))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("biased", config(family, task_type=None, bias="all"))
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits(model, batch(family)), before)


@needs_peft(0, 21, "refuses a second adapter of one name")
@every_family
def test_a_name_is_given_once(family, both):
    before = logits(both, batch(family))
    with pytest.raises(ValueError, match="Adapter with name 'other' already exists"):
        both.add_adapter("other", config(family, task_type=None, r=1))
    assert torch.equal(logits(both, batch(family)), before)
