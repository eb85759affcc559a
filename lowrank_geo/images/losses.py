"""What segmentation minimises: cross-entropy of the pixels plus Dice of the classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1.0


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """BCE + Dice of the published harness; with more than two classes its counterpart, cross-entropy + mean Dice.

    With two classes the difference of the logits is that of one sigmoid output, so cross-entropy is BCE.
    Shapes: logits (B, C, H, W), mask (B, H, W) integers below C -> (); computed in float32 under autocast too.
    """
    logits = logits.float()
    # One row a pixel: on CUDA the two-dimensional form is not deterministic.
    rows = logits.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(rows, mask.flatten().long()) + dice_loss(logits, mask)


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 − (2 Σ p t + 1) / (Σ p + Σ t + 1), sums over the batch, the mean over all classes but the background.

    Shapes: logits (B, C, H, W), mask (B, H, W) integers below C -> ().
    Source: Milletari et al., V-Net, arXiv 1606.04797, with the smoothing of the TransNetR code.
    """
    probabilities = logits.softmax(1)[:, 1:]  # (B, C − 1, H, W)
    targets = one_hot(mask, logits.shape[1])[:, 1:]
    both = (probabilities * targets).sum((0, 2, 3))
    either = probabilities.sum((0, 2, 3)) + targets.sum((0, 2, 3))
    return 1 - ((2 * both + SMOOTH) / (either + SMOOTH)).mean()


def one_hot(mask: Tensor, classes: int) -> Tensor:
    """Shapes: mask (B, H, W) -> (B, classes, H, W), float32."""
    return torch.stack([mask == c for c in range(classes)], 1).float()


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, in float32. Shapes: logits (B, C), labels (B) -> ()."""
    return F.cross_entropy(logits.float(), labels.long())
