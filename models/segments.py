"""The way back in float64: segment by segment from states that were kept, in halves where too many bits are lost."""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.models.floating_point import FloatState, Segments, agree
from lowrank_geo.models.way_back import Gradients, Way, add, other_values, step_back


class Place(NamedTuple):
    """A state that is known without error, before a block."""

    before: int
    state: FloatState


def through_segments(
    way: Way, arithmetic: Segments, state: FloatState, end: Gradients
) -> Gradients:
    """The gradients before all blocks.

    Raises: RuntimeError if a block gives other values than on the way there, by more than the tolerance.
    """
    last, found = Place(len(way.call.blocks), state), end
    for number, kept in reversed(list(enumerate(way.tape.kept))):
        first = Place(number * arithmetic.length, kept)
        found = through(way, arithmetic, first, last, found)
        last = first
    return found


def through(way: Way, arithmetic: Segments, first: Place, last: Place, end: Gradients) -> Gradients:
    """The gradients before a segment.

    How much an undone step multiplies an error depends on the blocks, too: where it was too much, the middle is
    computed from the start, and each half undone by itself.
    """
    found, agrees = undone(way, arithmetic, first, last, end)
    if agrees:
        for key, gradient in found.total.items():
            add(end.total, key, gradient)
        return found._replace(total=end.total)
    del found
    if last.before - first.before == 1:
        raise other_values(f"block {first.before}")
    middle = computed_again(way, arithmetic, first, last)
    found = through(way, arithmetic, middle, last, end)
    return through(way, arithmetic, first, middle, found)


def undone(
    way: Way, arithmetic: Segments, first: Place, last: Place, end: Gradients
) -> tuple[Gradients, Tensor]:
    """Gradients before a segment, those in `total` of its blocks only; and whether its start has been met."""
    state, found = last.state, end._replace(total={})
    largest = arithmetic.largest(first.state)
    for index in reversed(range(first.before + 1, last.before)):
        push, found = step_back(way, index, arithmetic.position_before(state), found)
        largest = torch.maximum(largest, arithmetic.largest(state))
        state = arithmetic.retreat(state, push)
    # The first step is done again instead of undone: it starts from a state without error.
    push, found = step_back(way, first.before, first.state.x, found)
    after = arithmetic.advance(first.state, push)
    largest = torch.maximum(largest, arithmetic.largest(after))
    return found, agree(after, state, largest * arithmetic.tolerance)


def computed_again(way: Way, arithmetic: Segments, first: Place, last: Place) -> Place:
    """The middle of a segment.

    Raises: RuntimeError if its end is not met again: then it is not lost bits, but the blocks that differ.
    """
    state, middle, half = first.state, first, (first.before + last.before) // 2
    largest = arithmetic.largest(state)
    for index in range(first.before, last.before):
        if index == half:
            middle = Place(index, state)
        x = arithmetic.real(state.x, way.dtype).detach().requires_grad_()
        state = arithmetic.advance(state, arithmetic.push(way.again(index, x)[0]))
        largest = torch.maximum(largest, arithmetic.largest(state))
    if not agree(state, last.state, largest * arithmetic.tolerance):
        raise other_values(f"every block from {first.before} to {last.before - 1}")
    return middle
