"""The oracle: dilated attention as one dense softmax with a multiplicity mask.

Written from the definition alone and sharing nothing with the strided views, so that the two can disagree.
O(T²) time and memory; for tests and for reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.attention.pattern import DilationPattern


def multiplicity(
    positions: Tensor, documents: Tensor, pattern: DilationPattern, *, num_kv_heads: int, is_causal: bool
) -> Tensor:
    """Count how many branches let each query see each key.

    Args:
        positions: (B, T) int, counted from each document's first token.
        documents: (B, T) int, negative for padding. Tokens attend within their own document.
        pattern: the branches.
        num_kv_heads: G.
        is_causal: keys after the query count 0.

    Returns:
        (B, G, T, T) int, queries before keys.
    """
    batch_size, tokens = positions.shape
    visible = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    if is_causal:
        visible = visible & (positions[:, :, None] >= positions[:, None, :])
    is_dense = pattern.queries == "all"
    count = positions.new_zeros((batch_size, num_kv_heads, tokens, tokens))
    for length, rate in pattern.branches:
        segment, inside = positions // length, positions % length
        same_segment = segment[:, :, None] == segment[:, None, :]
        for head in range(num_kv_heads):
            kept = inside % rate == pattern.offset(rate, head, num_kv_heads)
            count[:, head] += visible & same_segment & kept[:, None, :] & (kept[:, :, None] | is_dense)
    count += (visible & (positions < pattern.global_tokens)[:, None, :])[:, None]
    return count


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilationPattern,
    *,
    bounds: Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dilated attention in plain PyTorch, in the dtype of `q`; its gradients are autograd's.

    Args:
        q: (B, H, Tq, D), the last Tq of the T positions.
        k: (B, G, T, D).
        v: (B, G, T, D).
        pattern: the branches.
        bounds: (n, 3) int, (batch row, start, stop) of each run of real tokens; None where every token is real.
        is_causal: keys after the query are unseen.
        scale: factor on q·k.
        sinks: (H,) or (B, H, Tq), logits of one more key, whose value is 0.

    Returns:
        out (B, H, Tq, D), 0 for a query without keys, and lse (B, H, Tq), −inf there, or the sink's logit.
    """
    batch_size, num_kv_heads, tokens, _ = k.shape
    positions = torch.arange(tokens, device=q.device).expand(batch_size, tokens)
    documents = torch.zeros_like(positions)
    if bounds is not None and bounds.shape[0] == 0:
        documents = torch.full_like(positions, -1)
    elif bounds is not None:
        # In tensor operations alone, so that fake tensors, whose bounds hold no numbers, pass through as well.
        row, start, stop = bounds.to(q.device)[:, :, None, None].unbind(1)
        rows = torch.arange(batch_size, device=q.device)[:, None]
        inside = (row == rows) & (start <= positions) & (positions < stop)
        documents = torch.where(inside.any(0), inside.int().argmax(0), -1)
        positions = (positions - start.flatten()[documents]).clamp(min=0)
    count = multiplicity(positions, documents, pattern, num_kv_heads=num_kv_heads, is_causal=is_causal)
    group = q.shape[1] // num_kv_heads
    count = count[:, :, tokens - q.shape[2] :].repeat_interleave(group, dim=1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    is_real = (documents >= 0)[:, None, :, None]
    v = torch.where(is_real, v, 0)  # what lies in padding, NaN included, is not read
    scores = (q * scale) @ torch.where(is_real, k, 0).mT + count.to(q.dtype).log()
    scores = torch.where(count == 0, -torch.inf, scores)
    if sinks is not None:
        sink = (sinks[:, None] if sinks.ndim == 1 else sinks).to(scores.dtype).expand(scores.shape[:3])
        scores = torch.cat([scores, sink.unsqueeze(-1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    sees_none = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores, -1)
    out = torch.softmax(torch.where(sees_none, 0, scores), -1) @ v
    return torch.where(sees_none, 0, out), lse
