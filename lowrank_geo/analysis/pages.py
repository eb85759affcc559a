"""The parts of a report of the laboratory, and how they become one page that loads nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lowrank_geo import page
from lowrank_geo.canvas import FULL, Figure, to_svg


class Report(NamedTuple):
    """What an analysis found, before it is text or HTML."""

    title: str
    status: str
    summary: str
    numbers: list[tuple[str, str, str]]  # (what, value, remark)
    figures: list[tuple[str, Figure, str]]  # (title, figure, caption)
    reasons: tuple[str, ...] = ()
    settings: Mapping[str, object] = {}

    def text(self) -> str:
        """The numbers and reasons, a line each.

        >>> Report("A", "done", "B.", [("rate", "0.9", "per step")], []).text()
        'B.\\nrate: 0.9 (per step)'
        """
        lines = [
            f"{what}: {value} ({remark})" if remark else f"{what}: {value}"
            for what, value, remark in self.numbers
        ]
        return "\n".join([self.summary, *lines, *self.reasons])

    def write(self, path: Path) -> Path:
        """Write the page.

        Raises: as `check_place`.
        """
        check_place(path)
        page.write_page(path, page.page(self.title, self._parts()))
        return path

    def _parts(self) -> Iterable[str]:
        yield page.heading(self.title, self.status)
        yield page.paragraph(self.summary)
        yield page.key_numbers(self.numbers)
        if self.reasons:
            yield page.section("Why", *map(page.paragraph, self.reasons))
        drawn = [
            page.figure(to_svg(figure, title), title, caption, half=figure.get_figwidth() < FULL[0])
            for title, figure, caption in self.figures
        ]
        if drawn:
            yield page.section("Figures", '<div class="figures">', *drawn, "</div>")
        yield page.section("Settings", page.settings(self.settings))


def check_place(path: Path) -> None:
    """Raise FileNotFoundError or IsADirectoryError unless a report can be written to `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"a report needs a folder that exists, got {path.parent}; make it, or name another --out"
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"a report needs the name of a file, got the folder {path}; pass e.g. --out {path / 'report.html'}"
        )
