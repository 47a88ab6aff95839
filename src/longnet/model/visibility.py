"""What a forward pass may see, read from the masks of transformers at O(T) points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from longnet.attention.dilated import padding_bounds
from longnet.attention.sequence_parallel import Slices
from longnet.model.documents import documents_told
from longnet.model.sequence_parallel import current_chunk, current_group, slices_here


@dataclass(frozen=True, slots=True)
class Visible:
    """What a forward pass may see, read from its masks once for all layers.

    Args:
        tokens: valid keys; the queries are the last of them. A static cache holds more rows.
        q_tokens: queries.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of each run of real tokens; None where all are real.
            They count from `skipped`.
        is_causal: keys after the query are hidden.
        is_padded: `bounds` come from a padding mask, not from packed documents.
        refusal: why the attention of this pass cannot be dilated; raised by the first layer that needs it, since some
            models build masks that no layer uses.
        skipped: leading ones of `tokens` whose keys the attention is not given, since a DilatedCache keeps what is
            needed of them.
        slices: how the sequence lies across ranks, where it does; bounds are None then, and all else is of this
            rank's slice.
        documents: cu_seq_lens that a layer has read, and their bounds, so that the next ones need not wait for the
            device.
    """

    tokens: int
    q_tokens: int
    bounds: Tensor | None
    is_causal: bool
    is_padded: bool
    refusal: str | None
    skipped: int = 0
    slices: Slices | None = None
    documents: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    @property
    def ndim(self) -> int:
        """4, as of every mask that is made: transformers asks, and makes masks of what has fewer dimensions."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of a mask which is the same for all batch rows and heads, for models that read off its last."""
        return (1, 1, self.q_tokens, self.tokens)

    def _refuse_to_be_computed_with(self, *_: Any) -> NoReturn:
        raise ValueError(
            "this model computes with its attention mask, which dilated and sparse_fixed attention do not make: it can "
            'attend in full only, with attn_implementation="sdpa" or "eager"'
        )

    def __getitem__(self, index: Any) -> Visible:
        """Return the mask of the last queries alone, mask[:, :, -n:, :], which models cut off that need no others."""
        every = slice(None)
        if (
            not isinstance(index, tuple)
            or len(index) != 4
            or (index[0], index[1], index[3]) != (every, every, every)
            or not isinstance(index[2], slice)
            or (index[2].stop, index[2].step) != (None, None)
            or self.slices is not None
        ):
            self._refuse_to_be_computed_with()
        return replace(self, q_tokens=len(range(self.q_tokens)[index[2]]))

    __add__ = __radd__ = __mul__ = __and__ = __or__ = __invert__ = _refuse_to_be_computed_with
    __sub__ = __rsub__ = __matmul__ = __rmul__ = __rand__ = __ror__ = _refuse_to_be_computed_with
    masked_fill = expand = float = repeat = view = reshape = _refuse_to_be_computed_with
    squeeze = unsqueeze = transpose = permute = sum = any = all = logical_not = eq = ne = _refuse_to_be_computed_with
    dtype = property(_refuse_to_be_computed_with)

    def contiguous(self) -> Visible:
        """Return itself; generate() asks this of every mask that it makes ahead."""
        return self


