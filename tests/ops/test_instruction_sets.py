"""The CPU kernels compiled for lesser processors: the tests against the truth once more on each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = (
    *("test_philox_normal.py", "test_add_noise.py", "test_group_norm_silu.py"),
    "test_group_norm_silu_second.py",
    *("test_sampler_step.py", "test_sampler_step_guidance.py", "test_sampler_step_kept.py"),
    *("test_guidance_weights.py", "test_dynamic_threshold.py", "test_langevin_step_size.py"),
    *("test_geglu.py", "test_layer_norm_modulate.py"),
    *("test_conv_bias_residual.py", "test_upsample_conv.py"),
    *("test_winograd.py", "test_widened.py"),
)
LESSER = {"AVX2": ("default",), "AVX512": ("default", "avx2")}


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_truth_on_a_lesser_instruction_set(level: str) -> None:
    best = torch.backends.cpu.get_cpu_capability()
    if level not in LESSER.get(best, ()):
        pytest.skip(f"the other tests ran on {best}; {level} is no lesser part of it")
    files = [str(Path(__file__).parent / file) for file in FILES]
    script = (
        f"from fastdiff.ops import native; assert native.capability() == {level.upper()!r}, native.capability()\n"
        f"import pytest; raise SystemExit(pytest.main({[*files, '-x', '-q', '-k', 'native and truth']!r}))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
