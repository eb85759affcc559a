"""Checkpoints: exact, whole or absent, refused when anything is changed, foreign or of another shape."""

import json
import shutil
import subprocess

import pytest
import torch

from lowrank_geo.train import checkpoint
from lowrank_geo.train.checkpoint import Checkpoint
from lowrank_geo.train.flatten import flatten, unflatten


def example(step, size=3):
    training = {
        "state": {0: {"momentum": torch.randn(size, 2).bfloat16(), "step": torch.tensor(3.0)}},
        "groups": [{"lr": 1 / 3, "betas": (0.9, 0.95), "layers": ["a.b"], "closed": None}],
        "random": torch.get_rng_state(),
    }
    return Checkpoint(step, {"a.U": torch.randn(size, 2), "a.S": torch.randn(2, 2).mT}, training)


def equal(a, b):
    """Equal down to dtypes, key types and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def steps(folder):
    return [path.name for path in checkpoint.steps(folder)]


def test_comes_back_exactly(tmp_path):
    saved = example(7)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(checkpoint.newest(tmp_path))
    assert loaded.step == 7
    assert equal(loaded.training, saved.training)
    assert all(torch.equal(loaded.model[name], x) for name, x in saved.model.items())


def test_writes_no_pickle(tmp_path):
    path = checkpoint.save(tmp_path, example(1))
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 15, 15):
        checkpoint.save(tmp_path, example(step))
    assert steps(tmp_path) == ["step-00000015", "step-00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_what_a_kill_leaves_half_written_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, example(5))
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".step-00000010.part")
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".step-00000001.old")
    assert checkpoint.newest(tmp_path).path.name == "step-00000005"
    checkpoint.save(tmp_path, example(10))
    assert steps(tmp_path) == ["step-00000010", "step-00000005"]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def edit_step(file):
    file.write_text(file.read_text().replace('"step": 10', '"step": 11'))


def make_foreign(file):
    file.write_text(json.dumps({"step": 10, "model": {}}))


DAMAGES = [
    (flip, "model.safetensors", "needs to be unchanged"),
    (flip, "optimizer.safetensors", "needs to be unchanged"),
    (flip, "state.json", "state.json"),
    (truncate, "model.safetensors", r"needs \d+ bytes, got \d+"),
    (truncate, "state.json", "needs to be JSON"),
    (edit_step, "state.json", "of its step, got a changed one"),
    (make_foreign, "state.json", "it is foreign"),
    (lambda file: file.unlink(), "optimizer.safetensors", "No such file"),
]


@pytest.mark.parametrize("damage, name, said", DAMAGES)
def test_a_damaged_one_is_passed_over(tmp_path, damage, name, said):
    checkpoint.save(tmp_path, example(5))
    damage(checkpoint.save(tmp_path, example(10)) / name)
    found = checkpoint.newest(tmp_path)
    assert found.path.name == "step-00000005"
    assert len(found.problems) == 1
    with pytest.raises((ValueError, OSError), match=said):
        checkpoint.verify(tmp_path / "step-00000010")


def test_only_damaged_ones_are_an_error_and_none_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None
    flip(checkpoint.save(tmp_path, example(5)) / "model.safetensors")
    with pytest.raises(ValueError, match="holds no valid one"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"a.S": torch.zeros(3, 3)}, r"a.S of shape \(3, 3\), got \(2, 2\)"),
        ({"b": torch.zeros(1)}, r"b of shape \(1,\), got None"),
    ],
)
def test_another_shape_is_refused_by_the_header(tmp_path, change, said):
    saved = example(5)
    path = checkpoint.save(tmp_path, saved)
    checkpoint.check_fit(path, saved.model)
    with pytest.raises(ValueError, match=said):
        checkpoint.check_fit(path, saved.model | change)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root on Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk):
    checkpoint.save(small_disk, example(5))
    with pytest.raises(OSError, match="the checkpoint of step 10 needs more space") as full:
        checkpoint.save(small_disk, example(10, size=9999))
    assert "\n" not in str(full.value)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000005"]
    assert checkpoint.newest(small_disk).path.name == "step-00000005"


def test_flatten_refuses_what_json_cannot_hold():
    with pytest.raises(TypeError, match="tensors, numbers, text"):
        flatten({"f": flatten}, {})
    with pytest.raises(TypeError, match="words or integers"):
        flatten({0.5: 1}, {})


@pytest.mark.parametrize("skeleton", [{"set": []}, {}, {"tensor": "gone"}, [1], {"list": 3}])
def test_unflatten_refuses_other_skeletons(skeleton):
    with pytest.raises(ValueError, match="a skeleton that flatten made"):
        unflatten(skeleton, {"a": torch.zeros(1)})
