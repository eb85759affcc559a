"""Decoders by name.

`60m` to `1b` are the LLaMA sizes on which GaLore and the methods after it are compared; the others read
bytes and train on a laptop. The name is about the number of parameters before conversion.
"""

import dataclasses

from lowrank_geo.models.decoder import Decoder, DecoderConfig, Device

DECODERS: dict[str, DecoderConfig] = {
    "1m": DecoderConfig(vocab_size=256, width=128, layers=4, heads=4, hidden=384, context=128),
    "2m": DecoderConfig(vocab_size=256, width=192, layers=4, heads=6, hidden=512, context=128),
    "10m": DecoderConfig(vocab_size=256, width=320, layers=8, heads=5, hidden=864, context=256),
    "30m": DecoderConfig(vocab_size=256, width=512, layers=9, heads=8, hidden=1376, context=256),
    # Zhao et al., GaLore, arXiv 2403.03507, with the sequences of 256 tokens of its experiments.
    "60m": DecoderConfig(vocab_size=32000, width=512, layers=8, heads=8, hidden=1376, context=256),
    "130m": DecoderConfig(
        vocab_size=32000, width=768, layers=12, heads=12, hidden=2048, context=256
    ),
    "350m": DecoderConfig(
        vocab_size=32000, width=1024, layers=24, heads=16, hidden=2736, context=256
    ),
    "1b": DecoderConfig(
        vocab_size=32000, width=2048, layers=24, heads=32, hidden=5461, context=256
    ),
}


def decoder(
    name: str,
    *,
    vocab_size: int | None = None,
    context: int | None = None,
    device: Device = None,
) -> Decoder:
    """A new decoder of the preset `name`, for another vocabulary or context where given.

    Raises: ValueError for an unknown name or a size below 1.

    >>> sum(p.numel() for p in decoder("60m", device="meta").parameters())
    58073600
    """
    if name not in DECODERS:
        raise ValueError(
            f"decoder needs a preset out of {', '.join(DECODERS)}, got {name!r}; use one of them"
        )
    config = DECODERS[name]
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=vocab_size)
    if context is not None:
        config = dataclasses.replace(config, context=context)
    return Decoder(config, device)
