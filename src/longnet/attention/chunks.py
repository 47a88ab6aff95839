"""Dilated attention over a sequence that comes chunk by chunk, with exact gradients. Not in the paper.

A chunk is a rank in time: of the past it needs the kept rows of open segments, and it gives rows to the future. They
lie in a state of fixed places, as a stream's do. Forward a chunk overwrites places, and hands out what lay there, for
a log. Backward, from the last chunk to the first, the log restores each state, the chunk is computed once more, with a
graph, and the gradients that later chunks owe its rows come home.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longnet.attention.backends import dispatch
from longnet.attention.branches import Branch
from longnet.attention.halo import (
    HaloLayout,
    Pieces,
    attend,
    differentiate,
    lay_out,
    put_rows,
    take_home,
    take_rows,
)
from longnet.attention.merge import differentiate_sinks
from longnet.attention.pattern import PATTERN_SCHEMA, DilationPattern, pattern_of
from longnet.attention.plan import Run, runs_of
from longnet.attention.registration import cast_under_autocast
from longnet.attention.sequence_parallel import Slices
from longnet.attention.slices import RowIndices, needs_of, rows_within, runs_at_hand
from longnet.attention.tiles import empty_like, empty_lse, rows_dense


class Tape:
    """What one sequence, or a batch of them, leaves behind between its chunks: of every layer the state, and its debts.

    Args:
        patterns: of each layer: the same branches, whose offsets may be shifted.
        tokens: T of the whole sequence.
        chunk_tokens: of a chunk; the last one may be shorter.
        bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of each run of real tokens.
        backend: as in `dilated_attention`, but for the oracle.

    Attributes:
        states: (layers, 2, B, G, rows, D), keys and values of open segments; None before the first chunk.
        owed: their gradients, alike, at least float32; None before the first chunk is learned from.
        places: where each branch's rows begin; a branch whose segments never reach over a chunk's end has none.
    """

    def __init__(
        self,
        patterns: Sequence[DilationPattern],
        *,
        tokens: int,
        chunk_tokens: int,
        bounds: Tensor,
        backend: dispatch.Backend = "auto",
    ) -> None:
        self.backend = backend
        self.patterns, self.tokens, self.chunk_tokens, self.bounds = tuple(patterns), tokens, chunk_tokens, bounds
        self.places = _places(self.patterns[0], bounds, tokens, chunk_tokens)
        self.states: Tensor | None = None
        self.owed: Tensor | None = None

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.tokens // self.chunk_tokens)

    def open_after(self) -> Tensor:
        """Say of each chunk, (chunks,), whether a segment reaches over its end: else later ones need nothing of it."""
        opened = torch.zeros(self.chunks, dtype=torch.bool)
        for first, cut, stops in self._cuts():
            for branch in self.patterns[0].all_branches:
                opened[cut] |= (stops - first) % branch.length != 0
        return opened

    def rows_given(self, num_kv_heads: int) -> Tensor:
        """Count the rows that each chunk (chunks,) gives to later ones, of all batch rows, heads and layers.

        As many rows of earlier chunks are overwritten, so that a log of them has this length.
        """
        patterns = collections.Counter(self.patterns).items()
        kept: collections.Counter[tuple[Branch, int]] = collections.Counter()
        for (pattern, layers), head in itertools.product(patterns, range(num_kv_heads)):
            for branch in pattern.all_branches:
                kept[branch, pattern.offset(branch.rate, head, num_kv_heads)] += layers
        given = torch.zeros(self.chunks, dtype=torch.int64)
        for first, cut, stops in self._cuts():
            starts = (stops - self.chunk_tokens).clamp(min=first)
            for (branch, offset), heads in kept.items():
                inside = (stops - first) % branch.length
                low = (inside - (stops - starts)).clamp(min=0)
                until, before = ((-((offset - x) // branch.rate)).clamp(max=branch.rows) for x in (inside, low))
                given[cut] += heads * (until - before)
        return given

    def _cuts(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the start of each run that a chunk's end cuts, the chunks that end within it, and where they do."""
        for _, first, last in self.bounds.tolist():
            cut = slice(first // self.chunk_tokens, -(-last // self.chunk_tokens) - 1)
            if cut.start < cut.stop:
                yield first, cut, torch.arange(cut.start + 1, cut.stop + 1) * self.chunk_tokens

    def allocate(self, k: Tensor) -> Tensor:
        """Return the states, made for keys like k (B, G, T, D)."""
        shape = (len(self.patterns), 2, *k.shape[:2], self.places[-1], k.shape[3])
        if self.states is None:
            self.states = torch.zeros(shape, dtype=k.dtype, device=k.device)
        if self.states.shape != shape or self.states.dtype != k.dtype:
            raise ValueError(
                f"the layers of a model that learns in chunks must have keys alike, got {tuple(k.shape)} {k.dtype} "
                f"beside {tuple(self.states.shape[2:4])} batch rows and heads with {self.states.shape[5]} channels, "
                f"{self.states.dtype}"
            )
        return self.states

    @property
    def read_states(self) -> Tensor:
        """The states, of a tape whose chunks have been read.

        Raises:
            ValueError: none has.
        """
        if self.states is None:
            raise ValueError("no chunk has been read, so there is nothing to restore")
        return self.states

    def forget(self) -> None:
        """Read anew, from an empty state; what later chunks owe stays."""
        if self.states is not None:
            self.states.zero_()

    def bring_home(self, chunk: Chunk) -> None:
        """Take over what a chunk's backward pass found: its debts are paid, those to earlier chunks are added."""
        if self.states is None or not self.places[-1]:
            return
        if self.owed is None:
            dtype = torch.promote_types(self.states.dtype, torch.float32)
            self.owed = torch.zeros_like(self.states, dtype=dtype)
        for layer, (halo, layout, _) in chunk.learned.items():
            owed = self.owed[layer]
            for x in owed:
                x[layout.kept.rows] = 0  # the places belong to the segment before again
            if halo.grad is not None and layout.tiles.halo:
                owed += halo.grad


class Chunk:
    """One chunk of a tape, as the layers of a model meet it.

    Args:
        tape: of the sequence.
        index: which chunk.
        is_learning: keep a graph; otherwise the rows that later chunks need go into the tape's states.

    Attributes:
        start: position of its first token.
        stop: one past its last.
        slices: how it lies between past and future: as the second of three ranks.
        learned: per layer its halo, whose `grad` backward fills, its layout, and the rows that later chunks need.
    """

    def __init__(self, tape: Tape, index: int, *, is_learning: bool) -> None:
        self.tape, self.index, self.is_learning = tape, index, is_learning
        self.start = index * tape.chunk_tokens
        self.stop = min(tape.tokens, self.start + tape.chunk_tokens)
        _, starts, stops = tape.bounds.unbind(1)
        self._bounds = tape.bounds[(starts < self.stop) & (stops > self.start)]
        edges = torch.tensor([0, self.start, self.stop, tape.tokens])
        self.slices = Slices(edges, tape.bounds, 1, None)
        self.learned: dict[int, tuple[Tensor, ChunkLayout, Tensor]] = {}
        self._replaced: dict[int, Tensor] = {}

    def is_read_up_to(self, layer: int) -> bool:
        """Say whether nothing above a layer's keys and values is asked for."""
        return not self.is_learning and layer == len(self.tape.patterns) - 1

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: DilationPattern,
        *,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend causally with the chunk's queries to its own keys and to earlier ones.

        Args:
            layer: which one, from 0.
            q: (B, H, T, D).
            k: (B, G, T, D).
            v: (B, G, T, D).
            pattern: the layer's.
            scale: factor on q·k.
            sinks: (H,) or (B, H, T), as in `dilated_attention`.

        Returns:
            out (B, H, T, D); zeros where nothing above the layer's keys is asked for.

        Raises:
            ValueError: a layer that the tape does not know, or tensors of another shape.
        """
        tape = self.tape
        if (
            not 0 <= layer < len(tape.patterns)
            or q.shape[2] != self.stop - self.start
            or pattern != tape.patterns[layer]
        ):
            raise ValueError(
                f"chunk {self.index} holds {self.stop - self.start} tokens for {len(tape.patterns)} layers with the "
                f"pattern {tape.patterns[0]}, got {q.shape[2]} queries of layer {layer} with {pattern}"
            )
        q, k, v = cast_under_autocast(q, k, v)
        out: Tensor
        state = tape.allocate(k)[layer]
        settings = (self._bounds, self.start, tape.tokens, tape.places, *pattern.arguments, scale, tape.backend)
        layout = _lay_out(q, k, *settings[:-2])
        if self.is_learning:
            if layer in self.learned:  # activation checkpointing runs the layer once more
                again: Tensor = _op(q, k, v, self.learned[layer][0], sinks, *settings)[0]
                return again
            halo = state.to(torch.promote_types(state.dtype, torch.float32)).detach().requires_grad_()
            out, _, sent = _op(q, k, v, halo, sinks, *settings)
            self.learned[layer] = halo, layout, sent
            return out
        if self.is_read_up_to(layer):
            out, sent = torch.zeros_like(q), take_rows((k, v), layout.sent)
        else:
            out, _, sent = _op(q, k, v, state, sinks, *settings)
        self._replaced[layer] = take_rows(state, layout.kept)
        put_rows(state, layout.kept, sent)
        return out

    def replaced(self) -> Tensor:
        """Return what the states held before, (n, 2, D), layer after layer."""
        return torch.cat([self._replaced[layer] for layer in range(len(self.tape.patterns))])

    def restore(self, rows: Tensor) -> None:
        """Bring the states back to what they were before the chunk, whose `replaced` gave these rows."""
        tape, first = self.tape, 0
        for state, pattern in zip(tape.read_states, tape.patterns, strict=True):
            _, kept = rows_given(
                pattern, runs=runs_of(self._bounds, state.shape[1], tape.tokens), start=self.start, stop=self.stop,
                total=tape.tokens, places=tape.places, num_kv_heads=state.shape[2], device=state.device,
            )  # fmt: skip
            count = sum(kept.sizes)
            put_rows(state, kept, rows[first : first + count])
            first += count

    def backward(self, loss: Tensor) -> None:
        """Send a loss, and the gradients that later chunks owe, back through the chunk."""
        roots, gradients = [loss], [torch.ones_like(loss)]
        if self.tape.owed is not None:
            for layer, (_, layout, sent) in self.learned.items():
                if len(sent):
                    roots.append(sent)
                    gradients.append(take_rows(self.tape.owed[layer], layout.kept))
        torch.autograd.backward(roots, gradients)
        self.tape.bring_home(self)


@dataclass(frozen=True, eq=False)
class ChunkLayout:
    """What one chunk computes and gives.

    Attributes:
        tiles: of its queries.
        sent: rows of its keys that later chunks need.
        kept: the same rows, by place in the state.
    """

    tiles: HaloLayout
    sent: Pieces
    kept: Pieces


@functools.lru_cache(maxsize=16)
def lay_out_chunk(
    pattern: DilationPattern,
    *,
    runs: tuple[Run, ...],
    start: int,
    stop: int,
    total: int,
    places: tuple[int, ...],
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device,
) -> ChunkLayout:
    """Lay out the positions start … stop − 1 of a sequence of `total`, whose past lies in a state at `places`."""
    sent, kept = rows_given(
        pattern, runs=runs, start=start, stop=stop, total=total, places=places, num_kv_heads=num_kv_heads,
        device=device,
    )  # fmt: skip
    tiles = lay_out(
        pattern, runs=runs_at_hand(runs, start, stop), tokens=stop - start, batch_size=batch_size,
        num_heads=num_heads, num_kv_heads=num_kv_heads, is_causal=True, earlier=places,
    )  # fmt: skip
    return ChunkLayout(tiles, sent, kept)


@functools.lru_cache(maxsize=16)
def rows_given(
    pattern: DilationPattern,
    *,
    runs: tuple[Run, ...],
    start: int,
    stop: int,
    total: int,
    places: tuple[int, ...],
    num_kv_heads: int,
    device: torch.device,
) -> tuple[Pieces, Pieces]:
    """Return the rows of a chunk's keys that later chunks need, and where they lie in the state."""
    edges = (0, start, stop, total)  # past, present, future
    sent, kept = RowIndices(), RowIndices()
    for need in needs_of(pattern, runs, edges, 2, is_causal=True) if stop < total else ():
        span = rows_within(need, edges, 1)
        sent.add(pattern, need, span, num_kv_heads, first=need.run.start + need.base - start)
        kept.add(pattern, need, span, num_kv_heads, place=places[need.branch])
    return sent.pieces(device), kept.pieces(device)


def _places(pattern: DilationPattern, bounds: Tensor, tokens: int, chunk_tokens: int) -> tuple[int, ...]:
    sizes = []
    ends = torch.tensor(range(chunk_tokens, tokens, chunk_tokens), dtype=torch.int64)
    for branch in pattern.all_branches:
        most = 0
        for _, start, stop in bounds.tolist():
            inside = ends[(ends > start) & (ends < stop)]
            if len(inside) and ((inside - start) % branch.length).any():
                most = max(most, branch.kept_rows(min(branch.length, stop - start), 0))
        sizes.append(most)
    return tuple(itertools.accumulate(sizes, initial=0))


def _lay_out(
    q: Tensor, k: Tensor, bounds: Tensor, start: int, total: int, places: tuple[int, ...], *arguments: Any
) -> ChunkLayout:
    return lay_out_chunk(
        pattern_of(*arguments),
        runs=runs_of(bounds, q.shape[0], total),
        start=start,
        stop=start + q.shape[2],
        total=total,
        places=tuple(places),
        batch_size=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        device=q.device,
    )


_SETTINGS = f"Tensor bounds, SymInt start, SymInt total, SymInt[] places, {PATTERN_SCHEMA}, float scale, str backend"


@torch.library.custom_op(
    "longnet::dilated_attention_chunk",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor halo, Tensor? sinks, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _op(
    q: Tensor, k: Tensor, v: Tensor, halo: Tensor, sinks: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse, and the rows (n, 2, D) of keys and values that later chunks need, at least float32."""
    layout, scale, backend = _lay_out(q, k, *settings[:-2]), *settings[-2:]
    sent = take_rows((k, v), layout.sent)
    q, k, v = (rows_dense(x) for x in (q, k, v))
    out, lse = attend(backend, layout.tiles, q, k, v, halo.to(k.dtype), sinks, scale=scale)
    return out, lse, sent.to(lse.dtype)


@torch.library.custom_op(
    "longnet::dilated_attention_chunk_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dsent, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor halo, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _op_backward(
    dout: Tensor,
    dsent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    halo: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout, scale, backend = _lay_out(q, k, *settings[:-2]), *settings[-2:]
    dout, q, k, v = (rows_dense(x) for x in (dout, q, k, v))
    dq, dk, dv, dhalo = differentiate(backend, layout.tiles, dout, q, k, v, halo.to(k.dtype), out, lse, scale=scale)
    if dsent is not None:
        take_home(dsent, layout.sent, (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dhalo.to(halo.dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, halo, sinks, bounds, *ctx.settings = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, k, v, out, lse, halo, bounds, sinks)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, _dlse: Tensor | None, dsent: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, sinks = ctx.saved_tensors
    _, _, _, out, lse, _, _ = saved
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _op_backward(dout, dsent, *saved, *ctx.settings)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[4]:
        dsinks = differentiate_sinks(dout, out, lse, sinks)
    return (*grads, dsinks, None, *(None,) * len(ctx.settings))


@_op.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dense = rows_dense(q)
    sent = k.new_empty(torch.library.get_ctx().new_dynamic_size(), 2, k.shape[3])
    return empty_like(dense).to(q.dtype), empty_lse(dense), empty_like(sent)


@_op_backward.register_fake
def _(_dout: Tensor, _dsent: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(empty_like(rows_dense(x)).to(x.dtype) for x in (q, k, v)), torch.empty_like(rest[2])


_op.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _count(q: Tensor, k: Tensor, _v: Tensor, _halo: Tensor, _sinks: Any, *settings: Any, **_: Any) -> int:
    return 4 * q.shape[3] * _lay_out(q, k, *settings[:-2]).tiles.pairs


def _count_backward(_dout: Tensor, _dsent: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    return _count(q, k, v, rest[2], None, *rest[3:]) * 5 // 2


register_flop_formula(torch.ops.longnet.dilated_attention_chunk, get_raw=True)(_count)
register_flop_formula(torch.ops.longnet.dilated_attention_chunk_backward, get_raw=True)(_count_backward)
