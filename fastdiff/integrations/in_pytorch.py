"""A row of a table in plain PyTorch, for what the operator has no kernel for: gradients, and float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import StepOutput, prepass_reference, reference
from fastdiff.samplers.table import StepTable


def sampler_step(
    table: StepTable,
    row: int,
    x: Tensor,
    model_output: Tensor,
    *,
    anchor: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    new_history: bool = False,
    new_anchor: bool = False,
    scales: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    mask: Tensor | None = None,
) -> StepOutput:
    """`ops.sampler_step` by its specification: differentiable, and with the table's own float64 coefficients, which are
    on the host already, so that nothing waits for a device."""
    coefficients = torch.tensor(table.rows[row : row + 1])
    if table.threshold is not None and table.uses[row].data:
        percentile, maximum = table.threshold.percentile, table.threshold.maximum
        scales = prepass_reference.dynamic_threshold(x, model_output, coefficients, 0, None, None, percentile, maximum)
    hist1, hist2, hist3 = [*history, None, None, None][:3]
    outputs = reference.sampler_step(
        x,
        model_output,
        coefficients,
        row=0,
        counter=None,
        anchor=anchor,
        hist1=hist1,
        hist2=hist2,
        hist3=hist3,
        noise=noise,
        seeds=None,
        weights=None,
        scales=scales,
        known=known,
        known_noise=known_noise,
        mask=mask,
        new_history=new_history,
        new_anchor=new_anchor,
        copies=None,
        model_input=None,
    )
    return StepOutput(outputs[0], outputs[1] if new_history else None, outputs[2] if new_anchor else None, None)
