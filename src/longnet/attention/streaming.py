"""Causal dilated attention over a sequence that arrives in pieces, with a state that does not grow. Not in the paper.

Branch i needs of the past only the kept rows of its current segment, ceil(w_i / r_i) a key/value head: every earlier
segment is closed to later queries. Of global tokens it needs all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet.attention.backends import dispatch
from longnet.attention.backends.sdpa import Kernel
from longnet.attention.backends.triton import launch
from longnet.attention.halo import attend, lay_out
from longnet.attention.merge import merge_sinks_
from longnet.attention.pattern import DilationPattern
from longnet.attention.plan import Run, kept_tiles
from longnet.attention.tiles import empty_like, empty_lse, rows_dense
from longnet.attention.views import blocks


class _Step(NamedTuple):
    """What an undone step needs: its keys, what they replaced, and where every batch row stood."""

    k: Tensor
    v: Tensor
    runs: tuple[Run, ...]
    next: tuple[int, ...]
    first: tuple[int, ...]
    ended: tuple[bool, ...]
    replaced: list[tuple[int, int, int, Tensor, Tensor]]  # branch, first place, one past the last, keys, values


class StreamState:
    """The kept keys and values of one layer: what causal dilated attention needs of all earlier tokens.

    Keys are one tensor, (B, G, rows, D), the branches one after the other, each with ceil(min(w_i, max_tokens) / r_i)
    rows, `pattern.state_rows` together; values likewise. Rows are written in place and never moved. Batch rows may
    stand at different positions. Positions are Python ints: any length.

    Args:
        pattern: the branches.
        batch_size: B.
        num_kv_heads: G.
        head_dim: D.
        dtype: of keys and values.
        device: of keys and values.
        start: position of the first token, as if so many tokens had passed unseen.
        max_tokens: room for sequences up to this length, which grows when one is longer; None for any length.
        backend: as in `dilated_attention`, but for the oracle.

    Attributes:
        keys: (B, G, rows, D).
        values: (B, G, rows, D).
        next: position of the next token, per batch row.
        first: position of the first token, per batch row.
        ended: whether padding has followed a batch row's tokens.
    """

    def __init__(
        self,
        pattern: DilationPattern,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        start: int = 0,
        max_tokens: int | None = None,
        backend: dispatch.Backend = "auto",
    ) -> None:
        self.pattern, self.start, self.backend = pattern, start, backend
        longest = max(*pattern.segment_lengths, pattern.global_tokens)
        self.max_tokens = longest if max_tokens is None else max_tokens
        self._edges = self._edges_of(self.max_tokens)
        self._grids = [pattern.offset_grids(branch.rate, num_kv_heads) for branch in pattern.all_branches]
        # Zeros: a file of this state must not carry what the memory held before.
        shape = (batch_size, num_kv_heads, self._edges[-1], head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.is_recording = False
        self._launched: tuple[Any, launch.Step] | None = None
        self._on_device: tuple[Any, ...] = ()  # next and first as the device has them
        self._captured: tuple[int, int] | None = None  # where the keys and values lay that a graph was captured with
        self.restart()

    def restart(self) -> None:
        """Forget every token."""
        batch_size = self.keys.shape[0]
        self.next, self.first = [self.start] * batch_size, [self.start] * batch_size
        self.ended = [False] * batch_size
        self._steps: list[_Step] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        bounds: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend with the next tokens to themselves and to the past, then keep of them what later ones need.

        The result carries no gradient; a backward pass through it raises.

        Args:
            q: (B, H, T, D), H a multiple of G.
            k: (B, G, T, D).
            v: (B, G, T, D).
            scale: factor on q·k, D ** -0.5 when None.
            bounds: (n, 3) int64 on the CPU, (batch row, start, stop) of the real tokens among the T, at most one run a
                row; None where all are real.
            sinks: (H,) or (B, H, T), as in `dilated_attention`.

        Returns:
            out (B, H, T, D) like q; 0 for padding and for queries that no branch keeps.

        Raises:
            ValueError: tensors that do not fit the state, or padding between the real tokens of a row.
        """
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out: Tensor = _WithoutGradient.apply(self, q, k, v, scale, bounds, sinks)  # type: ignore[no-untyped-call]
            return out
        return self._attend(q, k, v, scale, bounds, sinks)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, bounds: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        self._check(q, k, v)
        head_dim, tokens = q.shape[3], q.shape[2]
        scale = head_dim**-0.5 if scale is None else float(scale)
        is_fused = dispatch.is_fused(self.backend, q.device, q.dtype, head_dim)
        q, k, v = (rows_dense(x) for x in (q, k, v))
        runs = self._runs(tokens, bounds)
        self._reserve(max((run.stop - run.start for run in runs), default=0))
        self._begin(k, v, runs)
        if tokens == 1 and is_fused:
            return self._step(q, k, v, sinks, runs, scale)
        if tokens == 1:
            kernels = dispatch.choose(self.backend, q.device, q.dtype, head_dim)
            out, lse = empty_like(q), empty_lse(q)
            is_written = self.pattern.all_branches[0].is_covering and sum(run.rows for run in runs) == q.shape[0]
            if not is_written:
                out.zero_()
                lse.fill_(-torch.inf)
            for run in runs:
                self._attend_position(kernels.general, q, k, v, out, lse, run, scale, is_first=is_written)
            if sinks is not None:
                merge_sinks_(out, lse, sinks)
        else:
            layout = lay_out(
                self.pattern, runs=runs, tokens=tokens, batch_size=q.shape[0], num_heads=q.shape[1],
                num_kv_heads=k.shape[1], is_causal=True, earlier=tuple(self._edges),
            )  # fmt: skip
            out, _ = attend(self.backend, layout, q, k, v, (self.keys, self.values), sinks, scale=scale)
            self._keep(k, v, runs)
        self._advance(tokens, runs)
        return out.to(q.dtype)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, runs: tuple[Run, ...], scale: float
    ) -> Tensor:
        """Attend with one token a batch row in one launch, which reads positions on the device and moves them on."""
        shape, stands = (q.shape[1], *self.keys.shape, self.keys.device), (self.next, self.first)
        if self._launched is None or self._launched[0] != shape:
            self._launched = shape, launch.step_of(q, self.keys)
            self._on_device = ()
        step, is_capturing = self._launched[1], q.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._on_device != stands and is_capturing:
            raise ValueError(
                "a graph is captured of a step whose position the device does not know: attend with one token first, "
                "after the prompt, crop(), restart() or select()"
            )
        if self._on_device != stands:
            step.positions.copy_(torch.tensor(stands, dtype=torch.int64))
        for run in runs if self.is_recording else ():
            for branch, (length, rate, most, _) in enumerate(self.pattern.all_branches):
                place = (run.stop - run.start - 1) % length // rate
                if place < most:
                    self._save(branch, place, place + 1)
        rows = {row for run in runs for row in range(run.row, run.row + run.rows)}
        out = launch.decode(
            q, k, v, self.keys, self.values, sinks, self.pattern, tuple(self._edges), step,
            tuple(row in rows for row in range(len(self.next))), scale=scale,
        )  # fmt: skip
        if is_capturing:  # which computes nothing yet
            self._captured = self.keys.data_ptr(), self.values.data_ptr()
        else:
            self._advance(1, runs)
        self._on_device = list(self.next), list(self.first)
        return out

    def replayed(self, steps: int) -> None:
        """Take note of steps of one token a batch row that a CUDA graph of a step has run, unseen by Python.

        What a capture records has not run, and does not count. A graph is good for as long as the keys lie where they
        are, which `select` ends; after `restart`, `crop` and several tokens at once an eager step must come first,
        which tells the device. Nothing of ours runs between two replays, so that it did not is found out here.

        Args:
            steps: how often it was replayed.

        Raises:
            ValueError: no step was launched by `backend="triton"` before, or steps were replayed where the device did
                not stand where the state does, or with keys that lie elsewhere by now, or while each step was to be
                recorded, or beyond the room that `max_tokens` makes, where rows are dropped.
        """
        if self._launched is None or self.is_recording:
            raise ValueError(
                'a graph replays steps of backend="triton" that are not recorded: capture one, then replay it'
            )
        if self._on_device != (self.next, self.first):
            raise ValueError(
                "a graph was replayed at another position than the state's: one token must be attended with by itself "
                "after crop(), restart(), select() or several tokens, and before the replay. What it wrote is wrong: "
                "restart() and begin anew"
            )
        if self._captured not in (None, (self.keys.data_ptr(), self.values.data_ptr())):
            raise ValueError(
                "a graph was replayed with keys that lie elsewhere since select(), or since more room was made: "
                "capture it anew, and take what it gave for nothing"
            )
        longest = max(self.next) + steps
        if longest > self.max_tokens and self._edges_of(longest) != self._edges:
            raise ValueError(
                f"{longest} tokens need more rows than max_tokens={self.max_tokens} makes room for, and a graph cannot "
                "make more: give max_tokens at the start"
            )
        self.next = [position + steps for position in self.next]
        self._on_device = list(self.next), list(self.first)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        batch_size, num_kv_heads, _, head_dim = self.keys.shape
        if (
            k.shape != (batch_size, num_kv_heads, q.shape[2], head_dim)
            or q.shape[0] != batch_size
            or v.shape != k.shape
        ):
            raise ValueError(
                f"the cache holds {batch_size} rows of {num_kv_heads} key/value heads with {head_dim} channels, got q "
                f"{tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: make one of this batch size"
            )
        if k.dtype != self.keys.dtype or k.device != self.keys.device:
            raise ValueError(
                f"the cache holds {self.keys.dtype} on {self.keys.device}, got keys in {k.dtype} on {k.device}: "
                "make it with this dtype and device, or move it with .to()"
            )

    def _keep(self, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> None:
        for tile, low, high in kept_tiles(self.pattern, runs=runs, num_kv_heads=k.shape[1]):
            keys, values = self._of_branch(tile.branch)
            self._save(tile.branch, low, high)
            for block in blocks(tile, (k, v), (keys, values), 2**62):
                block.kv(keys).copy_(block.q(k))
                block.kv(values).copy_(block.q(v))

    def _attend_position(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        run: Run,
        scale: float,
        *,
        is_first: bool,
    ) -> None:
        # One token: no plan, since its place in every branch changes with each step. Heads that see equally many rows
        # of a branch are one call; the query heads of one key/value head are the rows of a tile.
        group, head_dim = q.shape[1] // k.shape[1], q.shape[3]
        position = run.stop - run.start - 1
        rows = slice(run.row, run.row + run.rows)
        q_row, q_head, _, _ = q.stride()
        out_row, out_head, _, _ = out.stride()
        lse_row, lse_head, _ = lse.stride()
        row, head, place, _ = self.keys.stride()
        merge = dispatch.merge_on(q.device, q.dtype)
        for branch, kept in enumerate(self.pattern.all_branches):
            inside, rate = position % kept.length, kept.rate
            phase, last = inside % rate, self._edges[branch] + inside // rate
            for grid in self._grids[branch] if inside // rate < kept.rows else ():
                if grid.offset <= phase < grid.offset + grid.offsets:
                    low = grid.head + (phase - grid.offset) * grid.offset_step
                    own = slice(low, low + (grid.heads - 1) * grid.head_step + 1, grid.head_step)
                    self._save(branch, inside // rate, inside // rate + 1)
                    self.keys[rows, own, last] = k[rows, own, 0]
                    self.values[rows, own, last] = v[rows, own, 0]
            unborn = max(0, run.first - position + inside)  # positions of the segment that never existed
            for low, heads, step, offset in self._heads_that_see(branch, phase, unborn % rate):
                absent = kept.kept_rows(unborn, offset)
                count = kept.kept_rows(inside + 1, offset) - absent
                if count <= 0:
                    continue
                k_size, k_stride = (run.rows, heads, count, head_dim), (row, step * head, place, 1)
                k_from = run.row * row + low * head + (self._edges[branch] + absent) * place
                size, q_step, at = (run.rows, heads, group, head_dim), step * group, low * group
                tile_out, tile_lse = kernel.attend(
                    q.as_strided(
                        size, (q_row, q_step * q_head, q_head, 1), q.storage_offset() + run.row * q_row + at * q_head
                    ),
                    self.keys.as_strided(k_size, k_stride, k_from),
                    self.values.as_strided(k_size, k_stride, k_from),
                    is_causal=False,
                    scale=scale,
                )
                so_far = (
                    out.as_strided(size, (out_row, q_step * out_head, out_head, 1), run.row * out_row + at * out_head),
                    lse.as_strided(size[:3], (lse_row, q_step * lse_head, lse_head), run.row * lse_row + at * lse_head),
                )
                if is_first and branch == 0:
                    so_far[0].copy_(tile_out)
                    so_far[1].copy_(tile_lse)
                else:
                    merge(*so_far, tile_out, tile_lse)

    def _heads_that_see(self, branch: int, phase: int, first: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first head, heads, their distance, an offset of theirs) of those that attend from a position's phase.

        Those of one call see equally many rows: offsets up to the phase have one row more than those after it, and
        those before the phase of the first position one row less.
        """
        is_dense = self.pattern.queries == "all"
        for grid in self._grids[branch]:
            for part in grid.cut(*(place - grid.offset for place in (phase, phase + 1, first))):
                if not (is_dense or part.offset == phase):
                    continue
                if part.heads == 1:
                    yield part.head, part.offsets, part.offset_step, part.offset
                elif part.offset_step == part.heads * part.head_step:
                    yield part.head, part.offsets * part.heads, part.head_step, part.offset
                else:
                    for index in range(part.offsets):
                        yield part.head + index * part.offset_step, part.heads, part.head_step, part.offset + index

    def _runs(self, tokens: int, bounds: Tensor | None) -> tuple[Run, ...]:
        """Return where the real tokens of each batch row lie, equal neighbours as one run."""
        spans = [(0, tokens)] * len(self.next)
        if bounds is not None:
            spans = [(0, 0)] * len(self.next)
            for row, start, stop in bounds.tolist():
                if not 0 <= start <= stop <= tokens:
                    raise ValueError(f"bounds must lie within the {tokens} new tokens, got {start} … {stop}")
                spans[row] = (start, stop)
        runs: list[Run] = []
        for row, ((start, stop), position, first) in enumerate(zip(spans, self.next, self.first, strict=True)):
            if start == stop:
                continue
            if self.ended[row] or (start and position > first):
                raise ValueError(
                    f"row {row} has padding between its tokens, which a cache cannot honour: pad on the left, before "
                    "the first of them"
                )
            last = runs[-1] if runs else None
            if last and (last.row + last.rows, last.start, last.stop, last.first) == (
                row,
                start - position,
                stop,
                first,
            ):
                runs[-1] = last._replace(rows=last.rows + 1)
            else:
                runs.append(Run(row, 1, start - position, stop, first))
        return tuple(runs)

    def _advance(self, tokens: int, runs: tuple[Run, ...]) -> None:
        idle = {row for row, position in enumerate(self.next) if position > self.first[row]}
        for run in runs:
            for row in range(run.row, run.row + run.rows):
                self.next[row] = run.stop - run.start
                if run.stop == tokens:
                    idle.discard(row)
                else:
                    idle.add(row)
        for row in idle:
            self.ended[row] = True

    def kept(self, branch: int, *, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (n, D) that branch `branch` still holds for later queries of a batch row."""
        kept = self.pattern.all_branches[branch]
        offset = self.pattern.offset(kept.rate, head, self.keys.shape[1])
        inside = self.next[row] % kept.length
        low = kept.kept_rows(self.first[row] - self.next[row] + inside, offset)
        places = slice(self._edges[branch] + low, self._edges[branch] + kept.kept_rows(inside, offset))
        return self.keys[row, head, places], self.values[row, head, places]

    def record(self, *, is_on: bool) -> None:
        """Keep what each step replaces until the next `crop`, which may then go back across segments; or stop it."""
        self.is_recording = is_on
        self._steps = []

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, padding included.

        Raises:
            ValueError: rows of an earlier segment would be needed, which are gone, or padding would be cropped.
        """
        left = tokens
        while left > 0 and self._steps:
            step = self._steps.pop()
            for branch, low, high, *replaced in reversed(step.replaced):
                for of_branch, before in zip(self._of_branch(branch), replaced, strict=True):
                    of_branch[:, :, low:high] = before
            self.next, self.first, self.ended = list(step.next), list(step.first), list(step.ended)
            left -= step.k.shape[2]
            if left < 0:
                stay = -left
                runs = tuple(run._replace(stop=min(run.stop, stay)) for run in step.runs)
                runs = tuple(run for run in runs if run.stop > max(0, run.start + run.first))
                self._steps, is_recording, self.is_recording = [], self.is_recording, False
                self._keep(step.k[:, :, :stay], step.v[:, :, :stay], runs)
                self._advance(stay, runs)
                self.is_recording = is_recording
        self._steps = []
        if left > 0:
            self._crop_within_segments(left)

    def _crop_within_segments(self, tokens: int) -> None:
        for position, first, ended in zip(self.next, self.first, self.ended, strict=True):
            if ended or position - tokens < first:
                raise ValueError(f"cannot crop {tokens} tokens: a row holds {position - first}, or ends in padding")
            for length, _ in self.pattern.branches:
                if position - tokens < (position - 1) // length * length:
                    raise ValueError(
                        f"cannot crop {tokens} tokens at position {position}: a segment of {length} began since, and "
                        "the rows before it are gone. Call activate_past_recording() before the tokens that may have "
                        "to go"
                    )
        self.next = [position - tokens for position in self.next]

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch of the rows given, in their order; a row may come again."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.next, self.first = [self.next[row] for row in rows], [self.first[row] for row in rows]
        self.ended = [self.ended[row] for row in rows]
        self._steps = []

    def _begin(self, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> None:
        if self.is_recording:
            where = tuple(self.next), tuple(self.first), tuple(self.ended)
            self._steps.append(_Step(k, v, runs, *where, []))

    def _save(self, branch: int, low: int, high: int) -> None:
        if self.is_recording:
            keys, values = (x[:, :, low:high].clone() for x in self._of_branch(branch))
            self._steps[-1].replaced.append((branch, low, high, keys, values))

    def _reserve(self, tokens: int) -> None:
        """Make room for sequences of `tokens`, where the room asked for at first was smaller."""
        if tokens <= self.max_tokens:
            return
        self.max_tokens = max(tokens, 2 * self.max_tokens)
        old, self._edges = self._edges, self._edges_of(self.max_tokens)
        if old == self._edges:
            return
        keys, values = self.keys, self.values
        shape = (*keys.shape[:2], self._edges[-1], keys.shape[3])
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        for branch, (low, high) in enumerate(itertools.pairwise(old)):
            for new, before in zip(self._of_branch(branch), (keys, values), strict=True):
                new[:, :, : high - low] = before[:, :, low:high]

    def _of_branch(self, branch: int) -> tuple[Tensor, Tensor]:
        low, high = self._edges[branch : branch + 2]
        return self.keys[:, :, low:high], self.values[:, :, low:high]

    def _edges_of(self, tokens: int) -> list[int]:
        rows = [branch.kept_rows(min(branch.length, tokens), 0) for branch in self.pattern.all_branches]
        return list(itertools.accumulate(rows, initial=0))


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: StreamState, *arguments: Any) -> Tensor:
        return state._attend(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "a DilatedCache keeps no gradients: train without a cache, or with transformers' DynamicCache"
        )
