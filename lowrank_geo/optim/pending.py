"""A step in parts, for those who choose its length from all of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Pending(NamedTuple):
    """What the optimizer would do to some parameters of one group; nothing has moved yet but state."""

    group: dict[str, Any]
    slope: Callable[[], Tensor]  # () -> (), ⟨gradient, direction⟩ over these parameters
    squares: Callable[[], Tensor]  # () -> (2), |gradient|² and |direction|² over them
    take: Callable[[float | Tensor], None]  # move by a learning rate
