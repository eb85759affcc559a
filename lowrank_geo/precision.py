"""How exactly torch multiplies float32 matrices: the user's choice in layers, in full in steps of optimizers.

TF32 keeps 10 bits of a factor and autocast to bfloat16 7: enough for activations, not for frames that stay orthonormal
and for iterations that square their errors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def rounds_products() -> bool:
    """Whether the user lets torch round float32 products on a GPU, in either of torch's two ways to say so."""
    precision = _legacy_precision()
    if precision is None:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return precision != "highest"


def _legacy_precision() -> str | None:
    """The global setting; None where the setting of a backend was used, after which torch refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever autocast and torch's settings say outside. Costs no launch.

    >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        legacy = _legacy_precision()
        if legacy is None:
            matmul = torch.backends.cuda.matmul
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        elif legacy != "highest":
            stack.callback(torch.set_float32_matmul_precision, legacy)
            torch.set_float32_matmul_precision("highest")
        yield
