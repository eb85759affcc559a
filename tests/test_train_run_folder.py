"""The folder of a run: made at once, held by one, deleted only if it is ours."""

import json

import pytest

from lowrank_geo.train.run_folder import RunFolder, check_out, read_complete_record, read_record

RECORD = {"status": "running", "config": {}, "plan": {}, "model": {}, "data": {}}


@pytest.fixture
def create(tmp_path):
    """create(name, overwrite=…): a run folder beside the others, closed when the test ends."""
    made = []

    def create(name="run", *, overwrite=False, fill=lambda folder: None):
        folder = RunFolder.create(tmp_path / name, RECORD, fill=fill, overwrite=overwrite)
        made.append(folder)
        return folder

    yield create
    for folder in made:
        folder.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_is_made_with_its_content(create, tmp_path):
    create(fill=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["lock", "run.json", "tokenizer.json"]
    assert read_record(tmp_path / "run")["format"] == "lowrank_geo run"


def test_is_not_made_if_filling_fails(create, tmp_path):
    def fail(folder):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        create(fill=fail)
    assert names(tmp_path) == []


def test_failing_to_replace_keeps_the_old_run(create, tmp_path):
    create().close()

    def fail(folder):
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        create(overwrite=True, fill=fail)
    assert read_record(tmp_path / "run") and names(tmp_path) == ["run"]


def test_is_held_until_closed(create, tmp_path):
    folder = create()
    with pytest.raises(BlockingIOError, match="one process, got .*run"):
        RunFolder.open(tmp_path / "run")
    with pytest.raises(BlockingIOError):
        create(overwrite=True)
    folder.close()
    RunFolder.open(tmp_path / "run").close()


def test_update_replaces_entries(create, tmp_path):
    create().update(status="finished")
    assert read_record(tmp_path / "run") == {
        **RECORD, "format": "lowrank_geo run", "version": 1, "status": "finished",
    }  # fmt: skip


def test_overwrite_deletes_a_run_of_ours_alone(create, tmp_path):
    old = create()
    (old.path / "metrics.jsonl").write_text("old")
    old.close()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (old.path / "link").symlink_to(outside)
    new = create(overwrite=True)
    assert names(new.path) == ["lock", "run.json"]
    assert names(tmp_path) == ["outside", "run"] and names(outside) == ["precious"]


def test_an_existing_place_is_refused(create, tmp_path):
    with pytest.raises(FileExistsError, match="which exists"):
        check_out(tmp_path, overwrite=False)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="which exists"):
        create("dangling")


@pytest.mark.parametrize("marker", [None, "{}", "[]", "{", '{"format": "other", "version": 1}'])
def test_overwrite_refuses_what_is_not_ours(tmp_path, create, marker):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").touch()
    if marker is not None:
        (folder / "run.json").write_text(marker)
    before = names(folder)
    with pytest.raises(FileExistsError, match="a folder of a run"):
        create("thesis", overwrite=True)
    assert names(folder) == before and names(tmp_path) == ["thesis"]


def test_overwrite_refuses_a_file(tmp_path, create):
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError):
        create("file", overwrite=True)
    assert (tmp_path / "file").read_text() == "text"


def test_a_place_where_no_folder_can_be_is_refused(tmp_path, create):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="got .*file/run .File exists.; choose another"):
        create("file/run")


def test_overwrite_refuses_symlinks(create, tmp_path):
    create().close()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(FileExistsError, match="symlink"):
        create("link", overwrite=True)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    (borrowed / "run.json").symlink_to(tmp_path / "run" / "run.json")
    with pytest.raises(FileExistsError, match="symlink"):
        create("borrowed", overwrite=True)
    assert names(tmp_path / "run") == ["lock", "run.json"] and names(borrowed) == ["run.json"]


def test_a_record_without_its_parts_is_damaged(tmp_path):
    marker = {"format": "lowrank_geo run", "version": 1, **RECORD, "plan": 3}
    (tmp_path / "run.json").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="got no plan"):
        read_complete_record(tmp_path)
