"""load_corpus on files and folders: what is read, in which order, and what is refused."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_geo.data import Corpus, load_corpus

TEXT = "".join(f"line {number}\n" for number in range(2000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        path = tmp_path / "texts" / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text number {number}\n" * 3)
    return tmp_path / "texts"


def everything(corpus: Corpus) -> str:
    return "".join(sorted(corpus.train + corpus.held_out))


@pytest.fixture
def unordered_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk as on a file system that lists names the other way round."""
    walk = os.walk

    def backwards(*args: Any, **kwargs: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for here, folders, files in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield here, folders, sorted(files, reverse=True)

    monkeypatch.setattr("os.walk", backwards)


def test_the_default_is_the_standard_library_and_repeats(
    request: pytest.FixtureRequest,
) -> None:
    first = load_corpus()
    request.getfixturevalue("unordered_walk")
    assert load_corpus() == first
    assert "class OrderedDict(dict):" in everything(first)
    assert "standard library: " in first.description and "max_bytes" not in first.description


def test_the_default_leaves_out_tests_packages_and_build_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ["os.py", "json/decoder.py", "idlelib/config.py"]
    left_out = [
        "test/test_os.py",
        "ctypes/test/test_arrays.py",
        "idlelib/idle_test/test_config.py",
        "site-packages/numpy/core.py",
        "dist-packages/apt.py",
        "sitecustomize.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11/makesetup.py",
        "LICENSE.txt",
        "json/notes.txt",
    ]
    for name in read + left_out:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{name}>\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    text = everything(load_corpus())
    assert all(f"<{name}>" in text for name in read)
    assert not any(f"<{name}>" in text for name in left_out)


def test_a_python_without_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="standard library with none; give a folder"):
        load_corpus()


def test_a_folder_is_read_to_the_bottom_in_any_order(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    first = load_corpus(str(folder))
    assert len(first.train) + len(first.held_out) == 60
    assert "60 files" in first.description
    request.getfixturevalue("unordered_walk")
    assert load_corpus(str(folder)) == first


def test_the_fingerprint_depends_on_every_character_and_not_on_the_place(folder: Path) -> None:
    first = load_corpus(str(folder))
    moved = folder.rename(folder.parent / "elsewhere")
    assert load_corpus(str(moved)).fingerprint == first.fingerprint
    (moved / "3" / "3.txt").write_text("the text number 3\n" * 2 + "the text number 4\n")
    assert load_corpus(str(moved)).fingerprint != first.fingerprint


def test_the_fingerprint_does_not_change_between_versions(tmp_path: Path) -> None:
    # Recorded from the code: with another value, the runs of earlier versions could not be resumed.
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    assert load_corpus(str(tmp_path)).fingerprint.startswith("f6d839b955cb169e")


def test_a_folder_skips_and_counts_what_is_not_text(folder: Path) -> None:
    (folder / "latin1.txt").write_bytes("café\n".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "late.bin").write_bytes(b"a" * 10_000 + b"\0")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    corpus = load_corpus(str(folder))
    assert "60 files" in corpus.description
    assert corpus.description.endswith("3 skipped (not UTF-8 text)")
    assert "secret" not in everything(corpus)


def test_links_and_pipes_do_not_trap_the_reader(folder: Path, tmp_path: Path) -> None:
    expected = load_corpus(str(folder)).fingerprint
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "nowhere").symlink_to("missing")
    os.mkfifo(folder / "pipe")
    corpus = load_corpus(str(folder))
    assert corpus.fingerprint == expected
    assert corpus.description.endswith("1 skipped (linked folder), 3 skipped (unreadable)")
    linked = tmp_path / "link"
    linked.symlink_to(folder)
    assert load_corpus(str(linked)).fingerprint == expected


def test_a_file_is_one_document_cut_for_the_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff".encode() + TEXT.encode())
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert len(everything(corpus)) == len(TEXT)
    assert not set(corpus.train) & set(corpus.held_out)


def test_reading_stops_at_max_bytes_with_whole_characters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "euro.txt").write_text("€" * 100, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "euro.txt"), max_bytes=100)
    assert everything(corpus) == "€" * 33
    assert corpus.description.endswith("stopped at max_bytes")
    corpus = load_corpus(str(folder), max_bytes=1000)
    assert len(everything(corpus)) == 1000 and corpus.description.endswith("stopped at max_bytes")


def test_a_folder_of_exactly_max_bytes_is_not_called_cut(folder: Path) -> None:
    size = len(everything(load_corpus(str(folder))))
    assert "max_bytes" not in load_corpus(str(folder), max_bytes=size).description
    assert "max_bytes" in load_corpus(str(folder), max_bytes=size - 1).description


@pytest.mark.parametrize("name", [b"\xff\xfe.txt", b"<script>\n\x1b[2J.txt"])
def test_any_file_name_can_be_printed(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(TEXT.encode())
    description = load_corpus(os.fsdecode(path)).description
    description.encode()
    assert description.isprintable()


@pytest.mark.parametrize("source", ["missing", "", "a\0b", "x" * 5000])
def test_refuses_a_path_with_nothing_there(source: str) -> None:
    with pytest.raises(ValueError, match=r"needs a text file, a folder or hf:NAME, got '.*check"):
        load_corpus(source)


def test_refuses_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least one UTF-8 text file, got folder '.*' with none;"
    ):
        load_corpus(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"with none, 1 skipped \(not UTF-8 text\);"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "needs text, got the empty file"),
        (b"caf\xe9", "can't decode byte 0xe9 in position 3"),
        (b"PK\3\4\0\0", "binary data"),
        (TEXT.encode("utf-16"), "binary data"),
        (b"a", "two characters or more to split, got file '.*': 1 bytes"),
    ],
)
def test_refuses_a_file_that_is_no_text(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_corpus(str(tmp_path / "a"))


def test_refuses_max_bytes_below_one() -> None:
    with pytest.raises(ValueError, match="max_bytes of at least 1, got 0; leave it out"):
        load_corpus(max_bytes=0)
