"""The tensors of a model as a file holds them: each once, under its first name."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_geo.convert import layers_to_convert
from lowrank_geo.plan import Plan
from lowrank_geo.replacement import low_rank, swap

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")
FACTOR = ("F64", "F32")


class Stored(NamedTuple):
    """What the header of a file says of a tensor, or what it may say."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # in the words of safetensors


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers themselves; tied ones under their first name only.

    Raises: ValueError for a state that is not made of tensors, or of a dtype we do not store.
    """
    seen: set[int] = set()
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"a saved model needs a state_dict of ordinary tensors, got {found} at {name!r}; "
                "use torch.save for this model"
            )
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value
    return tensors


def writable(model: nn.Module) -> dict[str, Tensor]:
    """The same tensors on the CPU, contiguous, none sharing memory with another.

    Raises: ValueError for a tensor on `meta`.
    """
    memory: set[int] = set()
    result = {}
    for name, tensor in tensors_of(model).items():
        if tensor.is_meta:
            raise ValueError(
                f"save_pretrained needs tensors with values, got {name!r} on meta; initialise or load the model"
            )
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        if address in memory:
            value = value.clone()
        memory.add(address)
        result[name] = value
    return result


def expected(model: nn.Module, plan: Plan) -> dict[str, Stored]:
    """What a file must hold for `model` once converted by `plan`; nothing is converted.

    Raises: ValueError if the plan does not fit the model.
    """
    result = {}
    for name, tensor in tensors_of(model).items():
        free = tensor.is_meta and tensor.is_floating_point()
        result[name] = Stored(tuple(tensor.shape), FLOATING if free else (DTYPES[tensor.dtype],))
    for entry, _ in layers_to_convert(model, plan):
        result.pop(key(entry.name, "weight"), None)
    return {**result, **factors(plan)}


def factors(plan: Plan) -> dict[str, Stored]:
    """U (m, r), S (r, r) and V (n, r) of every low-rank layer of the plan."""
    result = {}
    for entry in plan.entries:
        if entry.rank is not None:
            m, n, r = entry.m, entry.n, entry.rank
            for letter, shape in (("U", (m, r)), ("S", (r, r)), ("V", (n, r))):
                result[key(entry.name, letter)] = Stored(shape, FACTOR)
    return result


def key(module: str, tensor: str) -> str:
    """The name of a tensor of a module; that of the root is empty."""
    return f"{module}.{tensor}" if module else tensor


def make_room(model: nn.Module, plan: Plan) -> tuple[nn.Module, dict[str, torch.device]]:
    """Convert `model` by `plan` with factors on `meta`, and say where each of them belongs."""
    new: dict[nn.Module, nn.Module] = {}
    devices = {}
    for entry, candidate in layers_to_convert(model, plan):
        assert entry.rank is not None
        weight = candidate.module._parameters["weight"]
        assert weight is not None
        shell = copy.copy(candidate.module)
        shell._parameters = {
            "weight": nn.Parameter(weight.detach().to("meta"), weight.requires_grad),
            "bias": None,
        }
        layer = low_rank(shell, entry.rank, plan.init)
        layer.register_parameter("bias", candidate.module._parameters["bias"])
        new[candidate.module] = layer
        devices.update({key(entry.name, letter): weight.device for letter in "USV"})
    return swap(model, new), devices


def fill(
    model: nn.Module, values: Mapping[str, Tensor], devices: Mapping[str, torch.device]
) -> None:
    """Give every tensor its value: in place, or as a new one, on the CPU or `devices`, where it was on `meta`."""
    fresh: dict[int, Tensor] = {}
    for name, target in tensors_of(model).items():
        if not target.is_meta:
            with torch.no_grad():
                target.copy_(values[name])
            continue
        device = devices.get(name, torch.device("cpu"))
        value = values[name].to("cpu" if device.type == "meta" else device)
        new = isinstance(target, nn.Parameter)
        fresh[id(target)] = nn.Parameter(value, target.requires_grad) if new else value
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if id(old) in fresh:
                    store[name] = fresh[id(old)]  # type: ignore[assignment]
