"""Which keys a query attends to: exact rows of the union softmax, and rollouts through all layers.

The weights of all queries are never formed: a row costs O(H·T), and the rollout one backward pass of the op a layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longnet.attention.dilated import attend_within
from longnet.attention.pattern import DilationPattern
from longnet.model.blocks import LongNetAttention
from longnet.model.patterns import backend_of, kind_of, pattern_of
from longnet.model.tails import Tail


def attention_map(model: nn.Module, *inputs: Any, layer: int, query: int | Sequence[int], **kwargs: Any) -> Tensor:
    """Return the attention weights of chosen queries in one layer, exactly: rows of the union softmax.

    A key that three branches see has its weight three times over, as it counts in the output. With tail="torchscale"
    what is missing to 1 went to zero keys.

    Args:
        model: a LongNet of any kind, decoder or encoder, with dilated attention.
        *inputs: what it is called with: token ids; tile embeddings and coordinates; images.
        layer: which, from 0; negative ones count from the last.
        query: a token, or several; of a slide 0 is CLS and tile n is n + 1. Negative ones count from the end.
        **kwargs: what it is called with besides, without a cache.

    Returns:
        (B, H, queries, T), float32 (float64 of a float64 model); padding has no weight, and as a query sees nothing.

    Raises:
        ValueError: another kind of model or attention, a layer or a query that there is not, a branch whose segments
            torchscale's tail shifts.
    """
    attention = _layer(_attentions(model), layer)
    q, k, _, mask, tail = _seen(model, [attention], *inputs, **kwargs)[0]
    pattern = pattern_of(attention.config, attention.layer_idx)
    if tail is not None and tail.shifted:
        raise ValueError(
            f'tail="torchscale" shifts the queries of {tail.shifted} at this length, so that a row belongs to several '
            'queries: load the model with tail="exact"'
        )
    tokens = k.shape[2]
    chosen = torch.as_tensor([query] if isinstance(query, int) else list(query), dtype=torch.int64)
    if not len(chosen) or bool(((chosen < -tokens) | (chosen >= tokens)).any()):
        raise ValueError(f"query must name tokens below {tokens}, got {chosen.tolist()}")
    chosen = (chosen % tokens).to(q.device)
    rows, starts, stops = _runs(mask, len(q), tokens)
    weights = q.new_zeros(*q.shape[:2], len(chosen), tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    for row, start, stop in zip(rows, starts, stops, strict=True):
        own = ((chosen >= start) & (chosen < stop)).nonzero()[:, 0]
        if len(own):
            sinks = None if tail is None else tail.sinks[row][:, chosen[own]]
            weights[row, :, own, start:stop] = _rows(
                q[row][:, chosen[own]], k[row, :, start:stop], chosen[own] - start, pattern,
                scale=attention.scaling, is_causal=attention.is_causal, sinks=sinks,
            ).to(weights.dtype)  # fmt: skip
    return weights


def rollout(model: nn.Module, *inputs: Any, query: int = 0, **kwargs: Any) -> Tensor:
    """Return attention rollout from one query: how much of each token reaches it through all layers (arXiv:2005.00928).

    r ← ½ r + ½ r · mean over heads of A_l, from the last layer to the first; rows of A_l are `attention_map`'s,
    normalised to sum to 1. r · A_l is the gradient of the op's output with respect to its values, so nothing but
    vectors is held.

    Args:
        model: as `attention_map`'s, and so the next.
        *inputs: what it is called with.
        query: a token; of a slide 0 is CLS.
        **kwargs: what it is called with besides.

    Returns:
        (B, T), each row sums to 1.

    Raises:
        ValueError: another kind of model or attention.
    """
    modules = _attentions(model)
    seen = _seen(model, modules, *inputs, **kwargs)
    first = seen[0][0]
    r = torch.zeros(len(first), first.shape[2], dtype=torch.float32, device=first.device)
    r[:, query] = 1
    for attention, layer in reversed(list(zip(modules, seen, strict=True))):
        passed = _pass_back(attention, layer, r)
        mass = passed.sum(1, keepdim=True)
        r = 0.5 * r + 0.5 * torch.where(mass > 0, passed / mass, r)
    return r


def attention_received(model: nn.Module, *inputs: Any, layer: int, **kwargs: Any) -> Tensor:
    """Return how much attention each token receives in one layer, the mean over all queries and heads.

    The column means of the attention matrix, exactly, also with torchscale's tail: the gradient of the op's output with
    respect to its values.

    Args:
        model: as `attention_map`'s, and so the others.
        *inputs: what it is called with.
        layer: which, from 0; negative ones count from the last.
        **kwargs: what it is called with besides.

    Returns:
        (B, T) float32, 0 in the padding; of a slide entry 0 is CLS.

    Raises:
        ValueError: another kind of model or attention, or a layer that there is not.
    """
    attention = _layer(_attentions(model), layer)
    return _received(attention, _seen(model, [attention], *inputs, **kwargs)[0])


@contextlib.contextmanager
def watch_received(model: nn.Module, *, layer: int) -> Iterator[Callable[[], Tensor]]:
    """Watch a layer in a forward pass that is made anyway; outside inference mode, whose tensors have no gradients.

    Args:
        model: as `attention_map`'s.
        layer: which, from 0; negative ones count from the last.

    Yields:
        A function that returns, once a pass was made, what `attention_received` would of its inputs.

    Raises:
        ValueError: another kind of model or attention, or a layer that there is not.
    """
    attention = _layer(_attentions(model), layer)
    with _noted([attention]) as found:
        yield lambda: _received(attention, found[id(attention)])


def _received(attention: LongNetAttention, seen: "_Seen") -> Tensor:
    r = torch.zeros(len(seen[0]), seen[0].shape[2], dtype=torch.float32, device=seen[0].device)
    for row, start, stop in zip(*_runs(seen[3], len(r), r.shape[1]), strict=True):
        r[row, start:stop] = 1 / max(1, stop - start)
    return _pass_back(attention, seen, r)


def _pass_back(attention: LongNetAttention, seen: "_Seen", r: Tensor) -> Tensor:
    # r · mean over heads of A, (B, T).
    q, k, v, mask, tail = seen
    values = torch.zeros_like(v).requires_grad_(True)
    with torch.enable_grad():
        if tail is None:
            out = attend_within(
                q, k, values, pattern_of(attention.config, attention.layer_idx),
                bounds=getattr(mask, "bounds", None), is_causal=attention.is_causal, scale=attention.scaling,
                backend=backend_of(attention.config),
            )[0]  # fmt: skip
        else:
            out = tail.attend(q, k, values, scale=attention.scaling)
        weight = torch.zeros_like(out)
        weight[..., 0] = r[:, None].to(out.dtype) / out.shape[1]
        (reached,) = torch.autograd.grad(out, values, weight)
    return reached[..., 0].float().sum(1)


def _layer(modules: Sequence[LongNetAttention], layer: int) -> LongNetAttention:
    if not -len(modules) <= layer < len(modules):
        raise ValueError(f"layer must be below the model's {len(modules)}, got {layer}")
    return modules[layer]


def _attentions(model: nn.Module) -> list[LongNetAttention]:
    modules = [module for module in model.modules() if isinstance(module, LongNetAttention)]
    if not modules or kind_of(modules[0].config) != "dilated":
        raise ValueError(
            f"a LongNet with dilated attention is expected, got {type(model).__name__}"
            + (f' with "{modules[0].config._attn_implementation}"' if modules else "")
        )
    return modules


_Seen = tuple[Tensor, Tensor, Tensor, Any, Tail | None]


@torch.no_grad()
def _seen(model: nn.Module, modules: Sequence[LongNetAttention], *inputs: Any, **kwargs: Any) -> list[_Seen]:
    if modules[0].is_causal:
        kwargs.setdefault("use_cache", False)
    was_training = model.training
    model.train(mode=False)
    try:
        with _noted(modules) as found:
            model(*inputs, **kwargs)
    finally:
        model.train(mode=was_training)
    return [found[id(module)] for module in modules]


@contextlib.contextmanager
def _noted(modules: Sequence[LongNetAttention]) -> Iterator[dict[int, _Seen]]:
    # q, k, v, mask and tail as they reach these layers in the last forward pass.
    found: dict[int, _Seen] = {}

    @torch.no_grad()
    def note(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options["cache"] is not None:
            raise ValueError("attention maps are of whole sequences: leave out the cache")
        if options.get("cu_seq_lens_q") is not None:
            raise ValueError("attention maps are of one sequence a row: leave out cu_seq_lens_q")
        q, k, v = module.project(*args, options["rotations"])  # type: ignore[operator]
        found[id(module)] = (q, k, v, options["attention_mask"], options.get("tail"))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _runs(mask: Any, rows: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    bounds = getattr(mask, "bounds", None)
    if bounds is None:
        return list(range(rows)), [0] * rows, [tokens] * rows
    row, start, stop = bounds.unbind(1)
    return row.tolist(), start.tolist(), stop.tolist()


def _rows(
    q_HND: Tensor,
    k_GTD: Tensor,
    positions: Tensor,
    pattern: DilationPattern,
    *,
    scale: float,
    is_causal: bool,
    sinks: Tensor | None,
) -> Tensor:
    # (H, N, T)
    heads, kv_heads, tokens = len(q_HND), len(k_GTD), k_GTD.shape[1]
    keys = torch.arange(tokens, device=q_HND.device)
    count = torch.zeros(kv_heads, len(positions), tokens, device=q_HND.device)
    for length, rate, rows, is_dense in pattern.all_branches:
        same = (positions // length)[:, None] == keys // length
        if is_causal:
            same = same & (keys <= positions[:, None])
        for head in range(kv_heads):
            offset = pattern.offset(rate, head, kv_heads)
            sees = (positions % length % rate == offset) | is_dense
            kept = (keys % length % rate == offset) & (keys % length // rate < rows)
            count[head] += same & kept & sees[:, None]
    group = heads // kv_heads
    dtype = torch.promote_types(q_HND.dtype, torch.float32)
    scores = (q_HND.to(dtype) * scale) @ k_GTD.to(dtype).repeat_interleave(group, 0).mT
    scores = scores + count.log().repeat_interleave(group, 0).to(dtype)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype))
    return torch.where(lse[..., None] == -torch.inf, 0, (scores - lse[..., None]).exp())
