"""The keys and values of the tokens a decoder has read, so that one more token costs O(T)."""

import torch
from torch import Tensor


class Cache:
    """Keys and values of the first `length` tokens, for every block; room for `context` of them.

    `Decoder.forward` fills it and then moves `length`; a call that fails leaves the tokens as they were.
    Memory is taken at the first call, in the dtype and on the device of the keys.
    """

    def __init__(self, layers: int, context: int) -> None:
        self.context = context
        self.length = 0
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens of one block, and return those of all tokens.

        Shapes: K, V (B, heads, T, d) -> two of (B, heads, length + T, d), views of the cache.
        Raises: ValueError if the batch is not the one that the cache was begun with.
        """
        stored = self._stored[layer]
        if stored is None:
            shape = (*K.shape[:2], self.context, K.shape[3])
            stored = (K.new_empty(shape), V.new_empty(shape))
            self._stored[layer] = stored
        if stored[0].shape[0] != K.shape[0]:
            raise ValueError(
                f"Cache needs a batch of {stored[0].shape[0]}, as in its first call, got "
                f"{K.shape[0]}; begin a new cache"
            )
        end = self.length + K.shape[2]
        for kept, new in zip(stored, (K, V), strict=True):
            kept[:, :, self.length : end] = new
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as read, once every block has stored them."""
        self.length += tokens


def causal_mask(tokens: int, length: int, device: torch.device) -> Tensor | None:
    """Which of `length` keys the last `tokens` queries see: none after their own; None means all.

    >>> causal_mask(2, 4, torch.device("cpu"))
    tensor([[ True,  True,  True, False],
            [ True,  True,  True,  True]])
    """
    if tokens == 1:
        return None
    return torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)
