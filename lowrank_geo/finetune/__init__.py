"""Fine-tune a Hugging Face model with adapters, and compare methods: what `lowrank-geo finetune` runs.

The runs are in `lowrank_geo.finetune.run`, which needs the packages of `lowrank-geo[peft]`; this module does not, so
that the command line can name its options without them.
"""

from lowrank_geo.finetune.config import FinetuneConfig

__all__ = ["FinetuneConfig"]
