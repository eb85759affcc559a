"""Training, validation and test: a patient, or an image with all its copies, is in one of them only."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("train", "val", "test")
SHARE = 0.1  # of the groups is for validation, and as much for the test


class Item(NamedTuple):
    """What a split needs to know of a sample."""

    group: str  # of the patient, or of equal images: never divided
    label: int = 0  # of the class, whose shares are alike in all parts
    part: str | None = None  # where a folder or a list puts it
    place: str = ""  # to be named in a refusal


class Split(NamedTuple):
    """Positions in the list of samples; `judged_on` is "test", or "val" if nothing else was held out."""

    train: list[int]
    val: list[int]
    test: list[int]
    judged_on: str


def split(items: Sequence[Item]) -> Split:
    """As folders or lists say, else about 80, 10 and 10 % of the groups of each label, chosen by their digests.

    Raises: ValueError if a group is in two parts, some samples but not all have a part, or there is too little.
    """
    check_groups(items)
    parts: dict[str, list[int]] = {name: [] for name in NAMES}
    if any(item.part for item in items):
        for place, item in enumerate(items):
            if item.part is None:
                raise ValueError(
                    f"the lists of a split need to name every image, got none for {item.place}; add it to one"
                )
            parts[item.part].append(place)
        if not parts["train"]:
            raise ValueError("a split needs images to train on, got none; fill the part train")
    else:
        _draw(items, list(range(len(items))), parts, ("test", "val"))
    if not parts["val"]:
        rest, parts["train"] = parts["train"], []
        _draw(items, rest, parts, ("val",))
    judged_on = "test" if parts["test"] else "val"
    return Split(parts["train"], parts["val"], parts["test"] or parts["val"], judged_on)


def check_groups(items: Sequence[Item]) -> None:
    """Raise ValueError if a patient is in two parts: what is learned of one would be tested on the same."""
    seen: dict[str, Item] = {}
    for item in items:
        first = seen.setdefault(item.group, item)
        if first.part != item.part:
            raise ValueError(
                f"a patient or image needs to be in one part of the split, got {first.place} in {first.part} and "
                f"{item.place} in {item.part}, which are of the same; move one of them"
            )


def _draw(
    items: Sequence[Item], places: list[int], parts: dict[str, list[int]], held: tuple[str, ...]
) -> None:
    """Put the groups of `places` into the parts `held`, a tenth each and at least one, and the rest into "train"."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place in places:
        groups[items[place].group].append(place)
    by_label: dict[int, list[str]] = defaultdict(list)
    for group, members in groups.items():
        by_label[items[members[0]].label].append(group)
    for label, names in sorted(by_label.items()):
        if len(names) <= len(held):
            raise ValueError(
                f"a split needs at least {len(held) + 1} patients or different images of each class, "
                f"got {len(names)} of class {label}, the first being {items[groups[names[0]][0]].place}; add some"
            )
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        count = max(1, round(SHARE * len(names)))
        for number, name in enumerate(names):
            turn = number // count
            parts[held[turn] if turn < len(held) else "train"].extend(groups[name])
    for part in parts.values():
        part.sort()
