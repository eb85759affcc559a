"""Optimizers of ours in Hugging Face's Trainer: groups, accumulation, clipping, resuming, logs, two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import batch, logits, tiny
from tiny_models import relative
from torch import nn
from trainer_run import lora_trainer, model, trained, trainer

from lowrank_geo.optim import OPTIMIZERS
from lowrank_geo.peft import FixedRankConfig, RankCallback, optimizer_for
from lowrank_geo.peft.layer import FixedRankLayer

THOROUGH = pytest.mark.thorough
NAMES = [name for name in OPTIMIZERS if not name.endswith("-polyak")]
RESUMED = ["muon", "adam", "adamw", "schedule-free-adam", "fsgdm"]


@pytest.mark.parametrize(
    "name", [name if name in RESUMED else pytest.param(name, marks=THOROUGH) for name in NAMES]
)
def test_every_optimizer_trains_in_the_trainer(name, tmp_path):
    run = trainer(tmp_path, name, max_steps=2, save_steps=100)
    before = trained(run.model)
    run.train()
    after = trained(run.model)
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert any(not torch.equal(after[key], before[key]) for key in before if key.endswith(".S"))


def test_the_groups_keep_triples_and_put_the_head_off_the_manifold():
    net = model()
    cls, settings = optimizer_for(net, "muon", lr=0.5, euclidean_lr=0.25, weight_decay=0.1)
    groups = settings["params"]
    assert [g["geometry"] for g in groups] == ["fixed_rank", "euclidean", "euclidean"]
    assert [g["lr"] for g in groups] == [0.5, 0.25, 0.25]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert [g["betas"] for g in groups] == 3 * [(0.9, 0.999)]
    assert issubclass(cls, torch.optim.Optimizer)
    assert type(cls(groups)).__name__ == "RiemannianMuon"
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in net.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("qhadam", [(2.0, [4, 4]), (4.0, [2])]),
        ("schedule-free-adam", [(2.0, [4, 4]), (4.0, [2])]),
        ("lion", [(0.5, [4, 2, 4])]),
    ],
)
def test_one_rate_serves_ranks_that_differ(name, wanted):
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 8))
    config = FixedRankConfig(r=4, target_modules=["0", "1", "2"], rank_pattern={"1": 2})
    cls, settings = optimizer_for(get_peft_model(layers, config), name, lr=0.5)
    groups = cls(**settings).param_groups  # takes whole triples only
    assert [(g["lr"], [len(S) for S in g["params"][1::3]]) for g in groups] == wanted
    assert [len(g["layers"]) for g in groups] == [len(ranks) for _, ranks in wanted]


def test_the_optimizer_and_its_rate_have_defaults():
    cls, settings = optimizer_for(model())  # of rank 3
    groups = settings["params"]
    assert cls.__name__ == "Trainer[qhadam]" and groups[0]["lr"] == 5e-3 / 2 * 16 / 3
    free = optimizer_for(model(), max_rms=None)[1]["params"]
    assert free[0]["lr"] == 5e-3 / 4 * 16 / 3  # the bound doubles the best rate
    assert optimizer_for(model(), "muon")[1]["params"][0]["lr"] == 1e-2 / 4


@pytest.mark.parametrize(
    "name, key, bounds",
    [
        ("qhadam", "max_rms", {0.2}),
        ("adam-core", "max_rms", {0.2}),
        ("rmsprop", "max_rms", {None}),
        ("muon", "max_rms", {None}),
        ("qhadam", "max_advance", {0.3}),
        ("adam", "max_advance", {None}),
    ],
)
def test_steps_of_adapters_with_adam_are_bounded(name, key, bounds):
    wrapped = model()
    found = optimizer_for(wrapped, name)[0](**optimizer_for(wrapped, name)[1]).param_groups
    given = {True: set(), False: set()}
    for group in found:
        given[group["geometry"] == "fixed_rank"].add(group.get(key))
    assert given == {True: bounds, False: {None}}
    free = optimizer_for(wrapped, name, **{key: None})[1]["params"]
    assert all(group.get(key) is None for group in free)


@pytest.mark.parametrize(
    "name, betas",
    [
        ("adam", (0.5, 0.6)),
        ("qhadam", (0.5, 0.6)),
        ("adavar", (0.95, 0.975)),
        ("rmsprop", (0.0, 0.95)),
    ],
)
def test_adam_takes_betas_and_methods_that_are_defined_by_theirs_keep_them(name, betas):
    cls, settings = optimizer_for(model(), name, betas=(0.5, 0.6))
    optimizer = cls(**settings)
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {betas}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    straight = trainer(tmp_path / "a", name)
    straight.train()
    resumed = trainer(tmp_path / "b", name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    after, wanted = trained(resumed.model), trained(straight.model)
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


def test_a_resumed_run_of_plain_lora_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    straight = lora_trainer(tmp_path / "a")
    straight.train()
    resumed = lora_trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    after, wanted = trained(resumed.model), trained(straight.model)
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


def test_the_checkpoint_of_a_trainer_is_an_adapter(tmp_path):
    run = trainer(tmp_path)
    run.train()
    loaded = PeftModel.from_pretrained(tiny("encoder"), tmp_path / "checkpoint-6").eval()
    assert torch.equal(logits(loaded, batch("encoder")), logits(run.model.eval(), batch("encoder")))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = trainer(tmp_path / "a", per_device_train_batch_size=16, max_steps=2)
    whole.train()
    pieces = trainer(
        tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=2
    )
    pieces.train()
    after, wanted = trained(pieces.model), trained(whole.model)
    # Muon's steps are discontinuous in the smallest singular values, so rounding is magnified.
    assert all(relative(after[k], wanted[k]) < 2e-2 for k in wanted if k.endswith(("U", "V")))


def test_clipping_shortens_the_riemannian_gradient(tmp_path):
    def change(largest):
        run = trainer(tmp_path, "sgd-plain", max_grad_norm=largest, max_steps=1)
        run.train()
        layers = [m for m in run.model.modules() if isinstance(m, FixedRankLayer)]
        return sum(layer.get_delta_weight("default").square().sum() for layer in layers) ** 0.5

    # The frames turn to the gradient at once, however short the step: from S = 0 only ΔW says how far it went.
    free, clipped = change(1e9), change(1e-4)
    assert 0 < clipped <= 0.02 * 1.001e-4 < 0.1 * free


def test_ranks_and_spectra_are_in_the_logs(tmp_path):
    callback = RankCallback(every=2)
    run = trainer(tmp_path, callbacks=[callback], max_steps=4)
    run.train()
    lines = [line for line in run.state.log_history if "rank/stable" in line]
    assert [line["step"] for line in lines][:2] == [1, 3]
    assert [record["step"] for record in callback.history][:2] == [1, 3]
    spectra = callback.history[-1]["spectra"]
    assert all(s.shape == (3,) for s in spectra.values())
    largest = max(float(s[0]) for s in spectra.values())
    assert callback.history[-1]["rank/largest"] == largest > 0
    assert lines[-1]["rank/drift"] < 1e-5 and 1 <= lines[-1]["rank/stable"] <= 3


def test_what_the_trainer_cannot_give_is_refused():
    with pytest.raises(ValueError, match="optimizer needs to be one of adam, .*, got 'adan'"):
        optimizer_for(model(), "adan")
    with pytest.raises(ValueError, match="needs an optimizer that steps without the loss"):
        optimizer_for(model(), "schedule-free-polyak")
    frozen = model().requires_grad_(False)
    with pytest.raises(ValueError, match="needs a model with trained parameters, got none"):
        optimizer_for(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", pytest.param("lora", marks=THOROUGH)])
def test_two_processes_train_as_one(name, tmp_path):
    script = Path(__file__).with_name("trainer_run.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
    ]
    command = [*launch, str(script), str(tmp_path), name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    settings = dict(per_device_train_batch_size=16, max_steps=3, save_steps=100)
    if name == "lora":
        alone = lora_trainer(tmp_path / "one", **settings)
    else:
        alone = trainer(tmp_path / "one", name, **settings)
    alone.train()
    wanted = trained(alone.model)
    assert all(relative(first[key], wanted[key]) < 1e-3 for key in wanted if wanted[key].norm() > 0)
