"""DilatedSelfAttention: dilated attention as a layer of anybody's model; imports torch only."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.backends.dispatch import Backend
from longnet.attention.dilated import dilated_attention
from longnet.attention.pattern import DilationPattern
from longnet.positions import RotaryPositions, rotate

# Keywords of nn.MultiheadAttention's forward, and what to do instead.
_REFUSED = {
    "attn_mask": "an arbitrary mask cannot be honoured: is_causal, key_padding_mask and cu_seqlens say what is hidden",
    "need_weights": "the attention weights are never formed: leave need_weights away",
    "average_attn_weights": "the attention weights are never formed: leave average_attn_weights away",
    "padding_mask": "this layer has nn.MultiheadAttention's key_padding_mask, True where there is padding: pass its "
    "opposite, key_padding_mask=~padding_mask",
}
# Keywords of its constructor, likewise.
_NOT_BUILT = {
    "dropout": "attention dropout is not supported: leave dropout away, and drop out the output instead",
    "batch_first": "rows are (batch, tokens, channels), as with batch_first=True: leave batch_first away",
    "add_bias_kv": "there is no bias among keys and values: leave add_bias_kv away",
    "add_zero_attn": "there is no zero row among keys and values: leave add_zero_attn away",
    "kdim": "keys come from the same rows as queries: leave kdim away",
    "vdim": "values come from the same rows as queries: leave vdim away",
}


class DilatedSelfAttention(nn.Module):
    """Multi-head self-attention along a pattern, with the parameters of `nn.MultiheadAttention(batch_first=True)`.

    `load_state_dict` takes the weights of an `nn.MultiheadAttention` of the same sizes (`num_kv_heads` left out); with
    a pattern of one branch of rate 1, as long as the sequence, the two compute the same.

    Masks are said in two ways in PyTorch, and here as there:

    | | where | True means |
    |---|---|---|
    | `key_padding_mask` | this layer, `nn.MultiheadAttention` | padding |
    | `padding_mask` | `dilated_attention`, Hugging Face's `attention_mask` | a real token |

    Args:
        embed_dim: C, channels of the input and of the output.
        num_heads: H query heads, a divisor of embed_dim; head dim D = C / H.
        pattern: the branches.
        num_kv_heads: G key/value heads, a divisor of num_heads, which is also what it is when None.
        rope: base of rotary positions (arXiv:2104.09864), 10_000.0 say; None for a model that has positions of its own.
        bias: of the projections.
        device: of the parameters.
        dtype: of the parameters.
        backend: as in `dilated_attention`.
        refused: keywords that cannot be honoured, and are told so.

    Raises:
        ValueError: sizes that do not divide, or an odd head dim with `rope`.
        TypeError: `pattern` is no DilationPattern, or a keyword of `nn.MultiheadAttention` that cannot be honoured.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: DilationPattern,
        *,
        num_kv_heads: int | None = None,
        rope: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
        **refused: Any,
    ) -> None:
        super().__init__()
        for name in refused:
            raise TypeError(f"{name}: {_NOT_BUILT.get(name, 'DilatedSelfAttention has no such keyword')}")
        if not isinstance(pattern, DilationPattern):
            raise TypeError(
                f"pattern must be a DilationPattern, got {type(pattern).__name__}: DilationPattern.parse reads text"
            )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, num_kv_heads) < 1 or embed_dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                "num_heads must divide embed_dim, and num_kv_heads divide num_heads, got "
                f"embed_dim={embed_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}"
            )
        head_dim = embed_dim // num_heads
        if rope is not None and (isinstance(rope, bool) or rope < 1 or head_dim % 2):
            raise ValueError(
                "rope must be the base of the angles, 10_000.0 say, or None, and turns pairs of channels, got "
                f"rope={rope!r} with {head_dim} channels a head"
            )
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.pattern, self.backend = pattern, backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = (num_heads + 2 * num_kv_heads) * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, **made))
        self.in_proj_bias = nn.Parameter(torch.empty(rows, **made)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.positions = (
            None
            if rope is None
            else RotaryPositions(head_dim, rope, xpos_scale_base=None, max_position_embeddings=1).to(device)
        )
        self._has_warned = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.MultiheadAttention` does: Xavier's for the input, biases 0."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        *others: Tensor,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **refused: Any,
    ) -> Tensor:
        """Attend from every token of x to the others.

        Args:
            x: (B, T, C), or (T, C) for one sequence; any T.
            others: refused: query, key and value of `nn.MultiheadAttention` are one here.
            is_causal: hide the tokens after each query.
            key_padding_mask: (B, T), or (T,), bool, True for padding, which lies before or after a row's real tokens.
                Segments and positions count from the first real token; the padding's output is that of 0.
            cu_seqlens: (n + 1,) boundaries of documents packed into a batch of 1, as in `dilated_attention`.
            refused: keywords that cannot be honoured, and are told so.

        Returns:
            Like x.

        Raises:
            ValueError: shapes or masks that do not fit.
            TypeError: an argument of `nn.MultiheadAttention` that cannot be honoured, and what to do instead.
        """
        if others:
            raise TypeError(
                f"got {1 + len(others)} tensors: this is self-attention, whose query, key and value are one: layer(x), "
                "which returns the output alone"
            )
        for name in refused:
            raise TypeError(f"{name}: {_REFUSED.get(name, 'DilatedSelfAttention has no such keyword')}")
        if x.ndim not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must be (batch, tokens, {self.embed_dim}) or (tokens, {self.embed_dim}), got {tuple(x.shape)}"
            )
        rows = x if x.ndim == 3 else x[None]
        heads = nn.functional.linear(rows, self.in_proj_weight, self.in_proj_bias)
        heads = heads.view(*rows.shape[:2], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = torch.split(heads.transpose(1, 2), counts, dim=1)
        if self.positions is not None:
            # Attention sees differences of positions alone: these serve padding and packed documents as they are.
            turned = self.positions(torch.arange(x.shape[-2], device=x.device)[None], dtype=q.dtype)
            q, k = (rotate(part, rotation) for part, rotation in zip((q, k), turned, strict=True))
        padding_mask = None if key_padding_mask is None else self._real(key_padding_mask, rows)
        out = dilated_attention(
            q, k, v, self.pattern, is_causal=is_causal, padding_mask=padding_mask, cu_seqlens=cu_seqlens,
            backend=self.backend,
        )  # fmt: skip
        out = nn.functional.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return out if x.ndim == 3 else out[0]

    def _real(self, key_padding_mask: Tensor, x: Tensor) -> Tensor:
        mask = key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None]
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be {tuple(x.shape[:2])} bool, True for padding, got "
                f"{tuple(key_padding_mask.shape)} {key_padding_mask.dtype}"
            )
        if not self._has_warned and not torch.compiler.is_compiling() and bool(mask.all(1).any()):
            self._has_warned = True
            warnings.warn(
                "a row of key_padding_mask is all padding: True means padding here, as in nn.MultiheadAttention; is "
                "the mask one whose True means a real token?",
                stacklevel=3,
            )
        return ~mask

    def extra_repr(self) -> str:
        """Return the sizes and the pattern, for `print(model)`."""
        heads = f"{self.embed_dim}, {self.num_heads}, {self.pattern}"
        return heads if self.num_kv_heads == self.num_heads else f"{heads}, num_kv_heads={self.num_kv_heads}"
