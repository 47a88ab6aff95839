"""Any model with dilated attention over a part of a sequence: a rank's (arXiv:2307.02486 §3), or one chunk in time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from longnet.attention.chunks import Chunk
from longnet.attention.sequence_parallel import Slices, gather_slices, group_of

# No ContextVar: torch.compile cannot trace one, and a backward pass that runs layers again does so in other threads.
_groups: list[dist.ProcessGroup] = []
_chunks: list[Chunk] = []


@contextlib.contextmanager
def sequence_parallel(mesh: DeviceMesh | dist.ProcessGroup, model: nn.Module | None = None) -> Iterator[None]:
    """Within this context a model with dilated attention sees a sequence of which each rank holds a slice.

    Every rank calls the model with its slice, in rank order, of any length: input_ids, attention_mask, labels.
    Positions and padding count over the whole sequence, and so does the loss of `LongNetForCausalLM`: its value is
    that of all tokens, its gradients are this rank's share, so add up the weights' gradients over the ranks
    (all_reduce with SUM). There are no caches. `backward()` belongs into the context where layers are checkpointed.

        with longnet.sequence_parallel(mesh["sp"]):
            model(ids_of_this_rank, labels=ids_of_this_rank).loss.backward()

    Args:
        mesh: the axis of ranks, in the order of their slices.
        model: another Hugging Face model than LongNet: it is given position_ids of the whole sequence where it is
            called without. Its own loss function shifts labels within a slice: give it shift_labels, or none.

    Raises:
        ValueError: a mesh of several axes.
        TypeError: no mesh.
    """
    group, hook = group_of(mesh), None
    _groups.append(group)
    if model is not None and "position_ids" in inspect.signature(model.forward).parameters:
        hook = model.register_forward_pre_hook(_give_positions, with_kwargs=True)
    try:
        yield
    finally:
        _groups.pop()
        if hook is not None:
            hook.remove()


def current_group() -> dist.ProcessGroup | None:
    """Return the group whose ranks hold the sequence, None outside `sequence_parallel`."""
    return _groups[-1] if _groups else None


@contextlib.contextmanager
def within_chunk(chunk: Chunk) -> Iterator[None]:
    """Within this context a model with dilated attention sees one chunk of a sequence; `backward()` belongs here, too.

    LongNet finds its positions; another Hugging Face model is given position_ids, as `positions_of_slice` has them.
    """
    _chunks.append(chunk)
    try:
        yield
    finally:
        _chunks.pop()


def current_chunk() -> Chunk | None:
    """Return the chunk that a model sees, None outside `within_chunk`."""
    return _chunks[-1] if _chunks else None


def is_within_chunk() -> bool:
    """Say whether a model sees a chunk: what torch.compile may ask without looking at it."""
    return bool(_chunks)


def is_read_up_to(attention: nn.Module) -> bool:
    """Say whether nothing above an attention layer's keys and values is asked for, in a chunk that is only read."""
    return bool(_chunks) and _is_read_up_to(attention)


def slices_here(x: Tensor, bounds: Tensor | None) -> Slices | None:
    """Tell how the sequence lies of which x (B, T, …) is a slice; None where it is whole.

    Args:
        x: for its shape and device.
        bounds: (B, 3), where its real tokens lie; None where all are real. A chunk knows where.
    """
    if _chunks:
        return _chunks[-1].slices
    return gather_slices(_groups[-1], x, bounds) if _groups else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _is_read_up_to(attention: nn.Module) -> bool:
    return _chunks[-1].is_read_up_to(attention.layer_idx)  # type: ignore[arg-type]


def positions_of_slice(slices: Slices, tokens: int, device: torch.device) -> Tensor:
    """Return the positions (B, T) of this slice's tokens, counted from each row's, or document's, first real one."""
    first = slices.bounds[:, 1:2].to(device)
    columns = slices.start.to(device) + torch.arange(tokens, device=device)
    if slices.group is None and len(slices.bounds) > 1 and not slices.bounds[:, 0].any():  # documents in one row
        first = first[(torch.searchsorted(first[:, 0].contiguous(), columns, right=True) - 1).clamp(min=0), 0][None]
    return (columns - first).clamp(min=0)


def positions_fit(position_ids: Tensor, slices: Slices) -> bool:
    """Say, alike on all ranks, whether the position_ids (B or 1, T) of each one start where its slice does."""
    if slices.group is None:
        return True  # a chunk's positions are made beside it
    start = slices.start.to(position_ids.device)
    since_first = (start - slices.bounds[:, 1].to(position_ids.device)).clamp(min=0)
    found = position_ids[:, :1]
    fits = ((found == start) | (found == since_first[:, None])).all()
    worst = collectives.all_reduce((~fits).long()[None], "max", slices.group)  # type: ignore[arg-type]
    return not bool(worst)


def next_labels(labels: Tensor, group: dist.ProcessGroup, slices: Slices) -> Tensor:
    """Shift labels (B, T) by one token: the last of a slice is asked for the first of the next one, or for nothing."""
    first = torch.full((labels.shape[0],), -100, dtype=labels.dtype, device=labels.device)
    if labels.shape[1]:
        first.copy_(labels[:, 0])
    # A sum, since the functional all-gather has another name from one torch to the next.
    firsts = first.new_zeros(len(slices.edges) - 1, len(first))
    firsts[slices.rank] = first
    firsts = collectives.all_reduce(firsts, "sum", group)
    # The last rank reads none of it, and nothing else would wait for it there.
    firsts = collectives.wait_tensor(firsts)  # type: ignore[no-untyped-call]
    later = slices.edges.diff()[slices.rank + 1 :].nonzero().flatten().tolist()  # slices that hold tokens
    last = firsts[slices.rank + 1 + later[0]] if later else torch.full_like(first, -100)
    return torch.cat([labels[:, 1:], last[:, None]], 1)[:, : labels.shape[1]]


def loss_of_all(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the ranks' shares of a loss, with the gradient of this rank's."""
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return share + (total - share.detach())


def _give_positions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    group = current_group()
    if group is None:
        return None
    names = list(inspect.signature(model.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if given.get("position_ids") is not None or not isinstance(x, Tensor):
        return None
    slices = gather_slices(group, x, None)
    given["position_ids"] = slices.start.to(x.device) + torch.arange(x.shape[1], device=x.device)[None]
    return (), given
