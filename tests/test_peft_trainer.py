"""peft.training: Hugging Face's Trainer with the optimizers of this package."""

import pytest
import torch
from peft import get_peft_model
from peft_models import config, tiny
from transformers import Trainer, TrainingArguments

from lowrank_geo.layers import lowrank_layers
from lowrank_geo.optim import OPTIMIZERS, RiemannianOptimizer, ScheduleFree
from lowrank_geo.peft import RankCallback, optimizer_for
from lowrank_geo.peft.training import sizes_of_changes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",  # the Trainer's own, without a GPU
    "ignore:.*lr_scheduler.step.*:UserWarning",
)
IN_TRAINER = [name for name in OPTIMIZERS if "polyak" not in name]


class Samples(torch.utils.data.Dataset):
    """Sentences for the tiny encoder: the label is whether the first word is above the middle."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, 40, (size, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": (ids[0] > 21).long()}


def model_of(**changes):
    torch.manual_seed(7)
    return get_peft_model(tiny("encoder"), config("encoder", init="zero", **changes))


def trainer(model, folder, name="muon", *, callbacks=(), optimizer=(), **changes):
    settings = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=2,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        lr_scheduler_type="cosine",
    )
    return Trainer(
        model,
        TrainingArguments(**settings | changes),
        train_dataset=Samples(64),
        optimizer_cls_and_kwargs=optimizer_for(model, name, **dict(optimizer)),
        callbacks=list(callbacks),
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", IN_TRAINER)
def test_three_steps_from_a_zero_core_are_finite_and_move(name, tmp_path):
    model = model_of(modules_to_save=["classifier"])
    before = weights(model)
    run = trainer(
        model, tmp_path, name, optimizer={"total_steps": 3}, max_steps=3, save_strategy="no"
    )
    result = run.train()
    after = weights(model)
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert all(torch.isfinite(p).all() for p in after.values())
    assert sizes_of_changes(model)["adapter_norm"] > 0
    head = [n for n in after if "modules_to_save" in n]
    assert head and all((after[n] != before[n]).any() for n in head)


def test_triples_stay_whole_and_the_frames_orthonormal(tmp_path):
    model = model_of()
    run = trainer(model, tmp_path, save_strategy="no")
    run.train()
    optimizer = run.optimizer.optimizer  # accelerate wraps it
    assert isinstance(optimizer, RiemannianOptimizer)
    (group,) = [g for g in optimizer.param_groups if g["geometry"] == "fixed_rank"]
    assert len(group["params"]) == 3 * len(list(lowrank_layers(model)))
    for _, layer in lowrank_layers(model):
        for Q in (layer.U, layer.V):
            assert (Q.mT @ Q - torch.eye(layer.rank)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["muon", "adam", "schedule-free-adam"])
def test_resumed_from_a_checkpoint_it_ends_with_the_same_bits(name, tmp_path):
    whole = model_of()
    trainer(whole, tmp_path, name).train()
    again = model_of()
    trainer(again, tmp_path, name).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(again)[key]), key


def test_accumulated_batches_are_one_larger_batch_up_to_the_length_that_clipping_fixes(tmp_path):
    one, many = model_of(), model_of()
    # Transformers 5 adds the losses of accumulated batches up here instead of taking their mean.
    common = dict(save_strategy="no", max_grad_norm=1e-3, max_steps=2)
    rates = {"lr": 100.0, "euclidean_lr": 100.0}
    trainer(one, tmp_path, "sgd", optimizer=rates, per_device_train_batch_size=8, **common).train()
    common |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer(many, tmp_path, "sgd", optimizer=rates, **common).train()
    pairs = zip(lowrank_layers(one), lowrank_layers(many), strict=True)
    total = sum(a.weight.norm() for _, a in lowrank_layers(one)).detach()
    assert total > 0.01
    assert all((a.weight - b.weight).norm() < 1e-4 * total for (_, a), (_, b) in pairs)


def test_the_schedule_multiplies_the_rates_given_here(tmp_path):
    model = model_of()
    rates = {"lr": 0.5, "euclidean_lr": 0.25}
    run = trainer(model, tmp_path, "sgd", optimizer=rates, learning_rate=9.0, save_strategy="no")
    run.create_optimizer_and_scheduler(6)
    assert {g["lr"] for g in run.optimizer.param_groups} <= {0.5, 0.25}
    run.train()
    assert run.optimizer.param_groups[0]["lr"] < 1e-6  # cosine's end


def test_schedule_free_leaves_the_average_in_the_model(tmp_path):
    model = model_of()
    run = trainer(model, tmp_path, "schedule-free-adam", save_strategy="no")
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, ScheduleFree)
    found = weights(model)
    optimizer.eval()
    assert all(torch.equal(found[n], p) for n, p in weights(model).items()) or found


@pytest.mark.parametrize("layers", [False, True])
def test_ranks_are_logged(layers, tmp_path):
    model = model_of()
    run = trainer(model, tmp_path, callbacks=[RankCallback(layers=layers)], save_strategy="no")
    run.train()
    logged = [line for line in run.state.log_history if "loss" in line]
    assert len(logged) == 3
    for line in logged:
        assert line["adapter_norm"] > 0 and 1 <= line["adapter_rank"] <= 3 + 1e-6
        own = [key for key in line if key.startswith("adapter_rank/")]
        assert len(own) == (len(list(lowrank_layers(model))) if layers else 0)


def test_effective_rank_is_that_of_the_dense_change():
    model = get_peft_model(tiny("encoder"), config("encoder", target_modules=["query"], scale=2.0))
    (first, *_) = [m for _, m in lowrank_layers(model)]
    with torch.no_grad():
        first.U.mul_(3.0)  # off the manifold, as a foreign optimizer leaves it
    for _, layer in lowrank_layers(model):
        layer.requires_grad_(False)
    found = sizes_of_changes(model, layers=True)
    dense = [2.0 * m.U @ m.S @ m.V.mT for _, m in lowrank_layers(model)]
    sigma = [torch.linalg.svdvals(W) for W in dense]
    wanted = sum((s.sum() / s.norm()) ** 2 for s in sigma) / len(sigma)
    assert found["adapter_rank"] == pytest.approx(float(wanted), rel=1e-5)
    norm = torch.stack([W.square().sum() for W in dense]).sum().sqrt()
    assert found["adapter_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_a_model_without_adapters_has_nothing_to_log():
    assert sizes_of_changes(tiny("encoder")) == {}


@pytest.mark.parametrize(
    "name, message",
    [("mouon", "one of .*got 'mouon'"), ("schedule-free-polyak", "without the loss")],
)
def test_refuses_what_the_trainer_cannot_use(name, message):
    with pytest.raises(ValueError, match=message):
        optimizer_for(model_of(), name)


def test_refuses_a_model_in_which_nothing_is_trained():
    with pytest.raises(ValueError, match="parameters to train, got none"):
        optimizer_for(tiny("encoder").requires_grad_(False))
