"""Black-box distillation: the loss of a teacher on the same batch is the lower bound of Polyak's step size."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, tangent_projection

from lowrank_geo import convert
from lowrank_geo.geometry import Point, Tangent, embed
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.optim import Polyak, RiemannianAdam, RiemannianSGD, ScheduleFree, param_groups


def byte_batches(steps, batch=8, length=32):
    """Windows of Python source, as bytes."""
    text = torch.frombuffer(
        bytearray(Path(torch.__file__).read_bytes()[:60_000]), dtype=torch.uint8
    ).long()
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch,)).tolist()
        windows = torch.stack([text[s : s + length + 1] for s in starts])
        yield windows[:, :-1], windows[:, 1:]


def language_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def language_model():
    config = DecoderConfig(vocab_size=256, width=32, layers=2, heads=2, hidden=64, context=32)
    return Decoder(config)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    model = language_model()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in byte_batches(150):
        adam.zero_grad()
        language_loss(model, batch).backward()
        adam.step()
    return model


def dense_quotient(student, optimizer, gap):
    """[gap + ⟨g, z − y⟩]₊/|g|² at z, from the gradients at y, with dense matrices for the triples."""
    ahead = slope = 0.0
    state = optimizer.state
    factors = {id(p) for _, layer in lowrank_layers(student) for p in layer.point}
    for p in student.parameters():
        if id(p) not in factors:
            ahead += (p.grad * (state[p]["z"] - p)).sum().item()
            slope += p.grad.square().sum().item()
    for _, layer in lowrank_layers(student):
        y, z = layer.point, Point(*(state[p]["z"] for p in layer.point))
        G = embed(y, Tangent(*(p.grad for p in y))).detach()
        ahead += (G.double() * (dense(z) - dense(y))).sum().item()
        slope += tangent_projection(z, G).square().sum().item()
    return max(0.0, gap + ahead) / slope


def distill(student, teacher, optimizer, steps, oracle=lambda *_: None):
    """Gaps, step sizes, and what the oracle says these should be."""
    optimizer.train()
    for batch in byte_batches(steps):
        with torch.no_grad():
            bound = language_loss(teacher, batch)
        optimizer.zero_grad()
        loss = language_loss(student, batch)
        loss.backward()
        gap = (loss - bound).item()
        wanted = oracle(student, optimizer, gap)
        optimizer.step(loss=loss, lower_bound=bound)
        yield gap, optimizer.last_step_size.item(), wanted


def test_distillation_takes_the_loss_of_the_teacher_as_its_bound(teacher):
    """Black box: only the loss of the teacher on the same batch is used; step sizes against dense matrices."""
    student = language_model()
    convert(student, budget=0.6)
    inner = RiemannianSGD(param_groups(student), momentum=0)
    optimizer = ScheduleFree(inner, step_size=Polyak())
    steps = list(distill(student, teacher, optimizer, 20, dense_quotient))
    assert [size for _, size, _ in steps] == pytest.approx(
        [w for _, _, w in steps], rel=1e-3, abs=1e-6
    )
    assert sum(size > 0 for _, size, _ in steps) > 5


@pytest.mark.parametrize(
    "gradient_at", ["collapsed", pytest.param("branches", marks=pytest.mark.thorough)]
)
def test_a_student_learns_without_a_learning_rate(teacher, gradient_at):
    student = language_model()
    convert(student, budget=0.6)
    inner = RiemannianAdam(param_groups(student), betas=(0.0, 0.99))
    optimizer = ScheduleFree(inner, step_size=Polyak(), gradient_at=gradient_at, model=student)
    steps = list(distill(student, teacher, optimizer, 100))
    optimizer.eval()
    with torch.no_grad():
        gaps = [language_loss(student, b) - language_loss(teacher, b) for b in byte_batches(10)]
    assert sum(gaps) / 10 < 0.5 * steps[0][0]
