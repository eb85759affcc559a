"""docs/examples: the hook of the site that runs the examples of a page."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "docs" / "examples.py"


@pytest.fixture(scope="module")
def examples():
    spec = importlib.util.spec_from_file_location("examples", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_printed_and_drawn_stands_below_its_block(examples):
    page = """# A
```python
x = 6 * 7
print("is", x)
```
Text.
```python
from lowrank_geo.analysis.figures import curves
figure = curves({"a": ([0, 1], [0, x])}, "x (s)", "y (m)")
```
```python
y = 1
```
"""
    found = examples.executed(page, "a.md")
    assert "```text\nis 42\n```\nText." in found
    assert (
        found.count("<svg ") == 1
        and "\n\n" not in found[found.index("<svg") : found.index("</svg>")]
    )
    assert found.rstrip().endswith("y = 1\n```")


def test_a_page_whose_example_is_wrong_is_not_built(examples):
    with pytest.raises(AssertionError):
        examples.executed("```python\nassert 1 == 2\n```\n", "a.md")


def test_only_pages_that_ask_for_it_are_run(examples):
    class Page:
        meta: dict = {}

    text = "```python\nraise RuntimeError\n```\n"
    assert examples.on_page_markdown(text, page=Page(), config=None, files=None) == text
