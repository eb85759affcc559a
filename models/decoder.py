"""A LLaMA-style language model: RMSNorm, rotary positions, SwiGLU, causal attention, no biases.

Every weight that `lowrank_geo.convert` should see is exactly an `nn.Linear`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lowrank_geo.models.cache import Cache, causal_mask
from lowrank_geo.models.checks import check_fields, check_heads
from lowrank_geo.models.rope import Rotation, rotate, rotation

Device = torch.device | str | None


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a `Decoder`.

    Raises: TypeError or ValueError for sizes that make no model, also when they come from a JSON file.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int  # width inside the MLP
    context: int  # most tokens in one sequence
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_heads("DecoderConfig", self.width, self.heads)
        if self.width // self.heads % 2:
            raise ValueError(
                "DecoderConfig needs an even width per head for rotary positions, got "
                f"{self.width} / {self.heads} = {self.width // self.heads}; change width or heads"
            )
        if self.rope_theta <= 0:
            raise ValueError(
                f"DecoderConfig needs rope_theta > 0, got {self.rope_theta}; 10000.0 is usual"
            )


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int, device: Device = None) -> None:
        super().__init__()
        self.heads, self.layer = config.heads, layer
        width = config.width
        self.q = nn.Linear(width, width, bias=False, device=device)
        self.k = nn.Linear(width, width, bias=False, device=device)
        self.v = nn.Linear(width, width, bias=False, device=device)
        self.o = nn.Linear(width, width, bias=False, device=device)

    def forward(self, x: Tensor, turn: Rotation, cache: Cache | None = None) -> Tensor:
        """Shapes: x (B, T, width), turn over the T positions of x -> (B, T, width)."""
        Q, K, V = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        Q, K = rotate(Q, turn), rotate(K, turn)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.extend(self.layer, K, V)
            y = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
        else:
            K, V = cache.extend(self.layer, K, V)
            mask = causal_mask(Q.shape[2], K.shape[2], x.device)
            y = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
        return self.o(rearrange(y, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    """down(silu(gate x) ∘ up x)."""

    def __init__(self, width: int, hidden: int, device: Device = None) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, device=device)
        self.up = nn.Linear(width, hidden, bias=False, device=device)
        self.down = nn.Linear(hidden, width, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised copy of the stream and added to it."""

    def __init__(self, config: DecoderConfig, layer: int, device: Device = None) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=config.norm_eps, device=device)
        self.attention = Attention(config, layer, device)
        self.norm2 = nn.RMSNorm(config.width, eps=config.norm_eps, device=device)
        self.mlp = SwiGLU(config.width, config.hidden, device)

    def forward(self, x: Tensor, turn: Rotation, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), turn, cache)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Logits of the next token after every token.

    Shapes: tokens (B, T) of integers below vocab_size, T <= context -> (B, T, vocab_size).

    >>> model = Decoder(DecoderConfig(vocab_size=256, width=16, layers=2, heads=2, hidden=32, context=8))
    >>> model(torch.zeros(3, 5, dtype=torch.int64)).shape
    torch.Size([3, 5, 256])
    """

    def __init__(self, config: DecoderConfig, device: Device = None) -> None:
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.width, device=device)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer, device) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps, device=device)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False, device=device)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew, for example after `to_empty`; only before a conversion.

        Entries of a weight have variance 1 / in_features, so that every layer keeps the variance of what it
        reads. The two layers of a block that write to the stream are divided by √(2 layers), so that
        the stream has grown to about twice its variance after the last block, whatever the depth.
        """
        if self.embed.weight.is_meta:
            return  # torch imports 900 modules, for seconds, before a normal draw on `meta`
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                writes = name.endswith((".o", ".down"))
                branches = 2 * self.config.layers if writes else 1
                nn.init.normal_(module.weight, std=(module.in_features * branches) ** -0.5)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.embed.weight)

    def new_cache(self) -> Cache:
        """An empty cache to pass to `forward`, which reads each token once.

        >>> model = Decoder(DecoderConfig(vocab_size=9, width=4, layers=1, heads=1, hidden=4, context=8))
        >>> cache = model.new_cache()
        >>> with torch.no_grad():
        ...     prompt = model(torch.tensor([[1, 2, 3]]), cache=cache)
        ...     following = model(torch.tensor([[4]]), cache=cache)
        >>> following.shape, cache.length
        (torch.Size([1, 1, 9]), 4)
        """
        return Cache(self.config.layers, self.config.context)

    def forward(self, tokens: Tensor, *, cache: Cache | None = None) -> Tensor:
        start = 0 if cache is None else cache.length
        self._check(tokens, start, cache)
        x = self.embed(tokens)
        turn = rotation(
            start, tokens.shape[1], self.config.width // self.config.heads,
            theta=self.config.rope_theta, like=x,
        )  # fmt: skip
        for block in self.blocks:
            x = block(x, turn, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.lm_head(self.norm(x))

    def _check(self, tokens: Tensor, start: int, cache: Cache | None) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder needs integer tokens of shape (B, T), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}; pass token ids as a batch"
            )
        if start + tokens.shape[1] > self.config.context:
            before = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"Decoder needs at most {self.config.context} tokens, got {tokens.shape[1]}{before}; "
                "shorten the sequence or choose a longer context"
            )
        if cache is not None and torch.is_grad_enabled():
            raise RuntimeError(
                "Decoder needs gradients to be off when it is given a cache, got them enabled; "
                "call it under torch.no_grad()"
            )
