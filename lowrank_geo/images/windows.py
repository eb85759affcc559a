"""From stored values to grey levels in [0, 1]: windows of Hounsfield units, or percentiles where there are none."""

import numpy as np

# Centre and width in HU, as radiologists set them.
WINDOWS = {
    "abdomen": (40.0, 400.0),
    "liver": (30.0, 150.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
}
AUTOMATIC = "percentiles"
TAILS = (0.5, 99.5)  # percent that "percentiles" cuts off


def window(values: np.ndarray, name: str) -> np.ndarray:
    """Grey levels of a CT image in HU: black below the window, white above.

    `name` is one of WINDOWS, or "percentiles", which suits any scanner: the middle 99 % of the values.
    Shapes: (...) -> (...), float32 in [0, 1]; values that are not finite become black.
    Raises: ValueError for an unknown name.

    >>> window(np.array([-160.0, 40.0, 240.0, 3000.0]), "abdomen").tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    values = np.nan_to_num(values.astype(np.float64), nan=-1e6, posinf=1e6, neginf=-1e6)
    if name == AUTOMATIC:
        low, high = np.percentile(values, TAILS)
    elif name in WINDOWS:
        centre, width = WINDOWS[name]
        low, high = centre - width / 2, centre + width / 2
    else:
        names = ", ".join([*WINDOWS, AUTOMATIC])
        raise ValueError(f"window needs one of {names}, got {name!r}; use one of them")
    grey = (values - low) / max(high - low, 1e-12)
    return grey.clip(0, 1).astype(np.float32)
