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
