"""The commands: what they print, one sentence and code 2 for bad input, nothing left behind."""

import json
import os
import subprocess
import sys

import pytest

from lowrank_geo.cli import main
from lowrank_geo.cli.refusals import sentence
from lowrank_geo.models.decoder import DecoderConfig
from lowrank_geo.models.presets import DECODERS, decoder
from lowrank_geo.plan import plan_ranks
from lowrank_geo.train.config import TrainConfig
from lowrank_geo.train.run_folder import read_record


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A preset that trains in a moment."""
    config = DecoderConfig(vocab_size=257, width=16, layers=1, heads=2, hidden=24, context=16)
    monkeypatch.setitem(DECODERS, "tiny", config)


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes two seconds a run; one test here and those of the report do it."""
    monkeypatch.setattr("lowrank_geo.train.recorder.write_report", lambda run: run / "report.html")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "<script>alert(1)</script>.txt".replace("/", "∕")
    path.write_text("".join(f"line {n} is {n * n % 97}\n" for n in range(400)))
    return path


TRAIN = [
    "--model", "tiny", "--ratio", 0.25, "--steps", 4, "--batch", 2, "--eval-every", 2,
    "--device", "cpu",
]  # fmt: skip


def test_pretrain_then_everything_else(call, text, tmp_path):
    code, out, error = call("pretrain", "--data", text, *TRAIN, "--prompt", "<b>[red]")
    assert code == 0 and error == ""
    run = tmp_path / "runs" / "1"
    assert "plan: 7 of 8 layers low-rank" in out and "step 2: held-out loss" in out
    assert "tokens/s" in out and f"report: {run / 'report.html'}" in out
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<b>[red]" not in page
    assert read_record(run)["samples"][0]["prompt"] == "<b>[red]"

    code, out, _ = call("inspect", run)
    assert code == 0 and "parameters" in out and "report.html" in out

    first = call("generate", run, "--prompt", "line ", "--tokens", 5, "--seed", 3)
    assert first[0] == 0 and first[1].startswith("line ")
    assert call("generate", run, "--prompt", "line ", "--tokens", 5, "--seed", 3) == first

    code, out, _ = call("pretrain", "--resume", run)
    assert code == 0 and "resumed at step 4 of 4" in out and "nan" not in out


@pytest.mark.usefixtures("no_plots")
def test_the_second_run_gets_a_folder_of_its_own(call, text, tmp_path):
    (tmp_path / "runs" / "1").mkdir(parents=True)
    assert call("pretrain", "--data", text, *TRAIN)[0] == 0
    assert read_record(tmp_path / "runs" / "2")["status"] == "finished"


@pytest.mark.parametrize("size", [["--budget", 0.9], ["--rank", 3], ["--ratio", 0.5]])
def test_plan_prints_what_plan_ranks_finds(call, size):
    code, out, _ = call("plan", "--model", "tiny", *size)
    wanted = plan_ranks(decoder("tiny", device="meta"), init="spectral", **{size[0][2:]: size[1]})
    assert code == 0 and out.strip() == str(wanted)


def test_plan_counts_the_vocabulary_of_the_tokenizer(call):
    _, out, _ = call(
        "plan", "--model", "60m", "--tokenizer", "bpe", "--vocab-size", 32000, "--budget", 0.7
    )
    assert "58,073,600" in out


def test_pretrain_has_an_option_for_every_field(call):
    code, out, _ = call("pretrain", "--help")
    assert code == 0
    for name in TrainConfig().to_json():
        assert "--" + name.replace("_", "-") in out
    assert "--no-compile" in out and "--overwrite" in out and "--resume" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["pretrain", "--lr", "nan"], "--lr to be a positive number, got nan"),
        (["pretrain", "--lr", "-1"], "--lr to be a positive number, got -1.0"),
        (["pretrain", "--budget", "0"], "budget"),
        (["pretrain", "--budget", "0.5", "--rank", "4"], "one of --budget, --rank and --ratio"),
        (["pretrain", "--data", "no\nwhere"], "where"),
        (["pretrain", "--data", "empty"], "empty"),
        (["pretrain", "--model", "huge"], "'huge'"),
        (["pretrain", "--optimizer", "best"], "got best"),
        (["pretrain", "--resume", "nothing"], "got nothing"),
        (["pretrain", "--resume", "nothing", "--out", "b"], "neither --out nor --overwrite"),
        (["pretrain", "--out", "taken"], "which exists"),
        (["pretrain", "--out", "taken", "--overwrite"], "a folder of a run"),
        (["plan", "--rank", "0"], "got 0"),
        (["plan", "--init", "zero"], "zero"),
        (["inspect", "taken"], "run.json"),
        (["generate", "taken"], "run.json"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(call, tmp_path, arguments, said):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    (tmp_path / "empty").touch()
    code, out, error = call(*arguments)
    assert code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "taken"]
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["pretrain", "--stepz", "4"], "--stepz"),
        (["pretrain", "--steps", "four"], "--steps"),
        (["train"], "train"),
    ],
)
def test_misspelt_commands_and_options_exit_2_without_a_traceback(call, arguments, named):
    code, _, error = call(*arguments)
    assert code == 2 and "Traceback" not in error and named in error


def test_debug_shows_the_traceback(call, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lowrank-geo", "plan", "--rank", "0", "--debug"])
    with pytest.raises(ValueError, match="rank"):
        main()


@pytest.mark.usefixtures("no_plots")
def test_an_option_that_the_run_does_not_have_is_refused_on_resume(call, text):
    assert call("pretrain", "--data", text, *TRAIN, "--out", "run")[0] == 0
    code, _, error = call("pretrain", "--resume", "run", "--batch", 2, "--steps", 9)
    assert code == 2 and "got --steps 9 where it has 4" in error


@pytest.mark.usefixtures("no_plots")
def test_a_loss_that_is_not_finite_says_at_which_step_and_what_to_try(call, text, tmp_path):
    code, _, error = call(
        "pretrain", "--data", text, *TRAIN, "--steps", 50, "--out", "run", "--optimizer", "sgd",
        "--lr", 1e30, "--euclidean-lr", 1e30, "--schedule", "constant",
    )  # fmt: skip
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "step " in error and "--lr" in error
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.usefixtures("no_plots")
def test_a_corrupt_run_is_one_sentence(call, text, tmp_path):
    assert call("pretrain", "--data", text, *TRAIN, "--out", "run")[0] == 0
    for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        state.write_text(json.dumps({"format": "other"}))
    for arguments in (["pretrain", "--resume", "run"], ["generate", "run"]):
        code, _, error = call(*arguments)
        assert code == 2 and "it is foreign" in error and error.count("\n") == 1


def test_sentence_is_one_line():
    assert sentence(ValueError("a\n  b")) == "a b"
    assert sentence(OSError()) == "OSError"
    assert sentence(PermissionError(13, "Permission denied", "/x")) == "Permission denied: /x"


def test_a_reader_that_has_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lowrank_geo", "plan"]
    with os.fdopen(write) as closed:
        found = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert found.stderr == "" and found.returncode == 1
