"""Sequences in stretches, in one process: slices of simulated ranks, chunks that learn, and texts that stream."""

import functools
import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from cases import patterns
from longnet import DilationPattern
from longnet.attention import reference
from longnet.attention.chunks import Chunk
from longnet.attention.halo import attend, differentiate, take_home, take_rows
from longnet.attention.plan import runs_of
from longnet.attention.sequence_parallel import make_halo
from longnet.attention.slices import lay_out_slice
from longnet.attention.streaming import StreamState

FAR = [2**31, 2**32, 10**9, 2**40]
STARTS = st.one_of(st.just(0), st.integers(0, 100), st.sampled_from(FAR), st.integers(0, 2**41))


def exchange(sent, layouts):
    """What all_to_all does: the parts that rank p sends to rank o, at rank o, in rank order."""
    parts = [rows.split(list(layout)) for rows, layout in zip(sent, layouts, strict=True)]
    return [torch.cat([part[rank] for part in parts]) for rank in range(len(parts))]


def simulate(q, k, v, dout, pattern, edges, *, bounds, is_causal, scale, backend="auto"):
    """Return out, lse, dq, dk, dv of the whole sequence, computed slice by slice."""
    batch, heads, tokens, _ = q.shape
    layouts = [
        lay_out_slice(
            pattern, runs=runs_of(bounds, batch, tokens), edges=edges, rank=rank, batch_size=batch, num_heads=heads,
            num_kv_heads=k.shape[1], is_causal=is_causal, device=q.device,
        )
        for rank in range(len(edges) - 1)
    ]  # fmt: skip
    cut = [[x[:, :, a:b] for a, b in itertools.pairwise(edges)] for x in (q, k, v, dout)]
    slices = list(zip(*cut, strict=True))
    sent = [take_rows(parts[1:3], layout.sent) for parts, layout in zip(slices, layouts, strict=True)]
    came = exchange(sent, [layout.sent_counts for layout in layouts])
    results, homeward = [], []
    for (*qkv, gradient), layout, rows in zip(slices, layouts, came, strict=True):
        assert len(rows) == sum(layout.received_counts)
        halo = make_halo(rows, layout, batch, k.shape[1])
        out, lse = attend(backend, layout.tiles, *qkv, functools.partial(torch.clone, halo), None, scale=scale)
        told = []
        *grads, dhalo = differentiate(
            backend, layout.tiles, gradient, *qkv, halo, out, lse, scale=scale,
            tell=lambda x, to=told: to.append(x.clone()),
        )  # fmt: skip
        assert torch.equal(*told, dhalo)  # nothing comes to it after it was told
        homeward.append(take_rows(dhalo, layout.received))
        results.append([out, lse, *grads])
    home = exchange(homeward, [layout.received_counts for layout in layouts])
    for result, layout, rows in zip(results, layouts, home, strict=True):
        take_home(rows, layout.sent, result[3:])
    return [torch.cat(parts, 2) for parts in zip(*results, strict=True)], layouts


@st.composite
def cut_sequences(draw, max_tokens=80, ranks=(1, 2, 3, 4, 8, 64)):
    tokens, batch = draw(st.integers(1, max_tokens)), draw(st.integers(1, 3))
    ranks = draw(st.sampled_from(ranks))
    edges = sorted(draw(st.lists(st.integers(0, tokens), min_size=ranks - 1, max_size=ranks - 1)))
    kind = draw(st.sampled_from(["whole", "padded", "packed"]))
    bounds = None
    if kind == "padded":
        spans = [sorted(draw(st.tuples(*[st.integers(0, tokens)] * 2))) for _ in range(batch)]
        bounds = torch.tensor([[row, *span] for row, span in enumerate(spans)])
    elif kind == "packed":
        batch = 1
        inner = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
        bounds = torch.tensor([[0, *span] for span in itertools.pairwise([0, *inner, tokens])])
    return tokens, batch, (0, *edges, tokens), bounds


