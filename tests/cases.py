"""Random calls of dilated_attention, drawn by hypothesis."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet import DilationPattern, dilated_attention
from longnet.attention import reference
from longnet.attention.dilated import document_bounds, padding_bounds

ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # conftest asks for determinism to poison memory; not every CUDA kernel has it, and says so.
    pytest.mark.filterwarnings("ignore:.*determinis"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


@dataclass
class Case:
    """The arguments of one call, masks included."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: DilationPattern
    is_causal: bool
    masks: dict[str, Tensor] = field(default_factory=dict)
    sinks: Tensor | None = None

    def dout(self) -> Tensor:
        """Return the gradient that the output receives, rounded to what float16 and bfloat16 both hold."""
        dout = torch.randn(self.q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return (8 * dout).round() / 8

    def magnitudes(self) -> tuple[float, dict[str, Tensor]]:
        """Return the largest logit, and for each output and gradient its terms' absolute values summed, per element."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (self.k, self.v))
        scale = self.q.shape[3] ** -0.5
        logit = (scale * self.q.abs() @ k.abs().mT).max().item()
        bounds = None
        if "padding_mask" in self.masks:
            bounds = padding_bounds(self.masks["padding_mask"])
        elif "cu_seqlens" in self.masks:
            bounds = document_bounds(self.masks["cu_seqlens"], self.k.shape[2])
        # With the identity for values the oracle's output is its probabilities.
        identity = torch.eye(k.shape[2], dtype=torch.float64).expand(*self.k.shape[:3], -1)
        p, _ = reference.attend(
            self.q, self.k, identity, self.pattern, bounds=bounds, is_causal=self.is_causal, scale=scale,
            sinks=self.sinks,
        )  # fmt: skip
        dp = self.dout().abs() @ v.abs().mT
        ds = scale * p * (dp + (p * dp).sum(-1, keepdim=True))
        terms = {"out": p @ v.abs(), "lse": torch.tensor(logit), "dq": ds @ k.abs()}
        if self.sinks is not None:
            terms["dsinks"] = (p * dp).sum((-1, 2, 0) if self.sinks.ndim == 1 else -1)
        for name, term in (("dk", ds.mT @ self.q.abs()), ("dv", p.mT @ self.dout().abs())):
            terms[name] = term.unflatten(1, (-1, group)).sum(2)
        return logit, terms

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """Return out, lse and all gradients of a fixed random projection of out, computed on `device`."""
        # .to keeps the strides; expanded inputs stay expanded.
        q, k, v = (x.to(device=device, dtype=dtype).detach().requires_grad_() for x in (self.q, self.k, self.v))
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        inputs = {"dq": q, "dk": k, "dv": v}
        sinks = None
        if self.sinks is not None:
            inputs["dsinks"] = sinks = self.sinks.to(device=device, dtype=dtype).detach().requires_grad_()
        out, lse = dilated_attention(
            q, k, v, self.pattern, is_causal=self.is_causal, return_lse=True, backend=backend, sinks=sinks, **masks
        )
        grads = torch.autograd.grad(out, tuple(inputs.values()), self.dout().to(device=device, dtype=dtype))
        results = (x.cpu() for x in (out.detach(), lse, *grads))
        return dict(zip(("out", "lse", *inputs), results, strict=True))


@st.composite
def patterns(draw: Any, max_length: int = 24, max_rate: int = 7, min_length: int = 1) -> DilationPattern:
    """Any pattern: rates that do not divide, rates above the length, no rate of 1, all queries, shifts, globals."""
    branch = st.tuples(st.integers(min_length, max_length), st.integers(1, max_rate))
    branches = draw(st.lists(branch, min_size=1, max_size=4, unique=True))
    if draw(st.booleans()) and not any(rate == 1 for _, rate in branches):
        branches.append((draw(st.integers(min_length, max_length)), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DilationPattern(
            *zip(*branches, strict=True),
            head_offsets=draw(st.sampled_from(["mod", "block"])),
            queries=draw(st.sampled_from(["kept", "all"])),
            offset_shift=draw(st.sampled_from([0, 0, 1, 5])),
            global_tokens=draw(st.sampled_from([0, 0, 1, 4, 100])),
        )


@st.composite
def cases(
    draw: Any,
    head_dims: tuple[int, ...] = (1, 3, 8, 16),
    max_tokens: int = 70,
    max_kv_heads: int = 6,
    max_batch: int = 3,
    min_length: int = 1,
) -> Case:
    """Any call: ragged lengths, grouped heads, strides, padding, packing, cached queries, large logits, sinks."""
    tokens = draw(st.integers(1, max_tokens))
    queries = tokens if draw(st.booleans()) else draw(st.integers(1, tokens))
    kv_heads, group = draw(st.integers(1, max_kv_heads)), draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = draw(st.sampled_from(head_dims))
    mask = draw(st.sampled_from(["none", "padding", "packing"]))
    batch = 1 if mask == "packing" else draw(st.integers(1, max_batch))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([1.0, 1.0, 4.0]))

    def tensor(heads: int, length: int) -> Tensor:
        def normal(*shape: int) -> Tensor:
            return sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)

        layout = draw(st.sampled_from(["BHTD", "BTHD", "BTHD", "fused", "expanded", "last"]))
        if layout == "BHTD":
            return normal(batch, heads, length, head_dim)
        if layout == "BTHD":
            return normal(batch, length, heads, head_dim).transpose(1, 2)
        if layout == "fused":  # a slice of one projection, as GPT-2 has it
            return normal(batch, length, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
        if layout == "expanded":
            return normal(batch, 1, length, head_dim).expand(batch, heads, length, head_dim)
        return normal(batch, heads, head_dim, length).transpose(2, 3)  # a last dim with another stride than 1

    masks = {}
    if mask == "padding":
        padding = torch.zeros(batch, tokens, dtype=torch.bool)
        for row in range(batch):
            start = draw(st.integers(0, tokens))
            padding[row, start : draw(st.integers(start, tokens))] = True
        masks["padding_mask"] = padding
    elif mask == "packing":
        edges = draw(st.lists(st.integers(0, tokens), max_size=5))
        masks["cu_seqlens"] = torch.tensor(sorted([0, *edges, tokens]), dtype=torch.int32)
    sinks = draw(st.sampled_from([None, None, (kv_heads * group,), (batch, kv_heads * group, queries)]))
    return Case(
        q=tensor(kv_heads * group, queries),
        k=tensor(kv_heads, tokens),
        v=tensor(kv_heads, tokens),
        pattern=draw(patterns(min_length=min_length)),
        is_causal=draw(st.booleans()),
        masks=masks,
        sinks=None if sinks is None else 2 * torch.randn(sinks, generator=generator, dtype=torch.float64),
    )
