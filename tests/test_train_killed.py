"""Real processes: killed at random moments, stopped by signals, two at once, two together under torchrun."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_geo.train import checkpoint
from lowrank_geo.train.run_folder import read_record

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "lowrank_geo", "pretrain"]
SIZE = ["--model", "1m", "--context", "16", "--batch", "4", "--device", "cpu"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} is {n * n % 97}\n" for n in range(3000)))
    return path


@pytest.fixture
def start(tmp_path):
    """start(*arguments): a process in tmp_path, which does not outlive the test."""
    started = []

    def start(*arguments, command=COMMAND):
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process, code=0):
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, error)
    assert "Traceback" not in error
    return out, error


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def last_bits(run):
    path = checkpoint.steps(run / "checkpoints")[0]
    return path.name, [(path / file).read_bytes() for file in checkpoint.FILES]


def without_times(run):
    timed = ("seconds", "tokens_per_second")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.thorough)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(start, text, tmp_path, kills):
    options = ["--data", text, *SIZE, "--steps", 40, "--checkpoint-every", 3, "--eval-every", 10]
    began = time.monotonic()
    finish(start(*options, "--out", "whole"))
    usual = time.monotonic() - began
    killed, draw = tmp_path / "killed", random.Random(7)
    for _ in range(kills):
        process = start(*(["--resume", killed] if killed.exists() else [*options, "--out", killed]))
        time.sleep(draw.uniform(0.3, 0.9) * usual)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(start(*(["--resume", killed] if killed.exists() else [*options, "--out", killed])))
    assert last_bits(killed) == last_bits(tmp_path / "whole")
    assert without_times(killed) == without_times(tmp_path / "whole")
    assert read_record(killed)["status"] == "finished"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_as_shells_expect(start, text, tmp_path, number, code):
    run = tmp_path / "run"
    process = start("--data", text, *SIZE, "--steps", 100000, "--checkpoint-every", 5, "--out", run)
    wait_for(run / "checkpoints" / "step-00000005", process)
    process.send_signal(number)
    _, error = finish(process, code)
    assert error.count("\n") == 1 and "which is saved" in error
    saved = checkpoint.newest(run / "checkpoints").state["step"]
    assert f"at step {saved}," in error
    assert read_record(run)["status"] == "interrupted"


def test_a_second_process_on_one_folder_is_refused(start, call, text, tmp_path):
    run = tmp_path / "run"
    options = ["--data", text, *SIZE, "--steps", 100000, "--out", run]
    first = start(*options)
    wait_for(run, first)
    for arguments, said in (
        (options, "which exists"),
        ([*options, "--overwrite"], "another one holds"),
        (["--resume", run], "another one holds"),
    ):
        code, _, error = call("pretrain", *arguments)
        assert code == 2 and said in error and error.count("\n") == 1
    assert first.poll() is None and read_record(run)["status"] == "running"


# Spectral directions lift singular values at the damping, 1e-3 of the largest, to those of the largest, and with them
# the rounding in which a sum over two processes differs: 2.6e-5 here, 3e-7 without.
@pytest.mark.parametrize(
    "optimizer, bound", [("sgd", 1e-5), pytest.param("muon", 1e-3, marks=pytest.mark.thorough)]
)
def test_two_processes_have_the_losses_of_one(start, text, tmp_path, optimizer, bound):
    options = ["--data", text, *SIZE, "--steps", 50, "--eval-every", 25, "--dtype", "float32"]
    options += ["--optimizer", optimizer]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = [*torchrun, "--nproc-per-node", "2", "-m", "lowrank_geo", "pretrain"]
    finish(start(*options, "--out", "one"))
    finish(start(*options, "--accumulate", 2, "--out", "two", command=two))
    one, two = (without_times(tmp_path / name) for name in ("one", "two"))
    assert [(x["kind"], x["step"]) for x in one] == [(x["kind"], x["step"]) for x in two]
    losses = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(losses) == 52
    assert max(abs(a - b) / a for a, b in losses) < bound
    assert read_record(Path(tmp_path / "two"))["environment"]["processes"] == 2
