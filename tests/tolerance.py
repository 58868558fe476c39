"""The one tolerance rule: at most twice the error of plain PyTorch to the float64 truth, plus one ulp at its scale."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; infinite where one is finite and the other not."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if not torch.equal(actual.isfinite(), truth.isfinite()):
        return float("inf")
    finite = truth.isfinite()
    scale = truth[finite].norm()
    difference = (actual - truth)[finite].norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close_to_truth(actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Holds `actual` to the float64 `truth`, with `plain` as what plain PyTorch gives in the same dtype."""
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error, plain_error = relative_error(actual, truth), relative_error(plain, truth)
    bound = 2.0 * plain_error + torch.finfo(actual.dtype).eps
    assert error <= bound, f"relative error {error:.3e} is over {bound:.3e} = 2 x {plain_error:.3e} + one ulp"
