"""What the configuration says about one adapter at one layer, and whether it fits there."""

from typing import NamedTuple

from lowrank_geo.peft.blocks import Blocks


class Adapter(NamedTuple):
    """What the configuration says about one adapter at one layer."""

    name: str
    layer: str  # the name of the layer, for messages
    rank: int
    scale: float
    dropout: float
    init: str
    blocks: Blocks | None
    inference: bool


def check_fits(adapter: Adapter, m: int, n: int) -> None:
    """Raise ValueError unless 1 <= rank <= min(m, n)."""
    if not 1 <= adapter.rank <= min(m, n):
        raise ValueError(
            f"`r` should be a positive integer value not larger than {min(m, n)} for the {m}x{n} weight of "
            f"'{adapter.layer}', but the value passed is {adapter.rank}. Please lower `r`, or give this layer a "
            "smaller one in `rank_pattern`."
        )
