"""hf: sources, on data sets in local folders: no network is used."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from lowrank_geo.data import Corpus, load_corpus
from lowrank_geo.data.hub import parse_address

ROWS = [{"id": number, "text": f"row {number}\n"} for number in range(200)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{path.parent}"


def documents(corpus: Corpus) -> set[str]:
    return set(corpus.train + corpus.held_out)


def test_a_local_folder_streams_its_text_column(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", ROWS)
    corpus = load_corpus(source)
    assert documents(corpus) == {row["text"] for row in ROWS}
    assert corpus.held_out and corpus == load_corpus(source)
    assert "column 'text': 200 rows, 1,490 bytes" in corpus.description


def test_parquet_without_a_text_column_gives_the_first_strings(tmp_path: Path) -> None:
    columns = {"id": [1, 2, 3], "title": ["a1", None, "a3"], "body": ["b1", "b2", "b3"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    corpus = load_corpus(f"hf:{tmp_path}")
    assert "".join(sorted("".join(corpus.train + corpus.held_out))) == "13aa"


def test_the_split_is_chosen_after_the_at_sign(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    source = write_rows(tmp_path / "validation.jsonl", [{"text": f"v{n}"} for n in range(100)])
    assert len(documents(load_corpus(source + "@validation"))) == 100
    with pytest.raises(ValueError, match="Bad split: nope"):
        load_corpus(source + "@nope")


def test_streaming_stops_at_max_bytes_with_whole_characters(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", [{"text": "€€€€"}] * 100)
    corpus = load_corpus(source, max_bytes=100)
    assert "".join(corpus.train + corpus.held_out) == "€" * 33
    assert corpus.description.endswith("9 rows, 99 bytes, stopped at max_bytes")


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([{"id": 1, "tags": ["a"]}], r"a column of strings, got the columns id, tags in 'hf:"),
        ([{"text": ""}] * 3, "only empty rows in column 'text'"),
        ([], r"needs a dataset that can be streamed, got 'hf:.*check the name"),
    ],
)
def test_refuses_rows_without_text(tmp_path: Path, rows: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_corpus(write_rows(tmp_path / "train.jsonl", rows))


def test_refuses_a_dataset_without_rows(tmp_path: Path) -> None:
    (tmp_path / "train.txt").touch()
    with pytest.raises(ValueError, match="needs rows of text, got none in 'hf:.*'; try another"):
        load_corpus(f"hf:{tmp_path}")


def test_refuses_a_damaged_or_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't contain any data files"):
        load_corpus(f"hf:{tmp_path}")
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="Parquet") as caught:
        load_corpus(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_dataset_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "loader"
    folder.mkdir()
    (folder / "loader.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="needs a dataset that can be streamed"):
        load_corpus(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()


def test_asks_the_library_not_to_trust_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(*names: str, **options: Any) -> list[dict[str, str]]:
        asked.update(options, names=names)
        return [{"text": "some text"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_corpus("hf:someone/rows:en@test")
    assert asked == {
        "names": ("someone/rows", "en"),
        "split": "test",
        "streaming": True,
        "trust_remote_code": False,
    }


def test_names_the_command_when_datasets_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="run: pip install datasets"):
        load_corpus("hf:someone/rows")


@pytest.mark.parametrize(
    "source, address",
    [
        ("hf:a/b", ("a/b", None, "train")),
        ("hf:a/b:en", ("a/b", "en", "train")),
        ("hf:a/b@test", ("a/b", None, "test")),
        ("hf:a/b:en@train[:1%]", ("a/b", "en", "train[:1%]")),
    ],
)
def test_reads_the_parts_of_an_address(source: str, address: tuple[str, str | None, str]) -> None:
    assert parse_address(source) == address


@pytest.mark.parametrize(
    "source", ["hf:", "hf::en", "hf:@train", "hf:a/b:", "hf:a/b@", "hf:a/b:@t"]
)
def test_refuses_an_address_with_a_missing_part(source: str) -> None:
    with pytest.raises(ValueError, match=r"needs hf:NAME\[:CONFIG\]\[@SPLIT\], got"):
        load_corpus(source)
