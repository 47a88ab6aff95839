"""`longnet bench kernels`: the fused kernels compiled ahead of time, without a GPU: registers, spills, loads."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longnet.attention.backends.triton import blocks

Row = dict[str, Any]

ARCHITECTURES = (80, 90, 100)
HEAD_DIMS = (16, 32, 64, 128, 256)
KERNELS = (
    "attend", "attend, halo", "backward_queries", "backward_queries, halo", "backward_keys", "backward_halo", "decode",
    "combine", "combine, sum",
)  # fmt: skip
QUICK = tuple((90, kernel, torch.bfloat16, 64) for kernel in KERNELS)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

_FLOAT32 = {"ACC", "LSE", "DELTA", "PART", "PART_LSE"}  # pointers to what is not of the tensors' dtype
_INT32 = {"BRANCHES", "OFFSETS", "PLACES", "EDGES", "WORK", "ACTIVE", "COUNTS", "LAYERS", "BASES"}
_INT64 = {"NEXT", "FIRST", "ENTRIES"}


def cases() -> Iterator[tuple[int, str, torch.dtype, int]]:
    """Yield (architecture, kernel, dtype, head dim); float32, which compiles for minutes, at the usual head dims."""
    for architecture, kernel, dtype in itertools.product(ARCHITECTURES, KERNELS, DTYPES):
        for head_dim in (64, 128) if dtype == torch.float32 else HEAD_DIMS:
            yield architecture, kernel, dtype, head_dim


def blocks_of(architecture: int, kernel: str, dtype: torch.dtype, head_dim: int) -> blocks.Blocks:
    """Return how a kernel is cut where it is launched."""
    name, _, has_halo = kernel.partition(", ")
    if name == "combine":
        return blocks.combine_blocks(dtype, head_dim)
    if name == "decode":
        return blocks.decode_blocks(dtype, head_dim)
    if name == "attend":
        return blocks.forward_blocks(dtype, head_dim, architecture, has_halo=bool(has_halo))
    if name == "backward_queries":
        return blocks.query_blocks(dtype, head_dim, architecture, has_halo=bool(has_halo))
    return blocks.key_blocks(dtype, head_dim, architecture)


def compile_one(architecture: int, kernel: str, dtype: torch.dtype, head_dim: int) -> Row:
    """Compile one kernel, causal, as `launch` would launch it, and read what ptxas and the code say.

    Args:
        architecture: 80, 90 or 100.
        kernel: of `KERNELS`.
        dtype: of the tensors.
        head_dim: D.

    Raises:
        RuntimeError: ptxas failed; the message is its own.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from longnet.attention.backends.triton import backward, combine, decode, forward, tables

    name, _, has_halo = kernel.partition(", ")
    function = getattr({"attend": forward, "decode": decode, "combine": combine}.get(name, backward), name)
    sources = tables.EVERYWHERE if has_halo else tables.AT_HAND
    cut = blocks_of(architecture, kernel, dtype, head_dim)
    constants = {
        "CAUSAL": True, "HAS_SINKS": False, "FROM": sources.start, "TO": sources.stop, "STEP": sources.step,
        "ROWS": cut.rows, "KEYS": cut.keys, "D": head_dim, "DP": blocks.padded(head_dim), "UPCAST": False,
        "SOFTMAX": "sum" not in kernel,
    }  # fmt: skip
    names = function.arg_names
    signature = {name: _type_of(name, DTYPES[dtype], constants) for name in names}
    # What a launch finds out by itself: pointers and strides are multiples of 16, so that loads are 16 bytes wide.
    even = [name for name in names if signature[name].startswith("*") or re.fullmatch(r"[a-z]+_[bht]", name)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(
        function,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs=attributes,
    )
    start = time.monotonic()
    made = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": cut.warps, "num_stages": cut.stages},
    )
    seconds = time.monotonic() - start
    code = made.asm["ptx"]
    said = _assemble(code, architecture, Path(triton.__file__).parent / "backends/nvidia/bin")
    wide, narrow = (len(re.findall(pattern, code)) for pattern in _LOADS)
    return {
        "case": "kernel",
        "kernel": kernel,
        "architecture": _target(code),
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        **cut._asdict(),
        "registers": _number(r"Used (\d+) registers", said),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", said),
        "shared_bytes": made.metadata.shared,
        "wide_loads": wide,
        "narrow_loads": narrow,
        "tensor_core": _tensor_core(code),
        "compile_seconds": round(seconds, 1),
        "triton": triton.__version__,
    }


_LOADS = (
    r"ld\.global\S*\.v4\.b32|cp\.async\.cg|ld\.global\S*\.v2\.b64",
    r"ld\.global\S*\.b(?:8|16)\b|ld\.global\S*\.u16",
)


def _type_of(name: str, dtype: str, constants: Row) -> str:
    if name in constants:
        return "constexpr"
    if name in _INT32:
        return "*i32"
    if name in _INT64:
        return "*i64"
    if name in _FLOAT32:
        return "*fp32"
    if (name.isupper() and len(name) > 1 and name != "TQ") or name in ("Q", "K", "V"):
        return f"*{dtype}"
    if name.startswith("scale"):
        return "fp32"
    return "i64" if re.fullmatch(r"[a-z]+_[bht]", name) else "i32"


def _target(code: str) -> str:
    return re.search(r"\.target (\w+)", code)[1]  # type: ignore[index]


def _assemble(code: str, architecture: int, tools: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(code)
        ptxas = tools / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
        run = subprocess.run(
            [ptxas, "-v", f"--gpu-name={_target(code)}", file, "-o", file.with_suffix(".cubin")],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"ptxas for {_target(code)}: {run.stderr.strip()}")
    return run.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _tensor_core(code: str) -> str:
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in code:
            return name
    return "none"
