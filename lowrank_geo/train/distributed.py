"""One process or many: who this one is, and the sums over all of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from lowrank_geo.train.stopped import Stopped

Result = TypeVar("Result")
SETTLE = 0.1  # seconds


class Workers(NamedTuple):
    """This process among those that train one model together."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def on_main(self, action: Callable[[], Result]) -> Result | None:
        """What `action` returns in the main process, None elsewhere; all stop if it fails.

        Raises: what `action` raises there, Stopped elsewhere.
        """
        failures = 1.0
        try:
            result = action() if self.main else None
            failures = 0.0
        finally:
            [failures] = self.total(failures)
        if failures:
            raise Stopped(f"process {self.rank} stops as the first one does; see its message", 2)
        return result


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """Join the processes that torchrun started, or be the only one.

    Raises: ValueError if cuda is asked for and not there.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ValueError("--device needs to be one that is present, got cuda; use --device cpu")
    kind = "cuda" if found and device != "cpu" else "cpu"
    if not dist.is_torchelastic_launched():
        yield Workers(torch.device(kind))
        return
    place = torch.device(kind)
    if kind == "cuda":
        place = torch.device(kind, dist.get_node_local_rank(0))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Workers(place, dist.get_rank(), dist.get_world_size())
    finally:
        # A thread of gloo needs the interpreter to let go of the last tensors it summed. Who drops the last reference
        # to the group waits for that thread with the interpreter locked, for ever: let it finish first.
        time.sleep(SETTLE)
        dist.destroy_process_group()
