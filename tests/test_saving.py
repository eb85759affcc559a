"""save_pretrained and load_pretrained: the same bits back, and the last save survives whatever happens."""

import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import plain, same
from torch import nn

from lowrank_geo import saving
from lowrank_geo.convert import convert
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.saved_files import PLAN, WEIGHTS
from lowrank_geo.saving import load_pretrained, save_pretrained


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved `plain` model."""
    save_pretrained(convert(plain(), ratio=0.25), tmp_path / "saved")
    return tmp_path / "saved"


def test_other_models_are_filled_in_place(saved):
    model = plain()
    embedding, norm = model["embed"].weight, model["norm"].running_mean
    loaded = load_pretrained(saved, model)
    assert loaded is model and loaded.training
    assert loaded["head"].weight is loaded["embed"].weight is embedding
    assert loaded["norm"].running_mean is norm
    assert isinstance(loaded["wide"], LowRankLinear)
    assert same(loaded, load_pretrained(saved, loaded))


def test_a_model_on_meta_is_filled_and_stays_tied(saved):
    with torch.device("meta"):
        model = plain()
    loaded = load_pretrained(saved, model)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert loaded["head"].weight is loaded["embed"].weight
    assert same(loaded, load_pretrained(saved, plain()))


def test_a_single_layer_and_a_shared_one_are_restored(tmp_path):
    layer = convert(nn.Linear(16, 16), rank=2)
    save_pretrained(layer, tmp_path / "one")
    assert same(load_pretrained(tmp_path / "one", nn.Linear(16, 16)), layer)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model.append(model[0])
    save_pretrained(convert(model, rank=2), tmp_path / "shared")
    fresh = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    loaded = load_pretrained(tmp_path / "shared", fresh.append(fresh[0]))
    assert loaded[0] is loaded[2] and same(loaded, model)


def test_folder_holds_no_pickle_and_each_tensor_once(saved):
    assert sorted(os.listdir(saved)) == [PLAN, WEIGHTS]
    names = set(load_file(saved / WEIGHTS))
    assert {"embed.weight", "wide.U", "wide.S", "wide.V", "conv.U"} < names
    assert not names & {"head.weight", "wide.weight"}


def test_frozen_parameters_of_the_given_model_stay_frozen(saved):
    model = plain()
    model["wide"].weight.requires_grad_(False)
    loaded = load_pretrained(saved, model)
    assert not any(p.requires_grad for p in loaded["wide"].point)
    assert loaded["wide"].bias.requires_grad and loaded["conv"].U.requires_grad


def test_saved_ranks_are_those_of_the_model_not_of_an_older_plan(tmp_path):
    model = convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), rank=4)
    model[1] = LowRankLinear(32, 32, rank=7)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    assert loaded.lowrank_plan.ranks == {"0": 4, "1": 7}
    assert loaded.lowrank_plan.entries[0].error == model.lowrank_plan.entries[0].error
    assert loaded.lowrank_plan.entries[1].error is None


def test_saves_over_its_own_folder_but_not_over_another_model(saved, tmp_path):
    model = convert(plain(), ratio=0.4)
    save_pretrained(model, saved)
    assert same(load_pretrained(saved, plain()), model)
    other = tmp_path / "other"
    other.mkdir()
    (other / WEIGHTS).write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"with another model.safetensors; choose another folder"):
        save_pretrained(model, other)
    assert os.listdir(other) == [WEIGHTS] and (other / WEIGHTS).read_bytes() == b"theirs"
    with pytest.raises(ValueError, match="needs a folder, got the file"):
        save_pretrained(model, other / WEIGHTS)


def test_refuses_to_save_what_has_no_values(tmp_path):
    with pytest.raises(ValueError, match="got '0.U' on meta"):
        save_pretrained(
            convert(nn.Sequential(nn.Linear(8, 8, device="meta")), rank=2), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_full_disk_leaves_the_last_save(saved, tmp_path, monkeypatch, fresh):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    folder = tmp_path / "new" if fresh else saved
    before = {p.name: p.read_bytes() for p in folder.glob("*")}
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(convert(plain(), ratio=0.4), folder)
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    assert folder.exists() != fresh


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_a_save_cut_between_two_files_is_whole_or_refused(saved, monkeypatch, moves, ratio):
    old = load_pretrained(saved, plain())
    new = convert(plain(), ratio=ratio)
    new.lowrank_plan = old.lowrank_plan if ratio == 0.25 else new.lowrank_plan
    done = []

    def replace(source, target, move=os.replace):
        if len(done) == moves:
            raise Killed
        done.append(move(source, target))

    monkeypatch.setattr(os, "replace", replace)
    if moves < 2:
        with pytest.raises(Killed):
            save_pretrained(new, saved)
    else:
        save_pretrained(new, saved)
    if moves == 1 and ratio == 0.4:
        with pytest.raises(ValueError, match="needs .*, got "):
            load_pretrained(saved, plain())
    else:
        assert same(load_pretrained(saved, plain()), old if moves == 0 else new)


def test_refuses_another_model(saved):
    model = plain()
    model["wide"] = nn.Linear(32, 65)
    with pytest.raises(ValueError, match="a linear of 64x32 at 'wide' .*, got a linear of 65x32"):
        load_pretrained(saved, model)
    assert not list(lowrank_layers(model))


def test_refuses_to_guess_the_class(saved):
    with pytest.raises(ValueError, match="pass it freshly built as `model`"):
        load_pretrained(saved)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    model = convert(nn.Sequential(nn.Linear(16, 16)), rank=2)
    model.register_buffer("view", model[0].bias.detach()[:4])
    save_pretrained(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 16))
    fresh.register_buffer("view", torch.zeros(4))
    assert same(load_pretrained(tmp_path, fresh), model)


def test_refuses_a_model_on_meta_whose_computed_buffers_no_file_holds(tmp_path):
    def build(device):
        model = nn.Sequential(nn.Linear(16, 16, device=device))
        model.register_buffer("table", torch.ones(3, device=device), persistent=False)
        return model

    save_pretrained(convert(build("cpu"), rank=2), tmp_path)
    model = build("meta")
    with pytest.raises(ValueError, match="got 'table' on meta; build the model on a real device"):
        load_pretrained(tmp_path, model)
    assert type(model[0]) is nn.Linear
