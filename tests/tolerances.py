"""Every tolerance of the tests. Loosening one needs a reason in the CHANGELOG."""

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0  # times the error of plain PyTorch in the same dtype, against float64
GRADIENT_FACTOR = 3.0
IN_TF32 = 2.0  # times those: the memory-efficient kernel makes a product of float32 of three in TF32
FLOAT64 = 1e-11  # absolute, unit-variance inputs
TORCHSCALE = 3e-6  # float32 output of another implementation
SAME_FLOAT32 = 2e-6  # the same softmax along two paths in float32


def factor_of(name: str, *, in_tf32: bool = False) -> float:
    """Return how many times plain PyTorch's error, on a CPU, an output or gradient may have."""
    factor = FORWARD_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
    return factor * IN_TF32 if in_tf32 else factor


def assert_as_good_as_plain(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float, floor: Tensor | None = None
) -> None:
    """Assert that `got` errs at most `factor` times as much as plain PyTorch in the same dtype.

    Where plain PyTorch happens to be exact, `floor` is allowed: four roundings of the largest value if not given.
    """
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(got), finite), f"{name} is finite elsewhere than the oracle"
    if not finite.any():
        return
    if floor is None:
        floor = 4 * torch.finfo(plain.dtype).eps * exact[finite].abs().max()
    allowed = floor.expand_as(exact)[finite]
    exact = exact[finite]
    error = (got.double()[finite] - exact).abs()
    plain_error = (plain.double()[finite] - exact).abs().max()
    allowed = allowed.clamp(min=factor * plain_error.item())
    assert (error <= allowed).all(), f"{name} errs by {error.max():.2e}, plain PyTorch by {plain_error:.2e}"


def rounding_floor(dtype: torch.dtype, largest_logit: float, magnitude: Tensor) -> Tensor:
    """Return the rounding error that a sum of terms weighted by p = exp(s − lse) cannot avoid.

    p inherits the rounding of s: |s| roundings of the accumulator's dtype. The terms, which may cancel, are each
    rounded in the tensors' dtype; `magnitude` is the sum of their absolute values.
    """
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 4 * magnitude * (torch.finfo(dtype).eps + accumulator * largest_logit)
