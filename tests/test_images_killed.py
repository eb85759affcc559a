"""Real processes that train on images: killed at random moments, and stopped by a signal."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from image_runs import FLAGS, last_bits, measured, pairs

from lowrank_geo.train.run_folder import read_record

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "lowrank_geo", "segment"]
LONG = ["--epochs", "24", "--budget", "0.5", "--mode", "reversible"]


def start(folder, *arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    _, error = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in error, error
    return error


KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize(
    "numbers",
    [[KILL], pytest.param([KILL, KILL, TERM] * 3, marks=pytest.mark.thorough)],
    ids=len,
)
def test_a_run_killed_and_stopped_at_random_moments_ends_with_the_same_bits(tmp_path, numbers):
    options = ["--data", pairs(tmp_path / "data"), *FLAGS, *LONG]
    began = time.monotonic()
    finish(start(tmp_path, *options, "--out", "whole"))
    usual, draw, killed = time.monotonic() - began, random.Random(3), tmp_path / "killed"

    def begin_or_resume():
        known = ["--resume", killed] if killed.exists() else [*options, "--out", killed]
        return start(tmp_path, *known)

    for number in numbers:
        process = begin_or_resume()
        time.sleep(draw.uniform(0.5, 0.9) * usual)
        process.send_signal(number)
        process.communicate()
    finish(begin_or_resume())
    assert last_bits(killed) == last_bits(tmp_path / "whole")
    runs = [measured(run) for run in (killed, tmp_path / "whole")]
    ends = [[line for line in lines if line["kind"] != "test"] for lines in runs]
    assert ends[0] == ends[1]
    assert read_record(killed)["status"] == "finished"
    assert not list(tmp_path.glob(".killed*"))
