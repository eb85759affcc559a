"""Models to train in low rank: plain modules of `nn.Linear` and `nn.Conv2d`, made low-rank by `convert`."""

from lowrank_geo.models.cache import Cache
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.models.mlp import MLP
from lowrank_geo.models.momentum import MomentumStack
from lowrank_geo.models.momentum_classifier import MomentumClassifier
from lowrank_geo.models.presets import DECODERS, decoder
from lowrank_geo.models.resnet import ResNet
from lowrank_geo.models.shared_range import SharedRangeStack
from lowrank_geo.models.to_momentum import to_momentum
from lowrank_geo.models.unet import MomentumUNet
from lowrank_geo.models.vgg import VGG, VGGConfig, vgg11, vgg16
from lowrank_geo.models.vit import ViT, ViTConfig

__all__ = [
    "DECODERS",
    "MLP",
    "VGG",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "MomentumClassifier",
    "MomentumStack",
    "MomentumUNet",
    "ResNet",
    "SharedRangeStack",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "decoder",
    "to_momentum",
    "vgg11",
    "vgg16",
]
