"""ComfyUI's UniPC: three predictions, and the last level 0.001 where it is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from fastdiff.integrations.k_diffusion.comfyui import plans
from fastdiff.integrations.k_diffusion.comfyui.running import Run, run_of
from fastdiff.integrations.k_diffusion.loop import Rows

LAST_LEVEL = 0.001


@torch.no_grad()
def sample_uni_pc(model, noise, sigmas, extra_args=None, callback=None, disable=False, variant="bh1"):
    """UniPC of order 3, of falling order at the end; variant "bh1" or "bh2". `fastdiff.samplers.unipc` has its rows.

    The callback is told {'x', 'i', 'denoised'}, x / sqrt(1 + s^2) as x: after the first call, after each correction,
    and at the end. One step calls the model once and gives the noise back, but for its scale. ComfyUI also writes 0.001
    over the last of the caller's sigmas; here they stay as they are.
    """
    run = run_of(model, noise, sigmas, extra_args)
    if not run.steps:
        return noise
    if run.levels[-1] == 0.0:
        sigmas = sigmas.clone()
        sigmas[-1] = LAST_LEVEL
        run = run_of(model, noise, sigmas, extra_args)
    if run.steps == 1:
        return _one_step(run, callback)
    plan = plans.unipc(run.levels, sigmas.dtype, variant, callback is not None)
    rows, s_in, x, row = Rows(plan.table, noise.device), noise.new_ones([noise.shape[0]]), noise, 0
    last = run.steps - 1
    for i in trange(run.steps, disable=disable):
        denoised = run.model(x, run.sigmas[i] * s_in, **(extra_args or {}))
        if plan.counts[i] == 2:
            x = rows.apply(row, x, denoised)
            row += 1
        if callback is not None and i < last:
            callback({"x": _normalized(x, run.levels[i]), "i": i, "denoised": denoised})
        x = rows.apply(row, x, denoised)
        row += 1
    if callback is not None:
        callback({"x": _normalized(x, run.levels[-1]), "i": last, "denoised": denoised})
    return x


@torch.no_grad()
def sample_uni_pc_bh2(model, noise, sigmas, extra_args=None, callback=None, disable=False):
    """`sample_uni_pc` with variant "bh2"."""
    return sample_uni_pc(model, noise, sigmas, extra_args, callback, disable, "bh2")


def _one_step(run: Run, callback: Any) -> Tensor:
    denoised = run.model(run.x, run.sigmas[0] * run.x.new_ones([run.x.shape[0]]), **(run.extra_args or {}))
    x = _normalized(run.x, run.levels[0])
    if callback is not None:
        callback({"x": x, "i": 0, "denoised": denoised})
    return x * (1.0 + run.levels[1] ** 2) ** 0.5


def _normalized(x: Tensor, level: float) -> Tensor:
    """As a schedule that keeps the variance has it."""
    return x / (1.0 + level**2) ** 0.5
