"""Documents that lie end to end in a row, as a caller tells of them: read once, where a model's forward begins.

transformers hands its attention position_ids that restart only where there is no mask and no cache, and only in some
models; of a mask it keeps whether a token is real. What the caller gave is known where it gave it, and nowhere later.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longnet.model.patterns import PATTERN_FIELDS, kind_of
from longnet.model.sequence_parallel import current_chunk, current_group
from longnet.model.versions import one_of, refuse_tracing

# Whose forward is read, by the name of its attention.


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One forward pass that is under way: where its tokens are, and the documents that its caller told of, if any."""

    device: torch.device
    shape: tuple[int, ...]
    position_ids: Tensor | None
    attention_mask: Any
    bounds: Tensor | None


class _Passes(threading.local):
    """The passes of a thread: models may run in several at once. No ContextVar: torch.compile cannot trace one."""

    def __init__(self) -> None:
        self.under_way: list[_Pass] = []


_passes = _Passes()


def documents_told(device: torch.device, rows: int, tokens: int) -> Tensor | None:
    """Return the documents of the pass that is under way, (n, 3) bounds on the CPU, or None where nobody told of any.

    Args:
        device: of the pass.
        rows: B.
        tokens: T, all that the pass attends to.
    """
    for known in reversed(_passes.under_way):
        if known.device == device:
            return known.bounds if known.shape == (rows, tokens) else None
    return None


def refuse_documents(position_ids: Tensor | None, mask: Tensor | None, indices: Tensor | None = None) -> None:
    """Refuse several documents in a row where there is a cache.

    Args:
        position_ids: (B or 1, T), of the new tokens.
        mask: (B, past + T), 0 or False for padding.
        indices: (B or 1, T), a number for the document of each new token.

    Raises:
        ValueError: a row has several, or the mask other numbers than those of documents.
    """
    told = [x for x in (position_ids, indices) if x is not None]
    if told:
        rows, tokens = told[0].shape
        new = None if mask is None else mask[:, -tokens:]
        rows = rows if mask is None else len(mask)
        if _is_packed(_documents(new, position_ids, indices, rows, tokens, -1), rows):
            raise ValueError(_REFUSAL)
    if (
        mask is not None
        and mask.dtype != torch.bool
        and _is_packed(_documents(mask, None, None, *mask.shape, -1), len(mask))
    ):
        raise ValueError(_REFUSAL)


def read_by(kind: type[PreTrainedModel]) -> None:
    """Have the forward of a class of models say what documents its caller tells of, once and for all its instances.

    Another attention than this package's sees nothing of it.
    """
    if "_reads_documents" not in vars(kind):
        kind.forward = _reading(kind.forward)
        kind._reads_documents = True  # type: ignore[attr-defined]


def _reading(forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def reading(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        kind = kind_of(self.config)
        if kind not in PATTERN_FIELDS:
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = one_of(given.get("cache"), given.get("past_key_values"))
        refuse_tracing(kind, has_cache=cache is not None)
        x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not isinstance(x, Tensor) or x.ndim < 2 or len(args) > len(names):
            return forward(self, *args, **kwargs)
        here = _read(self, given, x, names)
        if here.bounds is not None:
            args, kwargs = (), given
        _passes.under_way.append(here)
        try:
            return forward(self, *args, **kwargs)
        finally:
            _passes.under_way.pop()

    return reading


def _read(model: PreTrainedModel, given: dict[str, Any], x: Tensor, names: list[str]) -> _Pass:
    """Read what a forward is given, and change it where documents were found: their positions, their mask, no cache."""
    rows, tokens = shape = tuple(x.shape[:2])
    positions, mask, indices = (given.get(name) for name in ("position_ids", "attention_mask", "seq_idx"))
    for known in _passes.under_way:  # an outer model has handed on what was read there
        if known.shape == shape and known.position_ids is positions and known.attention_mask is mask:
            bounds = None if torch.compiler.is_compiling() else known.bounds
            if positions is None and bounds is not None and "position_ids" in names:
                given["position_ids"] = _positions_within(model, bounds, rows, tokens).to(x.device)
                return replace(known, position_ids=given["position_ids"])
            return known
    nothing = _Pass(x.device, shape, positions, mask, None)
    cache = one_of(given.get("cache"), given.get("past_key_values"))
    if positions is not None and positions.ndim == 3 and positions.shape[2] == tokens and indices is None:
        indices = (positions == 0).all(0).cumsum(-1)  # of M-RoPE, (axes, B, T): a document begins at 0 on all
    is_told = positions is not None and positions.ndim == 2 and positions.shape[1] == tokens
    has_none, positions = positions is None, positions if is_told else None
    if (
        current_chunk() is not None  # which knows of them
        or given.get("cu_seq_lens_q") is not None  # which tell of documents themselves
        or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))  # made ahead, by generate()
        or (cache is not None and tokens == 1)
        or (positions is None and indices is None and (mask is None or mask.dtype == torch.bool))
    ):
        return nothing
    is_compiling = torch.compiler.is_compiling()
    if cache is not None:
        if is_compiling:
            return nothing
        refuse_documents(positions, mask, indices)
        return nothing
    if mask is not None and mask.shape[1] != tokens:  # the last ones are padding
        mask = torch.nn.functional.pad(mask[:, :tokens], (0, max(0, tokens - mask.shape[1])))
    size = -1
    if is_compiling:
        size = rows if positions is None and indices is None else rows * tokens
    bounds = _documents(mask, positions, indices, rows, tokens, size)
    if current_group() is not None:
        if not is_compiling and _is_packed(bounds, rows):
            raise ValueError(
                "documents packed by position_ids or by a mask have no edges across ranks: pass cu_seq_lens of all of "
                "them"
            )
        return nothing
    if is_compiling:
        return _Pass(x.device, shape, given.get("position_ids"), given.get("attention_mask"), bounds)
    if not _is_packed(bounds, rows):
        return nothing
    if given.get("use_cache"):
        raise ValueError(_REFUSAL)
    if "use_cache" in names:
        given["use_cache"] = False
    if mask is not None:
        given["attention_mask"] = (mask != 0).to(mask.dtype)
    if has_none:
        _refuse_lost_positions(model, given)
        if "position_ids" in names:
            given["position_ids"] = _positions_within(model, bounds, rows, tokens).to(x.device)
    return _Pass(x.device, shape, given.get("position_ids"), given.get("attention_mask"), bounds)


