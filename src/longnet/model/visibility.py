"""Packed documents, read from a mask function of transformers at O(T) points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def read_bounds(
    mask_function: Callable[..., Any],
    *,
    batch_size: int,
    q_tokens: int,
    tokens: int,
    padding: Tensor | None,
    is_causal: bool,
    device: torch.device,
) -> Tensor:
    """Find the documents of a mask that is causal, or full, within documents packed end to end.

    A token starts a document where it cannot see the one before. Every token must see its document's first, in a mask
    that is not causal its last too, and in a causal one not the next: transformers' windows, chunks and blocks of image
    tokens fail there.

    Args:
        mask_function: (batch, head, query, key) indices → may the query see the key? Not asked about padding.
        batch_size: B.
        q_tokens: the queries are the last so many of `tokens`.
        tokens: T.
        padding: (B, 3) int64, the real tokens of each row, or None.
        is_causal: the mask is expected to hide later keys.
        device: of the mask function's tensors.

    Returns:
        (n, 3) int64 on the CPU: (batch row, start, stop) of each document. While compiling n is B·T, the rest empty.

    Raises:
        ValueError: a mask of another shape.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(row)
    q = torch.arange(tokens - q_tokens, tokens, device=device).expand(batch_size, q_tokens)

    def sees(k: Tensor) -> Tensor:
        answer: Tensor = mask_function(row, head, q, k.clamp(0, tokens - 1))
        return answer.expand(batch_size, q_tokens)

    sees_before = sees(q - 1) & (q > 0)
    sees_next = sees(q + 1) & (q < tokens - 1)
    first = torch.where(sees_before, 0, q).cummax(1).values
    is_last = torch.nn.functional.pad(~sees_before[:, 1:], (0, 1), value=True)
    last = torch.where(is_last, q, tokens).flip(1).cummin(1).values.flip(1)
    if padding is not None:
        start, stop = padding.to(device)[:, 1:, None].unbind(1)
        first, last = start.expand_as(q), (stop - 1).expand_as(q)
        inside = (q >= start) & (q < stop)
        sees_before = torch.where(inside & (q > start), sees_before, q > 0)
        sees_next = torch.where(inside & (q < stop - 1), sees_next, (not is_causal) & (q < tokens - 1))
        first, last = torch.where(inside, first, q), torch.where(inside, last, q)
    is_whole = sees(q) & sees(first)
    if not is_causal:
        is_whole = is_whole & sees(last)
    bounds: Tensor = _documents(
        sees_before, sees_next, is_whole, tokens, padding is not None, is_causal, torch.compiler.is_compiling()
    )
    return bounds


@torch.library.custom_op("longnet::documents_seen", mutates_args=())
def _documents(
    sees_before: Tensor,
    sees_next: Tensor,
    is_whole: Tensor,
    tokens: int,
    is_padded: bool,
    is_causal: bool,
    has_fixed_size: bool,
) -> Tensor:
    """Turn what the queries (B, Tq) see into (n, 3) bounds, or refuse; n = B·Tq with `has_fixed_size`."""
    sees_before, sees_next, is_whole = sees_before.cpu(), sees_next.cpu(), is_whole.cpu()
    rows, q_tokens = sees_before.shape
    starts = ~sees_before
    starts_late = starts.clone()
    if tokens == q_tokens:
        starts_late[:, :1] = False
    expected_next = torch.zeros_like(sees_next) if is_causal else torch.nn.functional.pad(sees_before[:, 1:], (0, 1))
    is_plain = is_whole.all() and torch.equal(sees_next, expected_next)
    if not is_plain or ((is_padded or tokens != q_tokens) and starts_late.any()):
        raise ValueError(
            "this mask cannot be honoured by dilated attention: it is neither causal nor full within documents packed "
            "end to end (a sliding window, a chunk, a bidirectional block of image tokens, or documents beside padding "
            'or a cache). Use attn_implementation="sdpa" for it'
        )
    if tokens != q_tokens:
        starts = torch.zeros_like(starts)
        starts[:, 0] = True
    row, start = starts.nonzero().unbind(1)
    follows = torch.cat([row[1:] == row[:-1], row.new_zeros(1, dtype=torch.bool)])
    stop = torch.where(follows, start.roll(-1), tokens)
    bounds = torch.stack([row, start, stop], 1)
    if has_fixed_size:
        bounds = torch.nn.functional.pad(bounds, (0, 0, 0, rows * q_tokens - len(bounds)))
    return bounds


@_documents.register_fake
def _(
    sees_before: Tensor,
    sees_next: Tensor,
    is_whole: Tensor,
    tokens: int,
    is_padded: bool,
    is_causal: bool,
    has_fixed_size: bool,
) -> Tensor:
    return sees_before.new_empty((sees_before.numel(), 3), dtype=torch.int64, device="cpu")
