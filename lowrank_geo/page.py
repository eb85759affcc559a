"""HTML from plain values: every function escapes what it is given, except what is called `html`.

The page loads nothing, runs nothing and forbids both to itself.
"""

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowrank_geo.train.durable import sync

CSS = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #5b6570; --line: #dde2e7; --back: #fff; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --soft: #9aa5b1; --line: #39424c; --back: #15191e; --card: #1f252c; } }
* { box-sizing: border-box; }
body { max-width: 50rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.status { font-size: .8rem; font-weight: 600; padding: .15rem .6rem; border: 1px solid; border-radius: 1rem;
  vertical-align: middle; white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 100%; background: #fff; color: #22272e; border: 1px solid var(--line);
  border-radius: .4rem; padding: .6rem; break-inside: avoid; }
figure.half { flex: 1 1 20rem; }
figure img { max-width: 100%; height: auto; display: block; image-rendering: pixelated; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .7rem; }
.cases.wide { grid-template-columns: 1fr; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .82rem; line-height: 1.4; color: #48515b; padding: .4rem .3rem 0; }
figcaption b { color: #22272e; }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.settings td:first-child { width: 14rem; }
.right { text-align: right; white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .82rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre b { color: #0072b2; }
@media (prefers-color-scheme: dark) { pre b { color: #56b4e9; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { max-height: none; overflow: visible; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, html: Iterable[str], *, pictures: bool = False) -> str:
    """A whole document around the parts of its body, which may hold `pictures`."""
    policy = POLICY + "; img-src data:" * pictures
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>",
            *html,
            "</body>\n</html>\n",
        ]
    )


def heading(title: str, status: str) -> str:
    return f'<h1>{escape(title)} <span class="status">{escape(status)}</span></h1>'


def section(title: str, *html: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *html, "</section>"])


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def key_numbers(entries: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of (what, value, remark)."""
    boxes = (
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for what, value, remark in entries
    )
    return f"<dl>{''.join(boxes)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[int] = ()) -> str:
    """A table; `right` holds the columns that are set flush right."""
    sides = [' class="right"' if i in set(right) else "" for i in range(len(head))]

    def line(tag: str, cells: Sequence[Any]) -> str:
        inside = (
            f"<{tag}{side}>{escape(str(cell))}</{tag}>"
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line("th", head)}</thead>\n<tbody>{body}</tbody>\n</table></div>'


def settings(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = [(name, "not set" if value is None else value) for name, value in values.items()]
    return f'<div class="settings">{table(("name", "value"), rows)}</div>'


def figure(svg_html: str, title: str, caption: str, *, half: bool) -> str:
    kind = ' class="half"' if half else ""
    told = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
    return f"<figure{kind}>\n{svg_html}\n{told}\n</figure>"


def picture(png: bytes, told: str, caption: str) -> str:
    """A picture inside the page; `told` is what a screen reader says."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(told)}">'
    return f"<figure>\n{image}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def sample(prompt: str, text: str) -> str:
    """A generated text with its prompt, which the text may repeat, in bold."""
    return f"<pre><b>{escape(prompt)}</b>{escape(text.removeprefix(prompt))}</pre>"


def write_page(path: Path, text: str) -> None:
    """Replace `path`; a reader sees the old page or the new one. What UTF-8 cannot hold becomes a question mark."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)
