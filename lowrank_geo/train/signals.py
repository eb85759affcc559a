"""Ctrl-C and SIGTERM as a wish that the loop reads between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lowrank_geo.train.distributed import Workers


class Wish:
    """The signal that asked this process to stop, 0 while none did."""

    number = 0

    def agreed(self, workers: Workers) -> int:
        """The signal, if any of the processes got one: all must leave the loop at the same step."""
        interrupts, terms = workers.total(
            self.number == signal.SIGINT, self.number == signal.SIGTERM
        )
        return int(signal.SIGINT) if interrupts else int(signal.SIGTERM) if terms else 0


@contextmanager
def stop_signals() -> Iterator[Wish]:
    """Record the first SIGINT or SIGTERM; the second one has its usual effect."""
    wish = Wish()
    usual: dict[int, Any] = {}

    def record(number: int, frame: FrameType | None) -> None:
        wish.number = number
        for name, handler in usual.items():
            signal.signal(name, handler)

    for stop in (signal.SIGINT, signal.SIGTERM):
        usual[stop] = signal.signal(stop, record)
    try:
        yield wish
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
