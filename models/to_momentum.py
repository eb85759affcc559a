"""Momentum in the residual stages of a network that exists."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_geo.models.momentum import Mode, MomentumStack, check_gamma

STAGES = ("layer1", "layer2", "layer3", "layer4", "blocks", "layers")


class Difference(nn.Module):
    """f(x) = block(x) − x: what a residual block adds, whatever it is made of.

    Shapes: as the block, which keeps the shape of x.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        return self.block(x, *arguments) - x


def to_momentum(
    model: nn.Module,
    gamma: float = 0.9,
    *,
    stages: Iterable[str] | None = None,
    mode: Mode = "backprop",
) -> nn.Module:
    """Turn the residual stages of a network into momentum stages, in place; γ = 0 leaves what it computes.

    A stage is an nn.Sequential or nn.ModuleList of residual blocks, each of which is called with x first and returns
    one tensor, as the stages of torchvision's ResNets and of the ResNet, ViT and Decoder of this package. Its blocks
    are run through `MomentumStack` with f(x) = block(x) − x; blocks that change the shape stay and v starts anew
    behind them. Parameters stay the same objects under longer names.

    Args: stages: names of the stages; None for those called `layer1` … `layer4`, `blocks` or `layers` at the top.
    Returns: the model.
    Raises: ValueError if a named stage is missing, is no list of modules, or no stage is found; as `MomentumStack`.

    >>> from lowrank_geo.models import ResNet
    >>> model = to_momentum(ResNet(20), gamma=0.9)
    >>> [type(part).__name__ for part in model.blocks]
    ['MomentumStack', 'Block', 'MomentumStack', 'Block', 'MomentumStack']
    """
    check_gamma(gamma)
    names = [s for s in STAGES if hasattr(model, s)] if stages is None else list(stages)
    if not names:
        raise ValueError(
            f"to_momentum needs a model with stages called {', '.join(STAGES)}, got a {type(model).__name__} without; "
            "name them in stages"
        )
    found = {name: stage_called(model, name) for name in names}
    built = {name: grouped(stage, gamma, mode) for name, stage in found.items()}
    for name, parts in built.items():  # only when all of them could be built
        parent, _, child = name.rpartition(".")
        sequential = isinstance(found[name], nn.Sequential)
        new = nn.Sequential(*parts) if sequential else nn.ModuleList(parts)
        setattr(model.get_submodule(parent), child, new)
    return model


def stage_called(model: nn.Module, name: str) -> nn.Sequential | nn.ModuleList:
    try:
        stage = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"to_momentum needs stages of the model, got {name!r}, which it has not; see model.named_modules()"
        ) from None
    if not isinstance(stage, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"to_momentum needs stages that are an nn.Sequential or nn.ModuleList, got {name!r}, a "
            f"{type(stage).__name__}; name the list that holds the blocks"
        )
    return stage


def grouped(stage: Iterable[nn.Module], gamma: float, mode: Mode) -> list[nn.Module]:
    """The blocks with each run of shape-preserving ones as one stack."""
    parts: list[nn.Module] = []
    run: list[nn.Module] = []
    for block in stage:
        if keeps_shape(block):
            run.append(Difference(block))
            continue
        if run:
            parts.append(MomentumStack(run, gamma, mode=mode))
        parts.append(block)
        run = []
    if run:
        parts.append(MomentumStack(run, gamma, mode=mode))
    return parts


def keeps_shape(block: nn.Module) -> bool:
    """Whether the shortcut of a residual block is the identity: no `downsample`, `stride` or `padding` of channels."""
    strides: Any = getattr(block, "stride", 1)
    strides = strides if isinstance(strides, tuple) else (strides,)
    added: Any = getattr(block, "padding", 0)
    moved = getattr(block, "downsample", None) is not None or added
    return not moved and all(stride == 1 for stride in strides)
