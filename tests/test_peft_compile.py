"""Adapted models under torch.compile: as they are, with adapters that switch, in a loop and in Trainer."""

import pytest
import torch
from peft_models import FAMILIES, batch, config, descent, logits, wrapped
from tiny_models import relative
from trainer_run import trained, trainer

import lowrank_geo
from lowrank_geo.optim import RiemannianAdam

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # dynamo's own
]


def families(*quick: str) -> pytest.MarkDecorator:
    """Each of the families; those that are not quick to compile, or add little, only with -m thorough."""
    marks = {name: [] if name in quick else [pytest.mark.thorough] for name in FAMILIES}
    cases = [pytest.param(name, marks=marks[name]) for name in FAMILIES]
    return pytest.mark.parametrize("family", cases)


@families("encoder", "decoder")
def test_a_compiled_model_gives_the_same_loss_and_gradients(family):
    model, inputs = wrapped(family), batch(family)
    lowrank_geo.param_groups(model)
    loss = model(**inputs).loss
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    again = compiled(**inputs).loss
    again.backward()
    assert torch.allclose(again, loss, atol=1e-5)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


@families("encoder")
def test_adapters_switch_under_the_compiler(family):
    model, inputs = wrapped(family), batch(family)
    model.add_adapter("other", config(family, r=2))
    compiled = torch.compile(model, backend="aot_eager")
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert relative(logits(compiled.eval(), inputs), logits(model.eval(), inputs)) < 1e-5
    with model.disable_adapter():
        assert relative(logits(compiled, inputs), logits(model, inputs)) < 1e-5


@families("decoder")
def test_a_loop_with_a_compiled_model_takes_the_same_steps(family):
    def losses(compiled):
        torch.manual_seed(0)
        model = wrapped(family).train()
        optimizer = RiemannianAdam(lowrank_geo.param_groups(model, lr=0.01, euclidean_lr=1e-3))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        return descent(run, optimizer, batch(family), 3)

    found = losses(True)
    assert found == pytest.approx(losses(False), rel=1e-4) and found[-1] < found[0]


def test_the_trainer_compiles(tmp_path):
    settings = dict(max_steps=3, save_steps=3)
    compiled = trainer(
        tmp_path / "a", "adam", torch_compile=True, torch_compile_backend="aot_eager", **settings
    )
    compiled.train()
    plain = trainer(tmp_path / "b", "adam", **settings)
    plain.train()
    after, wanted = trained(compiled.model), trained(plain.model)
    assert after.keys() == wanted.keys()
    assert all(relative(after[k], wanted[k]) < 1e-3 for k in wanted if wanted[k].norm() > 0)
    assert (tmp_path / "a" / "checkpoint-3" / "adapter_model.safetensors").exists()
