"""`longnet bench attention`: the op against dense attention, against its bare kernel calls, by length, by memory.

Nothing is timed before the op has agreed with an independent path (`gathered`) on the very tensors of the case.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longnet.attention.backends import dispatch
from longnet.attention.backends.sdpa import Kernel
from longnet.attention.dilated import dilated_attention
from longnet.attention.pattern import DilationPattern
from longnet.measurement import interleaved, peak_bytes, ratio
from longnet.measurement import seconds as duration

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What `longnet bench attention` measures.

    Attributes:
        lengths: tokens of the comparison with dense attention, with the paper's pattern.
        dense_query_lengths: the same for patterns in which all queries attend, geometric up to that length.
        factors: of those patterns, each rate over the one before.
        token_lengths: tokens at which the time per token is measured, geometric pattern up to that length.
        memory_length: tokens at which the peak memory is measured.
        tile_rows: rows of the single tiles whose rate is measured.
        num_heads: query, key and value heads.
        token_heads: the same where the time per token is measured; the gate there copies every branch.
        head_dim: channels of a head.
        repeats: counted rounds at the longest length; figures are medians. Shorter calls, which chance disturbs more,
            are compared in up to ten times as many.
        backends: of the op, each compared.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    dense_query_lengths: tuple[int, ...] = (16384, 32768, 65536, 131072)
    factors: tuple[int, ...] = (4, 8)
    token_lengths: tuple[int, ...] = (32768, 131072, 1048576)
    memory_length: int = 262144
    tile_rows: tuple[int, ...] = (2048, 32768)
    num_heads: int = 4
    token_heads: int = 2
    head_dim: int = 64
    repeats: int = 3
    backends: tuple[dispatch.Backend, ...] = ("auto",)


# 2,048 channels, but for the longest sequence: there dense attention takes seconds.
GPU = (
    Settings(
        lengths=(8192, 32768, 131072),
        dense_query_lengths=(32768, 131072),
        token_lengths=(32768, 131072, 1048576),
        memory_length=1048576,
        num_heads=16,
        head_dim=128,
        backends=("auto", "sdpa", "triton"),
    ),
    Settings(
        lengths=(8192, 32768, 131072),
        dense_query_lengths=(),
        token_lengths=(),
        memory_length=0,
        tile_rows=(),
        num_heads=32,
        head_dim=64,
        backends=("auto", "sdpa", "triton"),
    ),
    Settings(
        lengths=(1048576,),
        dense_query_lengths=(),
        token_lengths=(),
        memory_length=0,
        tile_rows=(),
        num_heads=4,
        head_dim=128,
        repeats=1,
        backends=("auto",),
    ),
)
QUICK = Settings(
    lengths=(2048, 4096, 8192, 16384),
    dense_query_lengths=(8192,),
    token_lengths=(8192, 32768),
    memory_length=65536,
    tile_rows=(2048, 8192),
    repeats=2,
)


@dataclass(frozen=True)
class Gathered:
    """Rows of one branch and head, copied: what a kernel is called with when nothing is strided. Causal, row by row."""

    head: int
    q_index: Tensor  # [segments, rows], positions
    k_index: Tensor
    q: Tensor  # [segments, 1, rows, D]
    dout: Tensor
    k: Tensor
    v: Tensor


class GateError(Exception):
    """The op disagreed with the gathered path; no figure is reported."""


def run(settings: Settings, device: torch.device) -> Iterator[Row]:
    """Measure every case, yielding rows as they come.

    Raises:
        GateError: the op gave a wrong result.
    """
    for tokens in settings.lengths:
        yield from compare(tokens, DilationPattern.paper(), settings, device)
    for tokens in settings.dense_query_lengths:
        for factor in settings.factors:
            geometric = DilationPattern.geometric(2048, tokens, factor)
            yield from compare(tokens, replace(geometric, queries="all"), settings, device)
    if settings.tile_rows:
        yield from tiles(settings, device)
        yield from accuracy(device)
    if settings.token_lengths:
        yield from per_token(settings, device)
    if settings.memory_length:
        yield memory(settings, device)


def compare(tokens: int, pattern: DilationPattern, settings: Settings, device: torch.device) -> Iterator[Row]:
    """Time dense attention, the op, and the op's bare kernel calls on gathered rows, in one run (paper, Figure 5).

    Yields a row for each backend. Dense attention is that of the fastest kernel that PyTorch has on the device.
    """
    q, k, v, dout = _tensors(tokens, settings, device)
    gathered = gather(q, k, v, dout, pattern)
    for backend in settings.backends:
        gate(q, k, v, dout, pattern, gathered, backend)
    by_shape = _stack(gathered)

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def dilated(backend: dispatch.Backend) -> Callable[[], Tensor]:
        return lambda: dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)

    def forward(attention: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(attention)

    def both(attention: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(), (q, k, v), dout)

    rounds = max(1, round(settings.repeats * min(10, max(settings.lengths) / tokens)))
    names = ("dense", "bare", *settings.backends)
    times: dict[str, dict[str, list[float]]] = {}
    kernels: dict[str, str] = {}
    for key, way in (("forward", forward), ("both", both)):
        kernels[key], best = _fastest_dense(way(dense), device)
        bare: Callable[[], object] = functools.partial(_bare, by_shape, backward=key == "both")
        cases = [best, bare, *(way(dilated(backend)) for backend in settings.backends)]
        times[key] = dict(zip(names, interleaved(cases, rounds, device), strict=True))
    flops = pattern.flops(tokens=tokens, num_heads=settings.num_heads, head_dim=settings.head_dim, is_causal=True)
    dense_flops = 4 * settings.head_dim * settings.num_heads * tokens * (tokens + 1) // 2
    for backend in settings.backends:
        figures: dict[str, Any] = {}
        for key, of in times.items():
            figures |= {f"{key}_{name}_s": statistics.median(of[name]) for name in ("dense", "bare")}
            figures[f"{key}_dilated_s"] = statistics.median(of[backend])
            figures[f"{key}_speedup"] = ratio(of["dense"], of[backend])
            figures[f"{key}_over_bare"] = ratio(of[backend], of["bare"])
            figures[f"{key}_share_of_ideal"] = figures[f"{key}_speedup"] * flops / dense_flops
            figures[f"{key}_dense_kernel"] = kernels[key]
        yield {
            "case": "compare" if pattern.queries == "kept" else "dense_queries",
            "pattern": str(pattern),
            "tokens": tokens,
            "heads": settings.num_heads,
            "head_dim": settings.head_dim,
            "dtype": str(q.dtype).removeprefix("torch."),
            "backend": backend,
            "rounds": rounds,
            **figures,
            "flop_ratio": dense_flops / flops,
        }


def _fastest_dense(dense: Callable[[], object], device: torch.device) -> tuple[str, Callable[[], object]]:
    """Return the name of the kernel by which dense attention is fastest, by the better of two calls, and a call."""
    if device.type != "cuda":
        return "flash (CPU)", dense
    found = []
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        call = functools.partial(_with_kernel, kernel, dense)
        try:
            duration(call, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no such kernel for this device
            continue
        found.append((min(duration(call, device) for _ in range(2)), kernel.name, call))
    if not found:
        return "PyTorch's choice", dense
    _, name, call = min(found, key=lambda each: each[0])
    return name, call


def _with_kernel(kernel: SDPBackend, call: Callable[[], object]) -> object:
    with sdpa_kernel(kernel):
        return call()


def tiles(settings: Settings, device: torch.device) -> Iterator[Row]:
    """Time the kernel alone on full and causal tiles of some lengths, by useful FLOPs: what bounds the speed-up."""
    longest = max(settings.tile_rows)
    cases, flops = [], []
    for rows in settings.tile_rows:
        repeats = longest // rows  # of heads and of calls: a round of each case computes equally many full scores
        heads = repeats * torch.get_num_threads()  # whole ones a thread: two halves of a causal head are unequal work
        q, k, v, _ = (x.detach() for x in _tensors(rows, replace(settings, num_heads=heads), device))
        kernel = dispatch.choose("sdpa", device, q.dtype, settings.head_dim).repeated
        for is_causal in (False, True):
            cases.append(functools.partial(_attend_often, kernel, q, k, v, is_causal=is_causal, calls=repeats))
            pairs = rows * (rows + 1) // 2 if is_causal else rows**2
            flops.append(4 * settings.head_dim * heads * repeats * pairs)
    seconds = interleaved(cases, settings.repeats, device)
    costs = [[t / count for t in times] for times, count in zip(seconds, flops, strict=True)]
    best = settings.tile_rows.index(longest)
    for index, rows in enumerate(settings.tile_rows):
        full, causal = costs[2 * index : 2 * index + 2]
        yield {
            "case": "tile",
            "tokens": rows,
            "head_dim": settings.head_dim,
            "full_gflops": 1e-9 / statistics.median(full),
            "causal_gflops": 1e-9 / statistics.median(causal),
            "full_rate_over_longest": ratio(costs[2 * best], full),
            "causal_rate_over_longest": ratio(costs[2 * best + 1], causal),
        }


def _attend_often(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, calls: int) -> None:
    for _ in range(calls):
        kernel.attend(q, k, v, is_causal=is_causal, scale=q.shape[3] ** -0.5)


def accuracy(device: torch.device) -> Iterator[Row]:
    """Measure float32's largest errors against the float64 oracle, over the largest value, by the size of logits."""
    generator = torch.Generator().manual_seed(0)
    for largest in (0, 120):
        q, k, v, dout = (torch.randn(1, 4, 512, 64, generator=generator, dtype=torch.float64) for _ in "qkvo")
        if largest:
            for x in (q, k):  # the first component alone makes logits of ± `largest`
                x[..., 0] = x[..., 0].sign() * (largest * 64**0.5) ** 0.5
        pattern = DilationPattern((64, 256, 512), (1, 3, 4))
        q, k, v, dout = (x.float() for x in (q, k, v, dout))
        results = []
        runs: tuple[tuple[torch.dtype, dispatch.Backend], ...]
        runs = (torch.float64, "reference"), (torch.float32, "sdpa"), (torch.float32, "reference")
        for dtype, backend in runs:
            q_in, k_in, v_in = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
            out = dilated_attention(q_in, k_in, v_in, pattern, is_causal=True, backend=backend)
            results.append((out.detach(), *torch.autograd.grad(out, (q_in, k_in, v_in), dout.to(device, dtype))))
        exact, *rounded = results
        errors = [
            [((got - want).abs().max() / want.abs().max()).item() for got, want in zip(result, exact, strict=True)]
            for result in rounded
        ]
        yield {
            "case": "accuracy",
            "tokens": 512,
            "largest_logit": (q @ k.mT).abs().max().item() / 8,
            "out_error": errors[0][0],
            "gradient_error": max(errors[0][1:]),
            "plain_out_error": errors[1][0],
            "plain_gradient_error": max(errors[1][1:]),
        }


