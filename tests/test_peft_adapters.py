"""Adapters on layers of every kind: what is added to the weight, and everything PEFT does with several of them."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import blur, mlp, needs_peft
from tiny_models import relative
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowrank_geo
from lowrank_geo import guard
from lowrank_geo.geometry import Tangent, embed, project
from lowrank_geo.geometry import to_dense as dense
from lowrank_geo.optim import OPTIMIZERS, Polyak, ScheduleFree, build
from lowrank_geo.peft import FixedRankConfig, collect_gradients
from lowrank_geo.peft.deltas import to_matrix
from lowrank_geo.peft.layer import FixedRankLayer
from lowrank_geo.train.step import averaged, descend

ALL = ["0", "2", "4", "6"]
TOL = 2e-6


def config(**changes):
    settings = dict(r=3, init="random", target_modules=ALL)
    return FixedRankConfig(**settings | changes)


def adapted(**changes):
    return get_peft_model(mlp(), config(**changes)).eval()


@pytest.fixture
def x():
    return torch.randint(0, 11, (7, 6))


def adapter_layers(model):
    return [m for m in model.modules() if isinstance(m, FixedRankLayer)]


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: Conv1D(5, 6), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1), (4, 2, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_layer_computes_with_the_weight_plus_scale_times_usv(kind, scale):
    make, shape = KINDS[kind]
    base = make().double()
    x = torch.randint(0, 9, (4, 3)) if shape is None else torch.randn(shape, dtype=torch.float64)
    plain = copy.deepcopy(base)
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], r=2, scale=scale))
    (layer,) = adapter_layers(model)
    (triple,) = layer.triples("default")
    W = to_matrix(plain.weight.detach(), plain) + scale * dense(triple.point).detach()
    wanted = copy.deepcopy(plain)
    with torch.no_grad():
        wanted.weight.copy_(
            W.mT if kind in ("conv1d", "embedding") else W.reshape(wanted.weight.shape)
        )
    assert relative(model(x), wanted(x)) < 1e-14
    assert relative(plain.weight + layer.get_delta_weight("default"), wanted.weight) < 1e-14
    assert layer.in_features * layer.out_features == plain.weight.numel()
    assert layer.weight.data_ptr() == base.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_tangent_gradients_are_the_projected_gradient_of_the_weight(kind):
    make, shape = KINDS[kind]
    base = make().double()
    x = torch.randint(0, 9, (4, 3)) if shape is None else torch.randn(shape, dtype=torch.float64)
    plain = copy.deepcopy(base)
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"], r=2, init="zero"))
    lowrank_geo.param_groups(model)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    (triple,) = adapter_layers(model)[0].triples("default")
    point = type(triple.point)(*(p.detach() for p in triple.point))
    found = embed(point, Tangent(*(p.grad for p in triple.point)))
    wanted = embed(point, project(point, to_matrix(plain.weight.grad, plain)))
    assert relative(found, wanted) < 1e-13


def test_rows_of_padding_get_no_gradient(x):
    model = adapted(target_modules=["0"])
    model(torch.zeros(2, 6, dtype=torch.long)).sum().backward()
    (triple,) = adapter_layers(model)[0].triples("default")
    assert all(p.grad.abs().max() == 0 for p in triple.point)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_finitely_from_a_zero_core(name, x):
    model = adapted(init="zero").train()
    optimizer = build(name, model, total_steps=3)
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        descend(optimizer, loss.item())
        optimizer.zero_grad()
        losses.append(loss.item())
    with averaged(optimizer):
        for layer in adapter_layers(model):
            change = layer.get_delta_weight("default")
            assert torch.isfinite(change).all() and change.norm() > 0
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


def test_the_groups_hold_the_triples_of_the_active_adapter_alone():
    model = adapted()
    model.add_adapter("other", config(r=2))
    groups = lowrank_geo.param_groups(model)
    (fixed,) = [g for g in groups if g["geometry"] == "fixed_rank"]
    triples = [t for layer in adapter_layers(model) for t in layer.triples("default")]
    assert [id(p) for p in fixed["params"]] == [id(p) for t in triples for p in t.point]
    assert all(guard.is_marked(p) for p in fixed["params"])
    others = [p for layer in adapter_layers(model) for t in layer.triples("other") for p in t.point]
    assert not any(guard.is_marked(p) for p in others)


def test_a_foreign_optimizer_is_refused_on_tangent_gradients(x):
    model = adapted().train()
    lowrank_geo.param_groups(model)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW.step needs ordinary gradients, got tangent"):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


def test_a_foreign_optimizer_trains_an_adapter_that_was_not_marked(x):
    model = adapted(init="zero").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = model(x).square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < before


def test_pissa_starts_at_the_model_and_along_the_principal_part_of_the_weight(x):
    expected = mlp()(x)
    model = adapted(init="pissa", scale=0.5)
    assert relative(model(x), expected) < TOL
    for layer in adapter_layers(model):
        (triple,) = layer.triples("default")
        W = to_matrix(layer.get_base_layer().weight.detach(), layer.get_base_layer())
        sigma = torch.linalg.svdvals(W)[:3]
        assert torch.allclose(0.5 * triple.S.detach().diagonal(), sigma, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_a_trained_pissa_adapter_saves_loads_and_merges(x, tmp_path):
    model = adapted(init="pissa")
    blur(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert relative(loaded.merge_and_unload()(x), expected) < TOL


def test_the_gradient_start_holds_the_principal_directions_of_the_gradient(x, tmp_path):
    settings = config(init="gradient")
    base, plain = mlp(), mlp()
    flags = [p.requires_grad for p in base.parameters()]
    collect_gradients(base, settings, lambda model: model(x).square().sum().backward())
    assert flags == [p.requires_grad for p in base.parameters()]
    assert all(p.grad is None for p in base.parameters())
    model = get_peft_model(base, settings).eval()
    assert torch.equal(model(x), plain(x))
    plain(x).square().sum().backward()
    for layer, index in zip(adapter_layers(model), ALL, strict=True):
        dense_layer = plain[int(index)]
        G = to_matrix(dense_layer.weight.grad, dense_layer)
        (triple,) = layer.triples("default")
        kept = triple.U.mT @ G @ triple.V
        sigma = torch.linalg.svdvals(G)[:3]
        assert torch.allclose(torch.linalg.svdvals(kept), sigma, rtol=1e-4, atol=1e-5)
        assert triple.S.abs().max() == 0
        assert not hasattr(layer.get_base_layer(), "_lowrank_geo_gradient")
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(x), model(x))


def test_rank_pattern_and_scale_do_not_depend_on_each_other(x):
    model = adapted(rank_pattern={"4": 2, "6": 1}, r=4)
    assert [layer.fixed_rank_r["default"] for layer in adapter_layers(model)] == [4, 4, 2, 1]
    assert {layer.fixed_rank_scale["default"] for layer in adapter_layers(model)} == {1.0}


def test_dropout_drops_in_training_alone(x):
    model = adapted(dropout=0.5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@needs_peft(0, 21, "saves biases of methods from outside")
@pytest.mark.parametrize("bias", ["none", "all", "fixed_rank_only"])
def test_biases_are_trained_and_saved_as_asked(bias, x, tmp_path):
    model = adapted(bias=bias, target_modules=["2", "4"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(trained) == {"none": 0, "all": 3, "fixed_rank_only": 2}[bias]
    blur(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(x), model(x))


def test_a_module_to_save_is_trained_saved_and_not_adapted(x, tmp_path):
    model = adapted(modules_to_save=["6"], target_modules=["2", "4"])
    assert len(adapter_layers(model)) == 2
    groups = lowrank_geo.param_groups(model)
    assert sorted(g["geometry"] for g in groups) == ["euclidean", "fixed_rank", "matrix"]
    blur(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(x), model(x))


@needs_peft(0, 20, "saves the adapter of the exact name alone")
@pytest.mark.parametrize("name", ["fixed", "delta", "U", "fixed_rank_delta", "6"])
def test_adapter_names_may_be_parts_of_other_names(name, x, tmp_path):
    model = get_peft_model(mlp(), config(), adapter_name="first").eval()
    with (
        pytest.warns(UserWarning, match="should not be contained") if name == "fixed" else nothing()
    ):
        model.add_adapter(name, config(r=2))
    model.set_adapter(name)
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / name, adapter_name="again")
    assert torch.equal(loaded(x), expected)


class nothing:  # noqa: N801 (as contextlib.nullcontext)
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_merging_in_turn_together_and_twice(x):
    model = adapted()
    model.add_adapter("other", config(r=2))
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    together, in_turn = copy.deepcopy(model), copy.deepcopy(model)
    together.merge_adapter(["default", "other"])
    in_turn.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="Already following adapters were merged other"):
        in_turn.merge_adapter(["default"])
    assert relative(together(x), expected) < TOL and relative(in_turn(x), expected) < TOL
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        together.merge_adapter()
    assert relative(together(x), expected) < TOL
    together.unmerge_adapter()
    assert relative(together(x), expected) < TOL
    with pytest.warns(UserWarning, match="Already unmerged"):
        together.unmerge_adapter()


def test_unmerging_restores_the_weight():
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in before:
            assert relative(parameter, before[name]) < 1e-6


def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(x):
    model = adapted()
    last = adapter_layers(model)[-1]
    with torch.no_grad():
        last.triples("default")[0].S[0, 0] = float("nan")
    weight = last.get_base_layer().weight.detach().clone()
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(last.get_base_layer().weight, weight)


def test_disabling_a_merged_adapter_gives_the_base(x):
    expected, model = mlp()(x), adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert relative(model(x), expected) < TOL


def test_deleting_the_active_an_inactive_and_an_unknown_adapter(x):
    model = adapted()
    first = model(x)
    model.add_adapter("other", config(r=2))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and not torch.equal(model(x), first)
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")


@needs_peft(0, 21, "refuses to delete merged adapters")
def test_a_merged_adapter_is_not_deleted():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter.*while they are merged"):
        model.delete_adapter("default")


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_the_weighted_sum_of_adapters(combination, x):
    model = adapted(scale=0.5)
    model.add_adapter("other", config(r=2, target_modules=["2", "4"], scale=2.0))
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination)
    model.set_adapter("sum")
    for layer in adapter_layers(model):
        exact = 0.7 * layer.get_delta_weight("default")
        if "other" in layer.fixed_rank_delta:
            exact = exact - 0.4 * layer.get_delta_weight("other")
        found = layer.get_delta_weight("sum")
        if combination == "cat":
            assert relative(found, exact) < 1e-5
        else:
            base = layer.get_base_layer()
            lost = torch.linalg.svdvals(to_matrix(exact, base))[3:].norm()
            assert abs((found - exact).norm() - lost) < 1e-5 * exact.norm()
        (triple,) = layer.triples("sum")
        assert (triple.U.mT @ triple.U - torch.eye(triple.rank)).abs().max() < 1e-5
    assert torch.isfinite(model(x)).all()


def test_the_scale_of_an_adapter_can_be_changed_and_restored(x):
    model = adapted()
    base, full = mlp()(x), model(x)
    model.base_model.set_adapter_scale("default", 0.0)
    assert torch.equal(model(x), base)
    model.base_model.set_adapter_scale("default", 1.0)
    assert torch.equal(model(x), full)
    for layer in adapter_layers(model):
        layer.scale_layer(2.0)
        layer.unscale_layer(2.0)
    assert torch.equal(model(x), full)


def test_a_lookup_table_as_large_as_a_vocabulary_is_never_made_dense(x):
    model = get_peft_model(nn.Sequential(nn.Embedding(50_000, 8)), config(target_modules=["0"]))
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()
    (triple,) = adapter_layers(model)[0].triples("default")
    assert triple.V.grad.shape == (50_000, 3)


def test_the_length_of_mixed_adapters_has_to_fit(x):
    model = adapted()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(x, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(x, adapter_names=["nobody"] * 7)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["default"] * 7)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(x, adapter_names=["default"] * 7)


def test_polyak_steps_from_a_zero_core_use_the_loss(x):
    model = adapted(init="zero").train()
    groups = lowrank_geo.param_groups(model, lr=0.1)
    optimizer = ScheduleFree(
        lowrank_geo.optim.RiemannianSGD(groups, momentum=0.0), step_size=Polyak()
    )
    optimizer.train()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert optimizer.last_step_size > 0
