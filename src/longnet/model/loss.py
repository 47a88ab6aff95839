"""Next-token cross entropy that never holds the logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**24  # logits held at a time: 64 MiB in float32
IGNORED = -100


def next_token_loss(
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor | None,
    *,
    vocab_size: int,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the cross entropy of each next token, in float32 (float64 for float64).

    Logits exist for one chunk of tokens at a time, in the forward and in the backward pass: beside the gradients,
    memory is O(V), where T·V logits of 32K tokens and 32K words would take 4 GiB. A graph can be walked back once:
    gradients are made beside the loss and handed out, so a second backward pass, after retain_graph=True, raises
    RuntimeError. Keeping them would cost another head's size; add up the losses instead.

    Args:
        head: maps (n, C) to logits (n, V).
        hidden_states: (B, T, C).
        labels: (B, T) int64; token t is asked for labels[:, t + 1]. −100 is not asked for.
        vocab_size: V.
        shift_labels: (B, T) int64, instead of labels: token t is asked for shift_labels[:, t].
        num_items_in_batch: what the sum is divided by; the number of labels asked for when None. Gradient accumulation
            gives the count of all its batches.

    Raises:
        ValueError: labels of another shape than the tokens.
    """
    targets = shift_labels
    if targets is None:
        if labels is None:
            raise ValueError("a loss needs labels or shift_labels")
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if targets.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels must be {tuple(hidden_states.shape[:2])}, one a token, got {tuple(targets.shape)}")
    targets = targets.reshape(-1).to(hidden_states.device)
    total = _cross_entropy_sum(head, hidden_states.flatten(0, 1), targets, max(1, _CHUNK_LOGITS // vocab_size))
    return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _cross_entropy_sum(head: nn.Module, hidden_states: Tensor, targets: Tensor, rows: int) -> Tensor:
    if isinstance(head, nn.Linear) and _fits_linear_cross_entropy(head, hidden_states):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, allow_retain_graph=torch.compiler.is_compiling())
        return functional.linear_cross_entropy(
            hidden_states, head.weight, targets, linear_bias=head.bias, reduction="sum", options=options
        )
    total = hidden_states.new_zeros((), dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    for chunk, chunk_targets in zip(torch.split(hidden_states, rows), torch.split(targets, rows), strict=True):
        total = total + checkpoint(_chunk_sum, head, chunk, chunk_targets, use_reentrant=False)
    return total


def _fits_linear_cross_entropy(head: nn.Linear, hidden_states: Tensor) -> bool:
    # torch has it from 2.13 on. It computes the gradients beside the loss, a matrix product less than recomputing
    # them. Its loss has the dtype of its input, though, and autocast passes it by: off by 0.5 % in bfloat16, on 4,096
    # tokens. It takes a weight, so what hooks, adapters, quantisation or sharding make of a head it would miss.
    return (
        hasattr(functional, "linear_cross_entropy")
        and hasattr(nn, "LinearCrossEntropyOptions")
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and head.weight.dtype == hidden_states.dtype
        and hidden_states.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(hidden_states.device.type)
    )


def _chunk_sum(head: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden_states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
