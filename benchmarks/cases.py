"""What is measured: every operator at its shapes, and the whole sampling loop."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.models.rewrites import names


@dataclass(frozen=True)
class Case:
    """One thing that several contenders do.

    operator: a registered operator, "torch_normal", "drop_in" for a scheduler's step through diffusers' interface,
    "network" for an accelerated network, "compiled" for one beside torch.compile, "first_call" for one in a process of
    its own, "rewrite" for one of its rewrites, or "sampling" for the whole loop. variant:
    which kind of call; the builders in `operators`, `drop_in`, `accelerated` and `sampling` know the names. shape: of
    the main input; attention (B, H, Lq, D). quick: measured by `--quick` too. extra: only measured where
    a filter names its operator, and not among what the README's results have to hold.
    """

    operator: str
    variant: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    quick: bool = False
    extra: bool = False

    @property
    def name(self) -> str:
        return "/".join((self.operator, self.variant, "x".join(map(str, self.shape)), self.dtype))


DTYPES = ("float32", "bfloat16")
LATENTS = ((1, 4, 64, 64), (2, 4, 128, 128))
STEPS = ("ddim", "dpmpp_2m", "unipc")
NORMS = ((4, 256, 32, 32), (2, 640, 32, 32), (2, 320, 64, 64))
LAYOUTS = ("contiguous", "channels_last")
JOINED_NORMS = ((2, 640, 64, 64), (2, 960, 64, 64), (2, 960, 32, 32), (2, 1920, 16, 16))
HEADS = ((2, 8, 1024, 40), (2, 8, 256, 80))
ATTENTIONS = ("self", "masked", "cross77")
NOISED = (16, 4, 64, 64)
NOISE = ("given", "seeds")
SAMPLES = ((2, 4, 128, 128), (2, 3, 64, 64))
PREPASSES = (
    *(("guidance_weights", kind) for kind in ("rescaled", "perpendicular")),
    ("dynamic_threshold", "quantile"),
    *(("langevin_step_size", noise) for noise in NOISE),
)
CONVOLVED = ((4, 256, 16, 16), (2, 640, 32, 32), (1, 512, 64, 64))
UPSAMPLED = ((1, 64, 32, 32), (2, 640, 16, 16), (1, 256, 64, 64))
NORMALS = ((1, 4, 64, 64), (8, 4, 128, 128))
GATED = ((2, 4096, 2560), (2, 256, 10240))
TOKENS = {"residual": ((2, 4096, 320), (2, 1024, 640)), "modulated": ((2, 256, 1152),)}
SCHEDULERS = (
    *("ddim", "ddpm", "euler", "euler_ancestral", "flow_euler", "heun", "lms", "pndm", "ipndm"),
    *("dpmpp_2m", "dpmpp_3m", "unipc", "deis"),
    *("ddim_inverse", "kdpm2", "kdpm2_ancestral", "dpm_sde", "dpmpp_2s", "dpmpp_2m_inverse", "sa_solver", "lcm", "tcd"),
    *("consistency", "flow_heun", "edm_euler", "edm_dpmpp_2m", "unclip", "repaint"),
    *("score_sde_predict", "score_sde_correct"),
)
IMAGES, LATENT = ((1, 3, 32, 32), (4, 3, 32, 32), (16, 3, 32, 32)), (1, 4, 32, 32)
NETWORKS = (*(("cifar", shape) for shape in IMAGES), ("sd15", (2, 4, 32, 32)), ("decoder", LATENT))
FROZEN = (("cifar", "bfloat16"),)
"""What torch.compile compiles a second time, with the weights as constants: a minute each."""
REWRITES = {
    "unit_scale": ("small_unet", (2, 4, 32, 32)),
    "channels_last": ("small_decoder", (1, 4, 24, 24)),
    "group_norm_silu": ("small_decoder", (1, 4, 24, 24)),
    "geglu": ("small_unet", (2, 4, 32, 32)),
    "add_layer_norm": ("small_unet", (2, 4, 32, 32)),
    "upsample_conv": ("small_decoder", (1, 4, 24, 24)),
    "text_cache": ("small_unet", (2, 4, 8, 8)),
    "time_cache": ("tiny_unet", (1, 3, 16, 16)),
    "modulation_cache": ("small_dit", (2, 4, 16, 16)),
    "sampler_step": ("tiny_step", (1, 3, 16, 16)),
    "split_skip": ("small_unet", (2, 4, 32, 32)),
    "folded_bias": ("small_decoder", (1, 4, 24, 24)),
    "folded_residual": ("small_decoder", (1, 4, 24, 24)),
    "qkv": ("small_dit", (2, 4, 16, 16)),
    "arena": ("small_decoder", (1, 4, 24, 24)),
    "prepacked": ("small_unet", (2, 4, 16, 16)),
    "winograd": ("small_decoder", (1, 4, 24, 24)),
}
"""A network and a size at which there is much of what each rewrite changes."""
LOOPS = ("dpmpp_2m-20", "ddim-50")
LOOP_SHAPE = (4, 1, 28, 28)

CASES = (
    *(
        Case("sampler_step", step, shape, dtype, quick=(shape, dtype) == (LATENTS[0], "float32"))
        for step in STEPS
        for shape in LATENTS
        for dtype in DTYPES
    ),
    *(
        Case("group_norm_silu", layout, shape, dtype, quick=(shape, dtype) == (NORMS[0], "float32"))
        for shape in NORMS
        for layout in LAYOUTS
        for dtype in DTYPES
    ),
    *(
        Case("group_norm_silu", f"{layout}_of_two", shape, dtype)
        for shape in JOINED_NORMS
        for layout in LAYOUTS
        for dtype in DTYPES
    ),
    *(
        Case("attention", kind, shape, dtype, quick=shape == HEADS[1])
        for kind in ATTENTIONS
        for shape in HEADS
        for dtype in DTYPES
    ),
    *(Case("add_noise", noise, NOISED, dtype, quick=dtype == "float32") for noise in NOISE for dtype in DTYPES),
    *(Case("philox_normal", "fill", NOISED, dtype, quick=dtype == "float32") for dtype in DTYPES),
    *(
        Case(operator, variant, shape, dtype, quick=(shape, dtype) == (SAMPLES[1], "float32"))
        for operator, variant in PREPASSES
        for shape in SAMPLES
        for dtype in DTYPES
    ),
    *(
        Case("geglu", "exact", shape, dtype, quick=(shape, dtype) == (GATED[1], "float32"))
        for shape in GATED
        for dtype in DTYPES
    ),
    *(
        Case("layer_norm_modulate", kind, shape, dtype, quick=(shape, dtype) == (shapes[-1], "float32"))
        for kind, shapes in TOKENS.items()
        for shape in shapes
        for dtype in DTYPES
    ),
    *(
        Case("conv_bias_residual", layout, shape, dtype, quick=(shape, dtype) == (CONVOLVED[0], "bfloat16"))
        for shape in CONVOLVED
        for layout in LAYOUTS
        for dtype in DTYPES
    ),
    *(
        Case("upsample_conv", layout, shape, dtype, quick=(shape, dtype) == (UPSAMPLED[0], "bfloat16"))
        for shape in UPSAMPLED
        for layout in LAYOUTS
        for dtype in DTYPES
    ),
    *(Case("torch_normal", "fill", shape, dtype) for shape in NORMALS for dtype in DTYPES),
    *(Case("drop_in", scheduler, shape) for scheduler in SCHEDULERS for shape in NORMALS),
    *(Case("network", network, shape, dtype) for network, shape in NETWORKS for dtype in DTYPES),
    # Not in a run without a filter: each takes a minute or more to compile.
    *(Case("compiled", network, shape, dtype, extra=True) for network, shape in NETWORKS for dtype in DTYPES),
    *(Case("first_call", network, shape, dtype) for network, shape in NETWORKS for dtype in DTYPES),
    *(
        Case("rewrite", f"{rewrite}-{REWRITES[rewrite][0]}", REWRITES[rewrite][1], dtype)
        for rewrite in names()
        for dtype in DTYPES
    ),
    *(Case("sampling", loop, LOOP_SHAPE, dtype) for loop in LOOPS for dtype in DTYPES),
)


def select(pattern: str | None, *, quick: bool) -> list[Case]:
    """The cases whose name contains one of the words of `pattern` (separated by commas), all without one."""
    words = None if pattern is None else [word for word in pattern.split(",") if word]
    return [
        case
        for case in CASES
        if (case.quick or not quick)
        and (words is None or any(word in case.name for word in words))
        and (not case.extra or (words is not None and any(case.operator in word for word in words)))
    ]
