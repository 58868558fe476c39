"""The public operators that run before `sampler_step` and give it numbers for each sample: weights and scales."""

from __future__ import annotations

import math

from torch import Tensor

from fastdiff.ops import prepass_checks as checks
from fastdiff.ops.calling import call


def guidance_weights(
    model_output: Tensor,
    weights: Tensor,
    *,
    rescale: float = 0.0,
    perpendicular: bool = False,
    channels: int | None = None,
) -> Tensor:
    """w' = f * w, float32 (N, G), for m = w_0 out_0 + sum over k >= 1 of w_k d_k with d_k = out_k - out_0.

    perpendicular: for k >= 2 only the part of d_k that is perpendicular to d_1 counts, d_k - c_k d_1 with
    c_k = <d_k, d_1> / <d_1, d_1> (0 where d_1 is 0); so w_1 becomes w_1 - sum over k >= 2 of w_k c_k.
    rescale = phi: f = phi std(out_1) / std(m) + 1 - phi, with m after that step and std over all elements of a sample;
    f = 1 where std(m) is 0, as it is for a single element. Without rescale f = 1.

    model_output: (G * N, C, ...), out_k its k-th N samples, G at least 2; float32, float16 or bfloat16, contiguous or
    channels-last. weights: float32 (N, G); (1, g) is classifier-free guidance. channels: how many of the C channels
    count, the first ones; None = all. float32 or better inside, with no cancellation for large means; the bits do not
    depend on the number of threads.
    Errors: InputError for shapes or dtypes that do not fit, and for rescale outside [0, 1].
    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024, section 3.4 (rescale);
    Armandpour et al., "Re-imagine the Negative Prompt Algorithm", 2023 (perpendicular).
    """
    checks.guidance_weights(model_output, weights, rescale, channels)
    return call("guidance_weights", (model_output, weights, float(rescale), perpendicular, channels))


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    *,
    percentile: float,
    maximum: float = math.inf,
    counter: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """(s, b/s, 1), float32 (N, 3), with s = clamp(quantile(|D|, percentile), b, maximum) of each sample.

    D = ax*x + am*m and b, the clip, are those of row `row` (plus `counter[0]`) of the table, m as in `sampler_step`,
    which then makes clamp(D, -s, s) * b/s of D. The quantile is over all elements of a sample and interpolates
    linearly between the two nearest in order, as torch.quantile does; there is no limit on their number.

    x: (N, C, ...) float32, float16 or bfloat16. model_output: (G * N, C or 2C, ...), of which the first C channels
    count; contiguous or channels-last. weights: float32 (N, G), or None: then G is 1, or 2 with the row's guidance;
    a group of weight zero is not read.
    table: (rows, 32) float32. counter: int64 (1,) on x's device, or None. A NaN in D gives NaN.
    Errors: InputError for arguments that do not fit; for a row outside the table or whose clip is not positive and
    finite on the CPU, while on a GPU, where the table cannot be read without waiting for it, the result is NaN.
    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (Imagen),
    2022, section 2.3.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    checks.dynamic_threshold(x, model_output, table, row, counter, weights, percentile, maximum)
    options = (float(percentile), float(maximum))
    return call("dynamic_threshold", (x, model_output, table, row, counter, weights, *options))


def langevin_step_size(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    *,
    snr: float,
    counter: Tensor | None = None,
    weights: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """(inf, e, sqrt(2 e)), float32 (N, 3), with e = 2 (snr |z| / |D|)^2 of each sample.

    D = ax*x + am*m is the score, by row `row` (plus `counter[0]`) of the table, m as in `sampler_step`, which then
    makes x' = x + e D + sqrt(2 e) z. z is noise, or drawn as `philox_normal(seeds, step=row + counter,
    stream=STREAM_STEP)`, as `sampler_step` draws it. Norms are L2, over all elements of a sample; |D| = 0 gives e = 0.
    The paper takes the mean of the norms over the batch. Here each sample has its own, so that it depends on its own
    seed only and not on what it is drawn with.

    x, model_output, table, counter, weights: as in `dynamic_threshold`. noise: x's shape, float32, float16 or bfloat16;
    seeds: int64 (N,); one of them is needed, and noise counts where both are given.
    Errors: InputError for arguments that do not fit; for a row outside the table on the CPU, on a GPU NaN.
    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, algorithm 5.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    checks.langevin_step_size(x, model_output, table, row, counter, weights, noise, seeds, snr)
    return call("langevin_step_size", (x, model_output, table, row, counter, weights, noise, seeds, float(snr)))
