"""The documentation: its Python runs, its commands exist, the site builds and loads nothing remote."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_geo

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
REMOTE = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>"""
)
STYLE_REMOTE = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""")

WITH_PYTHON = [page for page in PAGES if PYTHON.search(page.read_text("utf-8"))]
MAPPED = [
    f"lowrank_geo.{folder}.{module.name}"
    for folder in ("kernels", "models")
    for module in pkgutil.iter_modules([str(ROOT / folder)])
]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in PYTHON.findall(page.read_text("utf-8")):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", MAPPED)
def test_the_examples_of_the_mapped_folders_hold(name):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_make_target_in_the_text_exists(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ +make ([a-z]+)", page.read_text("utf-8"), re.MULTILINE)) <= targets


def test_every_public_name_has_a_place_in_the_documentation():
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))
    missing = [name for name in lowrank_geo.__all__ if f"`{name}`" not in text]
    missing.remove("__version__")
    assert missing == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_remote(tmp_path):
    build = ("-P", "-m", "mkdocs", "build", "--strict", "--site-dir")
    command = [sys.executable, *build, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        links = [tag for tag in REMOTE.findall(page.read_text("utf-8")) if "canonical" not in tag]
        assert not links, page
    for sheet in tmp_path.rglob("*.css"):
        assert not STYLE_REMOTE.search(sheet.read_text("utf-8")), sheet
