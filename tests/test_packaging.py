"""The wheel: what is in it, that it works away from the checkout, and that it claims no name but its own."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("lowrank_geo", "kernels", "models", "tests", "benchmarks", "docs")
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by way of the source distribution, from a copy: a build leaves files in its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter with the wheel, and behind it a `kernels` package and what this environment has installed."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    interpreter = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", interpreter, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    # Written after the installation, or pip would see the editable one. Path files inside these folders are
    # not read, so the import hook of the editable installation stays out.
    installed = next(home.glob("lib/python*/site-packages"))
    behind = [stand_in_for_kernels(home), *{sysconfig.get_path(p) for p in ("purelib", "platlib")}]
    (installed / "behind.pth").write_text("".join(f"{folder}\n" for folder in behind))
    return interpreter


def stand_in_for_kernels(home: Path) -> Path:
    """A package of the name and version that transformers looks for; the index may lack that version."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = home / "stand_in"
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (folder / "kernels").mkdir()
    # Every name is a class, and its instances are decorators that change nothing: models use both.
    methods = "{'__init__': lambda self, *a, **k: None, '__call__': lambda self, f: f}"
    any_name = f"def __getattr__(name):\n    return type(name, (), {methods})\n"
    (folder / "kernels" / "__init__.py").write_text(any_name)
    return folder


def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lowrank_geo"}
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {"lowrank_geo/py.typed"}
    for folder, prefix in (("lowrank_geo", ""), ("kernels", "kernels/"), ("models", "models/")):
        for file in (ROOT / folder).rglob("*.py"):
            expected.add(f"lowrank_geo/{prefix}{file.relative_to(ROOT / folder).as_posix()}")
    assert shipped == expected


IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
import lowrank_geo
found = {}
for module in pkgutil.walk_packages(lowrank_geo.__path__, "lowrank_geo."):
    if not module.name.endswith("__main__"):
        found[module.name] = importlib.import_module(module.name).__file__
spec = {name: importlib.util.find_spec(name) for name in ("kernels", "models")}
print(json.dumps([found, {name: s and s.origin for name, s in spec.items()}]))
"""


def test_every_module_imports_away_from_the_checkout(python, tmp_path):
    found, bare = json.loads(run(python, "-c", IMPORT_ALL, cwd=tmp_path))
    assert {"lowrank_geo.kernels", "lowrank_geo.models.decoder"} <= set(found)
    assert all(Path(file).is_relative_to(python.parent.parent) for file in found.values()), found
    assert "stand_in" in bare["kernels"] and bare["models"] is None


FIND_KERNELS = """
import lowrank_geo, lowrank_geo.kernels, lowrank_geo.models
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
import kernels
print(is_kernels_available(), kernels.__file__)
"""


def test_transformers_finds_its_own_kernels(python, tmp_path):
    available, file = run(python, "-c", FIND_KERNELS, cwd=tmp_path).split()
    assert available == "True" and "stand_in" in file


def test_the_installed_command_answers(python, tmp_path):
    assert "pretrain" in run(python.parent / "lowrank-geo", "--help", cwd=tmp_path)
