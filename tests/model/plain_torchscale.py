"""torchscale's models written out in plain PyTorch with dense masks, from their formulas: oracles in any float dtype.

Weights are a dictionary under torchscale's names, branches are (segment length, dilation rate). Nothing of `longnet` is
used; what is written here is itself compared with what torchscale computed (tests/model/torchscale).
"""

import math
from functools import partial

import torch
from torch.nn import functional


def causal(q, k, v, branches):
    """Attend to earlier tokens: one dense softmax, in which a key counts once for each branch that shows it."""
    heads, tokens = q.shape[1:3]
    position = torch.arange(tokens)
    count = torch.zeros(heads, tokens, tokens, dtype=q.dtype)
    for length, rate in branches:
        for head in range(heads):
            kept = position % length % rate == head // math.ceil(heads / rate)
            count[head] += kept[:, None] & kept & (position[:, None] // length == position // length)
    weights = (q @ k.mT * q.shape[3] ** -0.5).exp() * count.tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def as_trained(q, k, v, branches, bounds=None):
    """Attend both ways as encoders were trained: padded segments, zero keys, results r·⌈w/r⌉ apart."""
    out = torch.zeros_like(q)
    heads = q.shape[1]
    for row, start, stop in [(row, 0, q.shape[2]) for row in range(len(q))] if bounds is None else bounds:
        tokens = stop - start
        for head in range(heads):
            logits, values = [], []
            for length, rate in branches:
                segment, offset = min(length, tokens), head // math.ceil(heads / rate)
                filled = math.ceil(segment / rate) * rate
                segments = math.ceil(tokens / segment)

                def lay_out(
                    x, segment=segment, filled=filled, segments=segments, row=row, head=head, start=start, stop=stop
                ):
                    x = functional.pad(x[row, head, start:stop], (0, 0, 0, segments * segment - (stop - start)))
                    return functional.pad(x.unflatten(0, (segments, segment)), (0, 0, 0, filled - segment))

                queries, keys, vals = lay_out(q), lay_out(k)[:, offset::rate], lay_out(v)[:, offset::rate]
                scores = queries @ keys.mT * q.shape[3] ** -0.5
                kept = torch.arange(filled) % rate == offset
                scores = scores.masked_fill(~kept[:, None], -math.inf).flatten(0, 1)[:tokens]
                logits.append(scores)
                values.append(vals.repeat_interleave(filled, 0)[:tokens])
            p = torch.cat(logits, 1).softmax(1)
            out[row, head, start:stop] = torch.einsum("tk,tkd->td", p, torch.cat(values, 1))
    return out


def decoder_lm(weights, ids, heads, branches, *, alpha=1.0, normalize_before=True, scale=1.0):
    """Return logits (B, T, V) and the states (L + 1, B, T, E) of a causal language model, before the last LayerNorm."""
    x = scale * weights["embed_tokens.weight"][ids]
    if "embed_positions.weight" in weights:
        x = x + weights["embed_positions.weight"][2 : 2 + ids.shape[1]]
    states = _layers(
        x, weights, "layers", heads, partial(causal, branches=branches), alpha=alpha, is_before=normalize_before
    )
    x = states[-1]
    if normalize_before:  # behind post-LayerNorm layers there is none
        x = _norm(x, weights, "layer_norm")
    head = weights.get("output_projection.weight", weights["embed_tokens.weight"])
    return x @ head.T, torch.stack(states)


def slide_encoder(weights, tiles, coords, heads, branches, *, tile_size=256):
    """Return the states (L + 1, B, N + 1, E) of a slide encoder, CLS first, before any LayerNorm."""
    x = _linear(tiles, weights, "patch_embed.proj")
    width = x.shape[2]
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for axis in (1, 0):
        angles = (coords[..., axis, None] / tile_size).floor().double() * frequencies
        parts += [angles.sin(), angles.cos()]
    x = x + torch.cat(parts, -1).float().to(x.dtype)  # their table is float32
    x = torch.cat([weights["cls_token"].expand(len(x), 1, width), x], 1)
    return torch.stack(_layers(x, weights, "encoder.layers", heads, partial(as_trained, branches=branches)))


def embeddings_of(weights, states):
    """Return pooled and CLS (B, E), and the tiles in context (B, N, E), of a slide encoder's last states."""
    x = _norm(states, weights, "encoder.layer_norm")
    pooled, cls = pools_of(weights, x)
    return pooled, cls, x[:, 1:]


def pools_of(weights, states):
    """Return the mean over tiles and the CLS token's (B, E) of a slide encoder's states, each behind `norm`."""
    return tuple(_norm(x, weights, "norm", eps=1e-6) for x in (states[:, 1:].mean(1), states[:, 0]))


def _layers(x, weights, prefix, heads, attend, *, alpha=1.0, is_before=True):
    states = [x]
    while f"{prefix}.{len(states) - 1}.ffn.fc1.weight" in weights:
        layer = f"{prefix}.{len(states) - 1}"
        for norm, sublayer in (
            ("self_attn_layer_norm", partial(_attention, heads=heads, attend=attend)),
            ("final_layer_norm", _feed_forward),
        ):
            before = _norm(x, weights, f"{layer}.{norm}") if is_before else x
            x = alpha * x + sublayer(before, weights, layer)
            x = x if is_before else _norm(x, weights, f"{layer}.{norm}")
        states.append(x)
    return states


def _attention(x, weights, layer, *, heads, attend):
    q, k, v = (
        _linear(x, weights, f"{layer}.self_attn.{name}_proj").unflatten(2, (heads, -1)).transpose(1, 2)
        for name in "qkv"
    )
    x = attend(q, k, v).transpose(1, 2).flatten(2)
    if f"{layer}.self_attn.inner_attn_ln.weight" in weights:
        x = _norm(x, weights, f"{layer}.self_attn.inner_attn_ln")
    return _linear(x, weights, f"{layer}.self_attn.out_proj")


def _feed_forward(x, weights, layer):
    x = functional.gelu(_linear(x, weights, f"{layer}.ffn.fc1"))
    if f"{layer}.ffn.ffn_layernorm.weight" in weights:
        x = _norm(x, weights, f"{layer}.ffn.ffn_layernorm")
    return _linear(x, weights, f"{layer}.ffn.fc2")


def _norm(x, weights, name, *, eps=1e-5):
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _linear(x, weights, name):
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
