"""PNG and JPEG, through Pillow."""

import warnings
from pathlib import Path

import numpy as np

try:
    from PIL import Image, ImageOps
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "reading images needs the package pillow, got none; pip install 'lowrank-geo[images]'"
    ) from missing

from lowrank_geo.images.bad_files import BadFile, decoding, regular

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # the decoders that a file can reach, whatever its name
MAX_IMAGE_PIXELS = 64 * 2**20  # a larger image is a bomb, or needs to be cut into tiles first


def read_picture(path: Path) -> np.ndarray:
    """An image as grey levels or colours.

    Shapes: -> (H, W) or (H, W, 3), float32 in [0, 1]; an alpha channel is dropped, EXIF orientation is obeyed.
    Raises: BadFile for a file that is damaged, of another format or too large.
    """
    image = _open(path)
    with decoding(path, "PNG or JPEG"):
        if image.mode.startswith("I"):  # 16 bits
            return np.asarray(image, dtype=np.float32).clip(0, 65535) / 65535
        grey = image.mode in ("1", "L", "LA")
        values = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32)
        return values / 255


def read_labels(path: Path) -> np.ndarray:
    """A mask as it is stored: grey levels, palette indices, or colours that are all grey.

    Shapes: -> (H, W), int64.
    Raises: BadFile as `read_picture`, and for colours.
    """
    image = _open(path)
    with decoding(path, "PNG or JPEG"):
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            colours = np.asarray(image.convert("RGB")).astype(np.int64)
            # JPEG's colour conversion moves grey by a level or two.
            if np.ptp(colours, axis=-1).max(initial=0) > 4:
                raise BadFile(f"a mask needs grey levels or palette indices, got colours in {path}")
            return colours[..., 1]
        stored = image.convert("L") if image.mode == "1" else image
        return np.asarray(stored).astype(np.int64)


def _open(path: Path) -> Image.Image:
    regular(path)
    with decoding(path, "PNG or JPEG", Image.DecompressionBombError), warnings.catch_warnings():
        # Pillow's own limit only warns up to twice its value, and is a global that a user may have raised.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise BadFile(
                    f"an image needs at most {MAX_IMAGE_PIXELS:,} pixels, got {width} x {height} in {path}"
                )
            image.load()
            return ImageOps.exif_transpose(image)