_REFUSAL = (
    "position_ids restart within a row, or its mask numbers several documents, and a cache cannot tell documents "
    "apart: leave out the cache and use_cache"
)


def _is_packed(bounds: Tensor, rows: int) -> bool:
    return len(bounds) > rows


def _positions_within(model: PreTrainedModel, bounds: Tensor, rows: int, tokens: int) -> Tensor:
    # RoBERTa and its kin (XLM-R, CamemBERT, ESM, data2vec) begin behind their table's row for padding.
    tables = [table.padding_idx for table in _position_tables(model) if table.padding_idx is not None]
    first = tables[0] + 1 if tables else 0
    positions = torch.zeros(rows, tokens, dtype=torch.int64)
    for row, start, stop in bounds.tolist():
        positions[row, start:stop] = torch.arange(first, first + stop - start)
    return positions


def _position_tables(model: PreTrainedModel) -> list[nn.Embedding]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
    ]


def _refuse_lost_positions(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Refuse documents without position_ids where a model's own positions would not restart with each."""
    if any(name.startswith("pixel_values") and value is not None for name, value in given.items()):
        raise ValueError(
            "documents with images, packed into a row, need position_ids that restart with each: where an image ends "
            "is the model's to say"
        )
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if _position_tables(model) and not any("position_ids" in inspect.signature(m.forward).parameters for m in inner):
        raise ValueError(
            f"{type(model).__name__} takes no position_ids, and its own would go on from one document of a row to the "
            "next: give each document a row"
        )


@torch.library.custom_op("longnet::documents_told", mutates_args=())
def _documents(
    mask: Tensor | None, position_ids: Tensor | None, indices: Tensor | None, rows: int, tokens: int, size: int
) -> Tensor:
    """Find the documents of each row: where the mask's number changes, the index does, or positions rise not by one.

    Args:
        mask: (B, T), 0 or False for padding.
        position_ids: (B or 1, T).
        indices: (B or 1, T), a number for each document.
        rows: B.
        tokens: T.
        size: of the result's first dimension: rows of zeros are added; B where there may be one document a row only;
            −1 for as many as there are, at least one a row, an empty one where all is padding.

    Returns:
        (n, 3) int64 on the CPU: (batch row, start, stop).

    Raises:
        ValueError: a mask of other numbers; padding within a document; more documents than there may be.
    """
    real = torch.ones(rows, tokens, dtype=torch.bool)
    numbers = []
    if mask is not None:
        labels = mask.cpu()
        real = labels != 0
        if labels.dtype != torch.bool:
            if labels.numel() and (
                labels.min() < 0 or (labels.is_floating_point() and (labels != labels.round()).any())
            ):
                raise ValueError(
                    "a 2-D attention_mask must hold 0 for padding and 1, or the number of its document, for each real "
                    f"token, got values from {labels.min().item()} to {labels.max().item()}"
                )
            numbers.append(labels)
    if indices is not None:
        numbers.append(indices.cpu().expand(rows, tokens))
    column = torch.arange(tokens).expand(rows, tokens)
    # The last real token before each.
    last = torch.where(real, column, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    starts = before < 0
    for number in numbers:
        starts = starts | (number != number.gather(1, before.clamp(min=0)))
    if position_ids is not None:
        position = position_ids.cpu().expand(rows, tokens)
        starts = starts | (position - position.gather(1, before.clamp(min=0)) != 1)
    starts = starts & real
    torn = (real & ~starts & (before != column - 1)).any(1).nonzero().flatten().tolist()
    if torn:
        raise ValueError(
            "attention_mask: the real tokens of a document must lie side by side, with padding only before or after; "
            f"rows {torn[:8]} have gaps"
        )
    row, start = starts.nonzero().unbind(1)
    length = torch.zeros(len(row), dtype=torch.int64)
    if len(row):
        which = starts.flatten().cumsum(0)[real.flatten()] - 1
        length.index_add_(0, which, torch.ones_like(which))
    empty = (~real.any(1)).nonzero()
    bounds = torch.cat([torch.stack([row, start, start + length], 1), torch.nn.functional.pad(empty, (0, 2))])
    if size == rows and len(bounds) > rows:
        raise ValueError(
            "a mask with a number for each document needs position_ids that restart with it where the model is compiled"
        )
    return bounds if size < 0 else torch.nn.functional.pad(bounds, (0, 0, 0, size - len(bounds)))


@_documents.register_fake
def _(
    mask: Tensor | None, position_ids: Tensor | None, indices: Tensor | None, rows: int, tokens: int, size: int
) -> Tensor:
    found = torch.library.get_ctx().new_dynamic_size() if size < 0 else size
    return torch.empty(found, 3, dtype=torch.int64)