def visible_tokens(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visible:
    """Describe a mask: the mask function of "dilated" and "sparse_fixed", with the signature of transformers.

    Documents packed into a row reach this function only inside `mask_function`, which is asked at O(T) points: where
    a token cannot see the one before, a document starts. The same points rule out windows, chunks and image blocks.

    Raises:
        ValueError: padding within a row's real tokens, or a mask that is no documents end to end.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask
    slices = None
    if current_group() is not None or current_chunk() is not None:
        slices = slices_here(torch.empty(batch_size, q_length, 0, device=device), bounds_of_mask(attention_mask))
    if slices is not None:
        is_causal = mask_function is causal_mask_function or "allow_is_bidirectional_skip" not in kwargs
        refusal = None
        if use_vmap or local_size is not None or kv_length != q_length or int(q_offset) or kv_offset:
            refusal = "neither caches, windows nor masks of one's own can be honoured across ranks or chunks"
        elif mask_function not in (causal_mask_function, bidirectional_mask_function) and current_chunk() is None:
            refusal = (
                "documents packed by position_ids alone have no edges across ranks: pass cu_seq_lens of all of them"
            )
        return visible_slice(slices, q_length, is_causal, refusal)
    # create_bidirectional_mask alone passes this keyword; what else a mask function does is read from its answers.
    is_causal = mask_function is causal_mask_function or "allow_is_bidirectional_skip" not in kwargs
    # A DilatedCache gives the new keys alone, and their column; before transformers 5.14 q_offset is their position.
    is_streamed = kv_length == q_length
    skipped = kv_offset if is_streamed else 0
    tokens = (skipped if is_streamed else int(q_offset)) + q_length
    refusal = None
    if use_vmap:
        refusal = (
            "a custom mask function (or_mask_function, and_mask_function) cannot be honoured: every token of a segment "
            "is seen"
        )
    elif not is_causal and kv_length != tokens - skipped:
        refusal = (
            f"{q_length} queries against {kv_length} keys of another sequence cannot be honoured: cross-attention has "
            "no segments in common"
        )
    elif (kv_offset != 0 and not is_streamed) or (local_size is not None and local_size < tokens):
        refusal = window_refusal(local_size, tokens)
    told = None if skipped or q_length != tokens else documents_told(torch.device(device), batch_size, q_length)
    bounds = None
    if refusal is None:
        if attention_mask is not None and told is None:
            if skipped and attention_mask.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask must cover the {skipped} cached and the {q_length} new tokens, got "
                    f"{tuple(attention_mask.shape)}"
                )
            mask = attention_mask[:, skipped:tokens].to(torch.bool)
            if mask.shape[1] < tokens - skipped:
                mask = nn.functional.pad(mask, (0, tokens - skipped - mask.shape[1]))
            bounds = padding_bounds(mask)
        if mask_function not in (causal_mask_function, bidirectional_mask_function):
            shift = torch.tensor([0, skipped, skipped])
            documents = read_bounds(
                mask_function, batch_size=batch_size, q_tokens=q_length, tokens=tokens,
                padding=None if bounds is None else bounds + shift, is_causal=is_causal, device=torch.device(device),
            )  # fmt: skip
            bounds = (documents - shift).clamp(min=0) if attention_mask is None else bounds
    bounds, is_padded = (bounds, attention_mask is not None) if told is None else (told, False)
    return Visible(tokens, q_length, bounds, is_causal, is_padded, refusal, skipped)


def bounds_of_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Read a mask (B, T) into (B, 3) bounds; None where there is none."""
    return None if attention_mask is None else padding_bounds(attention_mask.to(torch.bool))


def real_tokens(mask: Tensor | Visible | None, rows: int, tokens: int) -> Tensor | None:
    """Return which of the first tokens a padding mask calls real, (rows, T) bool; None where it is no padding mask.

    A mask (B, fewer) calls the last ones padding, as `visible_tokens` does.
    """
    if isinstance(mask, Tensor):
        return nn.functional.pad(mask.to(torch.bool), (0, tokens - mask.shape[1])) if mask.ndim == 2 else None
    if mask is None or mask.bounds is None or not mask.is_padded:
        return None
    row, start, stop = mask.bounds.unbind(1)
    column = torch.arange(tokens)
    inside = (column >= start[:, None]) & (column < stop[:, None])
    return torch.zeros(rows, tokens, dtype=torch.int32).index_add(0, row, inside.int()).bool()


def visible_slice(slices: Slices, tokens: int, is_causal: bool, refusal: str | None = None) -> Visible:
    """Describe a pass over this rank's slice of a sequence, of so many tokens."""
    return Visible(tokens, tokens, None, is_causal, is_padded=False, refusal=refusal, slices=slices)


def window_refusal(window: int | None, tokens: int) -> str:
    """Say why a window shorter than the text cannot be honoured."""
    return (
        f"a sliding window or chunk of {window} over {tokens} tokens cannot be honoured: dilated attention has its own "
        "local branch. Switch the window off in the config (sliding_window=None, or layer_types all 'full_attention'), "
        "or keep sequences within it"
    )


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
