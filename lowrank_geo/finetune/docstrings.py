"""A labelled task on every machine: which module of Python's standard library a docstring comes from."""

import ast
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
SHORTEST = 4  # words
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_examples(classes: int = 12, each: int = 60) -> list[tuple[str, str]]:
    """(text, module) pairs, `each` of the modules with most docstrings, in an order that is always the same.

    The names of the modules are taken out of the texts, and texts that two modules share are left out.
    """
    found: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    for module, text in documented(Path(sysconfig.get_path("stdlib"))):
        hidden = " ".join(word for word in text.split() if module not in word.lower())
        if len(hidden.split()) >= SHORTEST:
            found[module].add(hidden)
            owners[hidden].add(module)
    unique = {
        module: sorted(t for t in texts if len(owners[t]) == 1) for module, texts in found.items()
    }
    largest = sorted(unique, key=lambda module: (-len(unique[module]), module))[:classes]
    draw = random.Random(0)
    examples = []
    for module in sorted(largest):
        texts = unique[module]
        examples += [(text, module) for text in draw.sample(texts, min(each, len(texts)))]
    draw.shuffle(examples)
    return examples


@cache
def documented(library: Path) -> tuple[tuple[str, str], ...]:
    """The module and text of every docstring of a class or function below a folder."""
    found = []
    for file in sources(library):
        parts = file.relative_to(library).parts
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and files for tests are no Python
        module = parts[0].removesuffix(".py").lstrip("_")
        found += [(module, text) for node in definitions(tree) if (text := ast.get_docstring(node))]
    return tuple(found)


def sources(folder: Path) -> Iterator[Path]:
    """The Python files below a folder, in order; what is left out is not entered."""
    for path in sorted(folder.iterdir()):
        if path.name not in LEFT_OUT:
            if path.is_dir() and not path.is_symlink():
                yield from sources(path)
            elif path.suffix == ".py":
                yield path


def definitions(node: ast.AST) -> Iterator[Definition]:
    """The classes and functions in a tree. They are statements: expressions, most of a tree, are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        if not isinstance(child, ast.expr):
            yield from definitions(child)
