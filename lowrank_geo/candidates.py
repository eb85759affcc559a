"""Which modules of a model can become low-rank, and why the others stay dense."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.lowrank_layer import LowRankLayer

# Output heads by their usual names: the same ratio of rank in all layers would give one of ten classes rank 1.
DEFAULT_SKIP = ("lm_head", "head", "score", "fc", "classifier.6")
KINDS = (
    "linear",
    "conv1d",
    "conv2d",
    "other",
)  # conv1d: Hugging Face's Conv1D, a transposed Linear
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALREADY = "already low-rank"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Candidate(NamedTuple):
    """A module with a weight matrix; convertible if `reason` is empty."""

    names: tuple[str, ...]  # a shared module has several
    module: nn.Module
    kind: str
    m: int
    n: int
    reason: str

    @property
    def name(self) -> str:
        return self.names[0]


def find_candidates(model: nn.Module, skip: Sequence[str] = ()) -> list[Candidate]:
    """Every module with a weight matrix, in the order of the model; a shared module appears once.

    >>> [(c.name, c.reason) for c in find_candidates(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))]
    [('0', '')]
    """
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    owners = _readers_of_weights(model)
    found = []
    for module, names in all_names(model).items():
        matrix = _matrix(module)
        if matrix is None or any("parametrizations" in name.split(".") for name in names):
            continue
        reason = _left_alone(module, names, skip) or owners.get(module) or _not_exact(module)
        reason = reason or _not_plain(module) or _not_alone(module, users)
        found.append(Candidate(names, module, *matrix, reason))
    return found


def all_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The modules of a model with all their names, each module once."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {module: tuple(listed) for module, listed in names.items()}


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module or one around it, by its full name or its last parts; * and ? are wild.

    >>> matches("mlp", "blocks.0.mlp.up"), matches("blocks.?.mlp", "blocks.0.mlp.up"), matches("m", "mlp")
    (True, True, False)
    """
    parts = name.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in around)


def hooked(module: nn.Module) -> bool:
    """Whether code of others is attached to this module and would be lost with it."""
    tensors = [p for p in module._parameters.values() if p is not None]
    return (
        any(getattr(module, name, None) for name in HOOKS)
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in tensors)
        or "forward" in vars(module)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D, without importing transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _matrix(module: nn.Module) -> tuple[str, int, int] | None:
    """kind, m, n of the module, or None if it has no weight matrix."""
    if isinstance(module, LowRankLayer):
        kind = "conv2d" if isinstance(module, LowRankConv2d) else "linear"
        if isinstance(module, LowRankLinear) and module.transposed:
            kind = "conv1d"
        return kind, module.U.shape[0], module.V.shape[0]
    if isinstance(module, nn.MultiheadAttention):
        return "other", 3 * module.embed_dim, module.embed_dim
    if isinstance(module, _ConvNd):
        kind = "conv2d" if isinstance(module, nn.Conv2d) else "other"
        columns = module.in_channels // module.groups * math.prod(module.kernel_size)
        return kind, module.out_channels, columns
    if is_conv1d(module):
        return "conv1d", int(module.nf), int(module.nx)  # type: ignore[arg-type]
    m, n = (getattr(module, name, None) for name in ("out_features", "in_features"))
    if not isinstance(m, int) or not isinstance(n, int):
        return None
    if isinstance(module, nn.Linear):
        return "linear", m, n
    # Quantised layers of every library carry these two names; a block of several layers may too.
    block = any(isinstance(inner, nn.Linear) for inner in module.modules())
    return None if block else ("other", m, n)


def _left_alone(module: nn.Module, names: tuple[str, ...], skip: Sequence[str]) -> str:
    if isinstance(module, LowRankLayer):
        return ALREADY
    for pattern in skip:
        if any(matches(pattern, name) for name in names):
            return f"skipped by the pattern {pattern!r}"
    return ""


def _readers_of_weights(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside a module that reads or writes their `weight` itself, with the reason."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention computes with its weights directly"
        elif peft is not None and isinstance(module, peft.BaseTunerLayer):
            reason = "a PEFT adapter adds to this weight in place"
        else:
            continue
        reasons.update(dict.fromkeys(module.modules(), reason))
    return reasons


def _not_exact(module: nn.Module) -> str:
    if is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"  # type: ignore[arg-type]
    exact = type(module) in (nn.Linear, nn.Conv2d)
    if is_conv1d(module):
        exact = type(module) is sys.modules["transformers.pytorch_utils"].Conv1D
    if not exact:
        return f"a {type(module).__name__}, only Linear, Conv1D and Conv2d themselves are converted"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"a convolution of {module.groups} groups, its kernel is not one matrix"
    return ""


def _not_plain(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters, as by weight_norm or pruning"
    held = (module._parameters, module._buffers, module._modules)
    extra = [name for store in held for name in store if name not in ("weight", "bias")]
    if extra:
        return f"it also holds {', '.join(extra)}"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, quantised"
    return ""


def _not_alone(module: nn.Module, users: Counter[int]) -> str:
    if users[id(module.weight)] > 1:
        return "its weight is tied to another module's"
    if hooked(module):
        return "it has hooks or a replaced forward, which would be lost"
    return ""
