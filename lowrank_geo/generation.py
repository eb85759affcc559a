"""Text from a trained decoder."""

import math

import torch
from torch import Tensor

from lowrank_geo.data import Tokenizer
from lowrank_geo.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    *,
    count: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
) -> Tensor:
    """The given tokens followed by `count` drawn ones; temperature 0 takes the most likely one.

    Past the model's context only the last half of a context is remembered, then a whole again.

    Shapes: tokens (T) int64 -> (T + count), on the CPU.
    Raises: ValueError for no tokens, or a temperature, top_k, count or seed out of range.

    >>> from lowrank_geo.models.presets import decoder
    >>> generate(decoder("1m", context=8), torch.tensor([1, 2]), count=20).shape
    torch.Size([22])
    """
    _check(tokens, count, temperature, top_k, seed)
    generator = torch.Generator().manual_seed(seed)
    device = model.lm_head.weight.device
    context = model.config.context
    found = tokens.tolist()
    cache, unread = model.new_cache(), found[-context:]
    for _ in range(count):
        if cache.length + len(unread) > context:
            cache, unread = model.new_cache(), found[-max(1, context // 2) :]
        logits = model(torch.tensor([unread], device=device), cache=cache)[0, -1]
        found.append(_draw(logits.double().cpu(), temperature, top_k, generator))
        unread = found[-1:]
    return torch.tensor(found)


def continue_text(model: Decoder, tokenizer: Tokenizer, prompt: str, **sampling: float) -> str:
    """A prompt and the text that `generate`, told the rest, continues it with."""
    tokens = torch.tensor(tokenizer.encode(prompt).tolist(), dtype=torch.int64)
    return tokenizer.decode(generate(model, tokens, **sampling).numpy())  # type: ignore[arg-type]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token.

    Shapes: logits (vocabulary).
    """
    if not logits.isfinite().all():
        raise ValueError("generate needs a model with finite outputs, got others; it has diverged")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    # Subtracting the largest first keeps tiny temperatures finite.
    probabilities = ((logits - logits.max()) / temperature).softmax(0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(tokens: Tensor, count: int, temperature: float, top_k: int | None, seed: int) -> None:
    rules = {
        "a prompt of at least one token": (tokens.dim() == 1 and tokens.numel() > 0, "none"),
        "tokens >= 0": (count >= 0, count),
        "a finite temperature >= 0": (0 <= temperature < math.inf, temperature),
        "top_k >= 1": (top_k is None or top_k >= 1, top_k),
        "a seed >= 0 and below 2^63": (0 <= seed < 2**63, seed),
    }
    for rule, (holds, value) in rules.items():
        if not holds:
            raise ValueError(f"generate needs {rule}, got {value}; correct it")
