"""The union softmax: one softmax over the keys of several tiles, from each tile's output and log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Fold a tile's keys into `out` and `lse`, in place (arXiv:2307.02486 eq. 9-10).

    The mixture weights are softmax denominators, so with l_i the branches' log-sum-exps, L = logsumexp_i l_i and
    O = Σ_i exp(l_i − L) o_i; the share of the newcomer is sigmoid(l_i − L_so_far).

    Args:
        out: (…, rows, D), float32 or float64. The rows' output so far.
        lse: (…, rows), the same dtype. Natural logarithm; −inf where no key has been seen.
        tile_out: (…, rows, D), any float dtype.
        tile_lse: (…, rows), finite.
    """
    so_far, newcomer = lse.contiguous(), tile_lse.to(lse.dtype).contiguous()  # strided, logaddexp takes 7 times as long
    out.lerp_(tile_out.to(out.dtype), torch.sigmoid(newcomer - so_far).unsqueeze(-1))
    lse.copy_(torch.logaddexp(so_far, newcomer))


def merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Fold one more key of value 0 into `out` and `lse`, in place: it takes part in the softmax, and adds nothing.

    Attention sinks as learned logits (arXiv:2309.17453 §3.3; gpt-oss), or zero keys that stand for padding.

    Args:
        out: (B, H, Tq, D), float32 or float64.
        lse: (B, H, Tq), the same dtype; −inf where no key has been seen, where the sink is then all there is.
        sinks: (H,) or (B, H, Tq), the key's logits; −inf is no key.
    """
    total = torch.logaddexp(lse, per_query(sinks, lse))
    out.mul_(torch.where(total == -torch.inf, 0, torch.exp(lse - total)).unsqueeze(-1))
    lse.copy_(total)


def differentiate_sinks(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of `sinks`, in its shape and dtype: −p_sink · rowsum(dO · O), O and the log-sum-exp merged.

    Args:
        dout: (B, H, Tq, D).
        out: (B, H, Tq, D).
        lse: (B, H, Tq).
        sinks: (H,) or (B, H, Tq).
    """
    p = torch.where(lse == -torch.inf, 0, torch.exp(per_query(sinks, lse) - lse))
    grad = -p * (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return (grad.sum((0, 2)) if sinks.ndim == 1 else grad).to(sinks.dtype)


def per_query(sinks: Tensor, lse: Tensor) -> Tensor:
    """Return logits (H,) or (B, H, Tq) as (…, H, Tq) that broadcast with `lse`, in its dtype."""
    return (sinks.unsqueeze(-1) if sinks.ndim == 1 else sinks).to(lse.dtype)
