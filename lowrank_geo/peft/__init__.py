"""Fixed-rank adapters as a method of PEFT; importing this module registers it.

>>> from peft import get_peft_model
>>> from torch import nn
>>> model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), FixedRankConfig(r=4, target_modules=["0"]))
>>> model.peft_type
<PeftType.LOWRANK_GEO: 'LOWRANK_GEO'>
"""

try:
    import peft  # noqa: F401 (only to say what is missing)
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lowrank_geo.peft needs the package {error.name}, got none; pip install 'lowrank-geo[peft]'",
        name=error.name,
    ) from error

from lowrank_geo.peft.config import FixedRankConfig
from lowrank_geo.peft.initial import collect_gradients
from lowrank_geo.peft.lora_export import export_lora
from lowrank_geo.peft.lora_import import import_lora
from lowrank_geo.peft.model import FixedRankModel
from lowrank_geo.peft.register import register
from lowrank_geo.peft.training import RankCallback, optimizer_for

register(FixedRankConfig, FixedRankModel)

__all__ = [
    "FixedRankConfig",
    "FixedRankModel",
    "RankCallback",
    "collect_gradients",
    "export_lora",
    "import_lora",
    "optimizer_for",
]
