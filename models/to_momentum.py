"""The residual stages of an existing network as momentum stages."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

from torch import Tensor, nn

from lowrank_geo.models.momentum import Mode, MomentumStack

Model = TypeVar("Model", bound=nn.Module)
STAGES = ("layer1", "layer2", "layer3", "layer4", "blocks", "layers")
SHORTCUTS = ("downsample", "shortcut")


class Increment(nn.Module):
    """f(x) = block(x) − x of a residual block that adds x itself, also before a last nonlinearity."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return self.block(x, *arguments, **keywords) - x


def to_momentum(
    model: Model,
    gamma: float = 0.9,
    *,
    mode: Mode = "backprop",
    stages: Sequence[str] | None = None,
) -> Model:
    """Make neighbouring residual blocks that keep the shape one `MomentumStack`, in place; γ = 0 changes nothing.

    `stages` names the lists of blocks (Sequential or ModuleList); by default those called layer1 to layer4, blocks or
    layers, as in torchvision's and our ResNet, `ViT` and `Decoder`. Blocks that resize stay as they are. Weights stay,
    but their names change: load checkpoints first, make optimizers and `convert` afterwards.

    Raises: ValueError for a γ outside [0, 1), γ = 0 in reversible mode, a stage that the model does not have, or a
        model without a block to change.
    Source: Sander et al., arXiv 2102.07870, section 3.

    >>> from lowrank_geo.models import ResNet
    >>> net = to_momentum(ResNet(20, width=4), gamma=0.9)
    >>> [type(stage).__name__ for stage in net.blocks]
    ['MomentumStack', 'Block', 'MomentumStack', 'Block', 'MomentumStack']
    """
    changed = 0
    for stage in list(_stages(model, stages)):
        parts: list[nn.Module] = []
        for keep, run in groupby(stage, _keeps_the_shape):
            blocks = list(run)
            if keep:
                changed += len(blocks)
                steps = [Increment(block) for block in blocks]
                parts.append(MomentumStack(steps, gamma, mode=mode).train(blocks[0].training))
            else:
                parts.extend(blocks)
        stage._modules.clear()
        stage._modules.update({str(index): part for index, part in enumerate(parts)})
    if not changed:
        raise ValueError(
            "to_momentum needs residual blocks that keep the shape in lists called "
            f"{', '.join(stages or STAGES)}, got none; name the lists of this model in stages"
        )
    return model


def _stages(
    model: nn.Module, names: Sequence[str] | None
) -> Iterator[nn.Sequential | nn.ModuleList]:
    if names is None:
        found = [getattr(model, name, None) for name in STAGES]
    else:
        known = dict(model.named_modules())
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"to_momentum needs stages of the model, got {missing[0]!r}; use names of model.named_modules()"
            )
        found = [known[name] for name in names]
    for stage in found:
        if isinstance(stage, nn.Sequential | nn.ModuleList):
            yield stage
        elif names is not None:
            raise ValueError(
                f"to_momentum needs stages that are Sequential or ModuleList, got {type(stage).__name__}; "
                "name the list of blocks itself"
            )


def _keeps_the_shape(block: nn.Module) -> bool:
    """Whether a residual block adds its own input: it is no stack yet and neither strides, widens nor projects."""
    if isinstance(block, MomentumStack):
        return False
    for name in SHORTCUTS:
        shortcut = getattr(block, name, None)
        if isinstance(shortcut, nn.Identity) or (
            isinstance(shortcut, nn.Sequential) and not len(shortcut)
        ):
            continue
        if shortcut is not None:
            return False
    convolutions: list[Any] = [m for m in block.modules() if hasattr(m, "in_channels")]
    if not convolutions:
        return True
    # Low-rank convolutions keep their stride in `geometry`.
    strides = [getattr(layer, "geometry", layer).stride for layer in convolutions]
    one = all(set(stride) == {1} for stride in strides)
    return one and convolutions[0].in_channels == convolutions[-1].out_channels
