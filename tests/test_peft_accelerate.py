"""Optimizers of ours in a loop with accelerate, in a Trainer that makes them, and saved and continued by hand."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft_models import batch, tiny
from tiny_models import relative
from torch.utils.data import DataLoader
from trainer_run import Samples, arguments, model, trained, trainer
from transformers import Trainer

from lowrank_geo.optim import RiemannianAdam, param_groups
from lowrank_geo.peft import optimizer_for


def made(net, name):
    make, settings = optimizer_for(net, name, lr=0.02, euclidean_lr=2e-3)
    return make(**settings)


def rounds(net, size, accumulate, largest):
    """Three epochs of 16 samples, in batches of `size`, with accelerate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = made(net, "sgd-plain")
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(Samples(), size))
    norms = []
    for _ in range(3):
        for inputs in loader:
            with accelerator.accumulate(net):
                accelerator.backward(net(**inputs).loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(net.parameters(), largest)))
                optimizer.step()
                optimizer.zero_grad()
    return trained(accelerator.unwrap_model(net)), norms


@pytest.mark.parametrize("largest", [1e9, 1e-3], ids=["free", "clipped"])
def test_accelerate_accumulates_and_clips(largest):
    whole, norms = rounds(model(), 16, 1, largest)
    pieces, again = rounds(model(), 4, 4, largest)
    assert len(norms) == 3 and norms == pytest.approx(again, rel=1e-3)
    keys = [key for key in whole if key.endswith(".S")]
    assert all(whole[key].norm() > 0 for key in keys)
    assert all(relative(pieces[key], whole[key]) < 1e-3 for key in keys)


def test_a_trainer_that_makes_the_optimizer_itself_is_the_same(tmp_path):
    class Ours(Trainer):
        def create_optimizer(self, *_):
            if self.optimizer is None:
                make, settings = optimizer_for(
                    self.model, "adam", lr=0.02, euclidean_lr=2e-3, weight_decay=0.01
                )
                self.optimizer = make(**settings)
            return self.optimizer

    settings = dict(max_steps=3, save_steps=100)
    run = Ours(model(), arguments(tmp_path / "a", **settings), train_dataset=Samples())
    run.train()
    usual = trainer(tmp_path / "b", "adam", **settings)
    usual.train()
    after, wanted = trained(run.model), trained(usual.model)
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


def test_training_saved_loaded_and_continued_is_uninterrupted_bit_for_bit(tmp_path):
    def train(net, optimizer):
        for _ in range(3):
            net(**batch("encoder")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    net = model().train()
    optimizer = RiemannianAdam(param_groups(net, lr=0.02))
    train(net, optimizer)
    net.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(net, optimizer)
    again = PeftModel.from_pretrained(tiny("encoder"), tmp_path, is_trainable=True).train()
    resumed = RiemannianAdam(param_groups(again, lr=0.02))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, resumed)
    after, wanted = trained(again), trained(net)
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)