def learn(layers, tape):
    """Return out and all gradients of layers of (q, k, v, dout, sinks), chunk by chunk, the last one first."""
    cut = [
        range(start, min(tape.tokens, start + tape.chunk_tokens)) for start in range(0, tape.tokens, tape.chunk_tokens)
    ]

    def attend(chunk, layer):
        *qkv, _, sinks = layers[layer]
        here = slice(cut[chunk.index].start, cut[chunk.index].stop)
        parts = [x[:, :, here].detach().requires_grad_(chunk.is_learning) for x in qkv]
        if sinks is not None:
            parts.append((sinks if sinks.ndim == 1 else sinks[:, :, here]).detach().requires_grad_())
        out = chunk.attend(layer, *parts[:3], tape.patterns[layer], scale=0.4, sinks=(*parts, None)[3])
        return out, parts

    log = []
    for index in range(tape.chunks - 1):
        chunk = Chunk(tape, index, is_learning=False)
        with torch.no_grad():
            for layer in range(len(layers)):
                attend(chunk, layer)
        log.append(chunk.replaced())
        heads = layers[0][1].shape[1]
        assert len(log[-1]) == tape.rows_given(heads)[index]
    results = [[] for _ in layers]
    for index in reversed(range(tape.chunks)):
        chunk = Chunk(tape, index, is_learning=True)
        if index < tape.chunks - 1:
            chunk.restore(log.pop())
        outs, leaves = zip(*(attend(chunk, layer) for layer in range(len(layers))), strict=True)
        here = slice(cut[index].start, cut[index].stop)
        chunk.backward(sum((out * layer[3][:, :, here]).sum() for out, layer in zip(outs, layers, strict=True)))
        for result, out, parts in zip(results, outs, leaves, strict=True):
            result.insert(0, [out.detach(), *(x.grad for x in parts)])
    assert tape.owed is None or not tape.owed.any()  # all debts are paid
    return [[torch.cat(x, 2) if x[0].ndim > 1 else sum(x) for x in zip(*result, strict=True)] for result in results]


@st.composite
def sequences(draw, max_tokens=80):
    tokens, batch = draw(st.integers(1, max_tokens)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["whole", "padded", "packed"]))
    bounds = torch.tensor([[row, 0, tokens] for row in range(batch)])
    if kind == "padded":
        spans = [sorted(draw(st.tuples(*[st.integers(0, tokens)] * 2))) for _ in range(batch)]
        bounds = torch.tensor([[row, *span] for row, span in enumerate(spans)])
    elif kind == "packed":
        batch = 1
        inner = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
        bounds = torch.tensor([[0, *span] for span in itertools.pairwise([0, *inner, tokens])])
    return tokens, batch, bounds, draw(st.integers(1, tokens + 3))


@dataclass
class Text:
    """A batch of sequences: where each begins, and the pieces it comes in."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pattern: DilationPattern
    begins: list[int]
    pieces: list[tuple[int, int]]
    start: int
    backend: str = "auto"

    @property
    def state(self):
        batch, heads, _, head_dim = self.k.shape
        return StreamState(
            self.pattern, batch_size=batch, num_kv_heads=heads, head_dim=head_dim, dtype=self.k.dtype,
            device=self.k.device, start=self.start, backend=self.backend,
        )  # fmt: skip

    def run(self, dtype=torch.float64, pieces=None):
        text = Text(*(x.to(dtype) for x in (self.q, self.k, self.v)), *list(vars(self).values())[3:])
        state, parts = text.state, []
        for a, b in self.pieces if pieces is None else pieces:
            bounds = None
            if any(begin > a for begin in self.begins):
                runs = [(row, max(0, begin - a), b - a) for row, begin in enumerate(self.begins) if begin < b]
                bounds = torch.tensor(runs, dtype=torch.int64).view(-1, 3)
            q, k, v = (x[:, :, a:b] for x in (text.q, text.k, text.v))
            parts.append(state.attend(q, k, v, scale=None, bounds=bounds))
        return torch.cat(parts, 2), state

    def oracle(self, dtype=torch.float64):
        """The definition, on positions as they are: a dense mask with each row's own count."""
        tokens, heads = self.q.shape[2], self.k.shape[1]
        positions = torch.stack([torch.arange(tokens) - begin + self.start for begin in self.begins])
        documents = torch.where(positions >= self.start, 0, -1)
        count = reference.multiplicity(positions, documents, self.pattern, num_kv_heads=heads, is_causal=True)
        group = self.q.shape[1] // heads
        count = count.repeat_interleave(group, 1)
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * q.shape[3] ** -0.5 + count.to(dtype).log()
        unseen = (count == 0).all(-1, keepdim=True)
        return torch.where(unseen, 0, torch.softmax(torch.where(unseen, 0, scores), -1) @ v)


@st.composite
def texts(draw, max_tokens=50, head_dims=(1, 3, 8, 16), starts=STARTS):
    tokens, batch = draw(st.integers(1, max_tokens)), draw(st.integers(1, 3))
    heads, group = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = draw(st.sampled_from(head_dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    is_wide = draw(st.booleans())

    def normal(n):
        shape = (batch, tokens, n, head_dim) if is_wide else (batch, n, tokens, head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2) if is_wide else x

    is_padded = draw(st.booleans())
    begins = [draw(st.integers(0, tokens)) if is_padded else 0 for _ in range(batch)]
    cuts = draw(st.lists(st.integers(1, tokens), max_size=6))
    if draw(st.booleans()):
        cuts = list(range(1, tokens))  # token by token
    edges = sorted({0, *cuts, tokens})
    start = draw(starts)
    start -= draw(st.integers(0, 40))
    return Text(
        normal(heads * group), normal(heads), normal(heads), draw(patterns()), begins,
        list(itertools.pairwise(edges)), max(0, start),
    )  # fmt: skip