def per_token(settings: Settings, device: torch.device) -> Iterator[Row]:
    """Time the forward pass per token as the sequence, and with it the geometric pattern, grows.

    All lengths take turns in each round, a short one as often as fills the longest, so that their ratios hold.
    """
    settings = replace(settings, num_heads=settings.token_heads)
    patterns = [DilationPattern.geometric(2048, tokens) for tokens in settings.token_lengths]
    tensors = []
    for tokens, pattern in zip(settings.token_lengths, patterns, strict=True):
        q, k, v, dout = _tensors(tokens, settings, device)
        gate(q, k, v, dout, pattern, gather(q, k, v, dout, pattern))
        tensors.append((q, k, v))

    def forward(index: int) -> None:
        q, k, v = tensors[index]
        for _ in range(max(settings.token_lengths) // settings.token_lengths[index]):
            dilated_attention(q, k, v, patterns[index], is_causal=True)

    first_tokens = max(settings.token_lengths) // settings.token_lengths[0] * settings.token_lengths[0]
    with torch.no_grad():
        cases = [functools.partial(forward, index) for index in range(len(tensors))]
        seconds = interleaved(cases, settings.repeats, device)
    for tokens, pattern, times in zip(settings.token_lengths, patterns, seconds, strict=True):
        flops = pattern.flops(tokens=tokens, num_heads=settings.num_heads, head_dim=settings.head_dim, is_causal=True)
        calls = max(settings.token_lengths) // tokens
        yield {
            "case": "per_token",
            "pattern": str(pattern),
            "tokens": tokens,
            "heads": settings.num_heads,
            "head_dim": settings.head_dim,
            "dtype": str(tensors[0][0].dtype).removeprefix("torch."),
            "forward_us_per_token": statistics.median(times) / (calls * tokens) * 1e6,
            "flops_per_token": flops / tokens,
            "over_shortest": ratio([t / (calls * tokens) for t in times], [t / first_tokens for t in seconds[0]]),
        }


def memory(settings: Settings, device: torch.device) -> Row:
    """Measure by how much the forward pass, its output included, raises the peak memory of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        grown, held = pool.submit(_peak_growth, settings, str(device)).result()
    return {
        "case": "memory",
        "pattern": str(DilationPattern.paper()),
        "tokens": settings.memory_length,
        "heads": settings.num_heads,
        "head_dim": settings.head_dim,
        "peak_growth_bytes": grown,
        "qkv_out_bytes": held,
        "growth_over_qkv_out": grown / held,
    }


def _peak_growth(settings: Settings, device_name: str) -> tuple[int, int]:
    device = torch.device(device_name)

    with torch.no_grad():
        small = _tensors(4096, settings, device)[:3]
        dilated_attention(*small, DilationPattern.paper(), is_causal=True)  # libraries load their parts
        q, k, v, _ = _tensors(settings.memory_length, settings, device)
        before = peak_bytes(device, reset=True)
        out = dilated_attention(q, k, v, DilationPattern.paper(), is_causal=True)
    return peak_bytes(device) - before, sum(x.numel() * x.element_size() for x in (q, k, v, out))


def gather(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: DilationPattern) -> list[Gathered]:
    """Copy out by index what each branch lets each head see, whole and ragged segments apart.

    Where all queries attend, those of each phase are a part: of phases before the head's own from the second row on.
    """
    tokens, heads = q.shape[2], q.shape[1]
    positions = torch.arange(tokens, device=q.device)
    parts = []
    for length, rate in pattern.branches:
        whole = tokens // length * length
        for segments in (positions[:whole].view(-1, length), positions[whole:].view(1, -1)):
            for head in range(heads):
                own = pattern.offset(rate, head, heads)
                for phase in range(rate) if pattern.queries == "all" else (own,):
                    q_index = segments[:, phase + rate * (phase < own) :: rate]
                    k_index = segments[:, own::rate][:, : q_index.shape[1]]
                    if q_index.numel():
                        rows = (x.detach()[0, head, q_index].unsqueeze(1) for x in (q, dout))
                        keys = (x.detach()[0, head, k_index].unsqueeze(1) for x in (k, v))
                        parts.append(Gathered(head, q_index, k_index, *rows, *keys))
    return parts


def gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    pattern: DilationPattern,
    gathered: Sequence[Gathered],
    backend: dispatch.Backend = "auto",
) -> None:
    """Compare the op, forward and gradients, with one softmax over the gathered branches, per head, on these tensors.

    Raises:
        GateError: a relative error (Frobenius) above 1e-5 in float32, 2e-2 in half precision.
    """
    out = dilated_attention(q, k, v, pattern, is_causal=True, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected = _expected(q, gathered)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), expected, strict=True):
        error = ((got.float() - want).norm() / want.norm()).item()
        if not error <= tolerance:
            raise GateError(
                f"{name} is off by {error:.1e} (relative) at {q.shape[2]} tokens with {pattern}, backend {backend}; "
                "not timed"
            )


def _expected(q: Tensor, gathered: Sequence[Gathered]) -> list[Tensor]:
    kernel = dispatch.choose("sdpa", q.device, q.dtype, q.shape[3]).repeated
    scale = q.shape[3] ** -0.5
    lses = torch.full((q.shape[1], q.shape[2], 1), -torch.inf, device=q.device)
    results = []
    for part in gathered:
        out, lse = kernel.attend(part.q, part.k, part.v, is_causal=True, scale=scale)
        results.append((part, out[:, 0], lse[:, 0, :, None].float()))
        lses[part.head, part.q_index] = torch.logaddexp(lses[part.head, part.q_index], results[-1][2])
    totals = [torch.zeros(q.shape[1:], device=q.device) for _ in range(4)]
    for part, part_out, lse in results:
        totals[0][part.head, part.q_index] += torch.exp(lse - lses[part.head, part.q_index]) * part_out
    for part, _, _ in results:
        merged_out = totals[0][part.head, part.q_index].to(q.dtype).unsqueeze(1)
        merged_lse = lses[part.head, part.q_index, 0].unsqueeze(1)
        grads = kernel.attend_backward(
            part.dout, part.q, part.k, part.v, merged_out, merged_lse, is_causal=True, scale=scale
        )
        for total, index, grad in zip(totals[1:], (part.q_index, part.k_index, part.k_index), grads, strict=True):
            total[part.head, index] += grad[:, 0]
    return [total.unsqueeze(0) for total in totals]


def _stack(gathered: Sequence[Gathered]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Stack the heads of a branch, so that the bare calls are as few as a kernel allows."""
    groups: dict[tuple[int, ...], list[Gathered]] = {}
    for part in gathered:
        groups.setdefault((*part.q_index.shape, int(part.q_index[0, -1] - part.q_index[0, 0])), []).append(part)
    return [
        tuple(torch.cat([getattr(part, name) for part in parts], 1) for name in ("q", "k", "v", "dout"))  # type: ignore[misc]
        for parts in groups.values()
    ]


def _bare(blocks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], *, backward: bool) -> None:
    for q, k, v, dout in blocks:
        kernel = dispatch.choose("sdpa", q.device, q.dtype, q.shape[3]).repeated
        out, lse = kernel.attend(q, k, v, is_causal=True, scale=q.shape[3] ** -0.5)
        if backward:
            kernel.attend_backward(dout, q, k, v, out, lse, is_causal=True, scale=q.shape[3] ** -0.5)


def _tensors(tokens: int, settings: Settings, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The layout that a model's projections give: (B, T, H, D) in memory, seen as (B, H, T, D).
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (1, tokens, settings.num_heads, settings.head_dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in "qkvo"
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout
