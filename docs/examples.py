"""For the site only: runs the Python of pages marked `executed: true`, and puts what it prints and draws below.

A block that leaves a new `figure` shows it. The blocks of a page share their names, from top to bottom.
"""

import io
import re
from contextlib import redirect_stdout
from typing import Any

from lowrank_geo.canvas import to_svg

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return executed(markdown, page.file.src_uri) if page.meta.get("executed") else markdown


def executed(markdown: str, name: str) -> str:
    """The page with the output of its blocks.

    Raises: what a block raises, so that a page with a wrong example is not built.
    """
    namespace: dict[str, Any] = {}

    def run(block: re.Match[str]) -> str:
        namespace.pop("figure", None)
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block[1], name, "exec"), namespace)
        parts = [block[0]]
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue()}```")
        if "figure" in namespace:
            svg = to_svg(namespace["figure"], f"{name}, figure at {block.start()}")
            parts.append(
                f'<div style="background: white">{re.sub(chr(10) + "+", chr(10), svg)}</div>'
            )
        return "\n\n".join(parts)

    return BLOCK.sub(run, markdown)
