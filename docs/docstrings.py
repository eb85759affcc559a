"""For the site only: finds the folders that are mapped into the package, and turns docstrings into Markdown.

Labelled lines (Shapes:, Raises: ...) become paragraphs of their own, and doctests become code blocks; Markdown would
join the former and read `>>>` as quotations.
"""

import re

import griffe

LABEL = re.compile(r"^(Shapes|Units|Error|Args|Raises|Source):", re.MULTILINE)
DOCTEST = re.compile(r"(^>>> .*(?:\n(?!\n).*)*)", re.MULTILINE)
CODE = re.compile(r"(`[^`]*`)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            text, *rest = DOCTEST.split(obj.docstring.value)
            parts = [prose(text)]
            for example, text in zip(rest[::2], rest[1::2], strict=True):
                parts += [f"```pycon\n{example}\n```", prose(text)]
            obj.docstring.value = "".join(parts)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        # setup.py maps these folders into lowrank_geo, which only an installed copy shows.
        if pkg.name == "lowrank_geo":
            for folder in ("kernels", "models"):
                pkg.set_member(folder, loader.load(folder))


def prose(text: str) -> str:
    """Markdown of the part of a docstring that is not code: a star is a star, a label starts a paragraph."""
    pieces = CODE.split(text)
    pieces[::2] = [piece.replace("*", r"\*") for piece in pieces[::2]]
    return LABEL.sub(r"\n**\1:**", "".join(pieces))
