"""What every test shares: a seed, interpreted kernels where there is no GPU, no repository root on
sys.path, random points, and hypothesis without a clock."""

import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from lowrank_geo import geometry, orthonormal, retraction
from lowrank_geo.geometry import Point

# Read when kernels are defined, so before their first import. With a GPU the same tests run compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEEN = pytest.StashKey[set[str]]()  # names of tests, without their cases, that have begun

TESTS = Path(__file__).resolve().parent
# The root would make `kernels` and `models` importable under the names that no user has.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != TESTS.parent]
sys.path.append(str(TESTS))  # for `oracles`

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left with one when the other has nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def tracer(config: pytest.Config) -> Any:
    """What pytest-cov starts and stops coverage with, None without."""
    return getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Stops what pytest-cov began when it was loaded, where it is not what measures the tests.

    A process that only hands tests to workers has nothing to trace; in a worker, what began first would go on
    whenever the second tracer, which begins after this, is stopped.
    """
    config = session.config
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        if (coverage := tracer(config)) is not None:
            coverage.pause()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Coverage is traced in the first case of a test that is not slow.

    Tracing every line of every case, those of compilers, plots and pytest among them, takes a fifth longer or more;
    what is left out makes the reported share a lower bound.
    """
    if (coverage := tracer(item.config)) is not None:
        seen = item.config.stash.setdefault(SEEN, set())
        name = item.nodeid.partition("[")[0]
        traced = not (item.get_closest_marker("slow") or "compile" in name or name in seen)
        seen.add(name)
        if traced != coverage.started:
            (coverage.resume if traced else coverage.pause)()
    return (yield)


@pytest.fixture(autouse=True, scope="session")
def kernels_without_a_trace() -> Iterator[None]:
    """Coverage does not follow the interpreter of kernels, whose lines it would trace for each program."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def untraced(*arguments: Any, **keywords: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return launch(*arguments, **keywords)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", untraced)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may look at the numbers, as on an accelerator or in a graph."""
    for module in (orthonormal, retraction):
        monkeypatch.setattr(module, "on_host", lambda x: False)


@pytest.fixture(params=["host", "device"])
def wherever(request: pytest.FixtureRequest) -> None:
    """Both ways: with a look at the numbers, and without."""
    if request.param == "device":
        request.getfixturevalue("as_on_a_device")


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments) -> exit code, stdout, stderr of `lowrank-geo`, in a folder of its own."""
    from lowrank_geo.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowrank-geo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def point() -> Callable[..., Point]:
    """point(m, n, r, dtype, core=…, batch=…); see `draw_point`."""
    return draw_point


def draw_point(
    m: int,
    n: int,
    r: int,
    dtype: torch.dtype = torch.float64,
    *,
    core: float | str | None = None,
    batch: tuple[int, ...] = (),
) -> Point:
    """A random point whose core S is Gaussian (None), has a condition number (float), is "singular" or "zero".

    Shapes: -> U (*batch, m, r), S (*batch, r, r), V (*batch, n, r), drawn in float64, then rounded to `dtype`.
    """
    drawn = geometry.random(m, n, r, batch=batch, dtype=torch.float64)
    return Point(*(x.to(dtype) for x in (drawn.U, choose_core(drawn.S, core), drawn.V)))


def choose_core(S: Tensor, core: float | str | None) -> Tensor:
    if core is None:
        return S
    if core == "zero":
        return torch.zeros_like(S)
    if core == "singular":
        # An exactly zero column: rounding leaves it singular.
        return torch.cat([S[..., :-1], torch.zeros_like(S[..., -1:])], -1)
    P, sigma, Qt = torch.linalg.svd(S)
    exponents = torch.linspace(0, 1, sigma.shape[-1], dtype=S.dtype)
    return (P * float(core) ** -exponents) @ Qt
