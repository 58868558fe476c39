"""The corrector's step of a whole batch, against its formula in float64."""

import pytest
import torch
from tolerance import assert_close_to_truth

import fastdiff
from fastdiff import ops

SHAPES = [(1, 4, 64, 64), (3, 2, 6, 6), (2, 1), (1, 1, 1, 1), (5, 1027), (2, 3, 33, 65), (3,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SNR = 0.16


def specified(x, score, noise, snr=SNR):
    of_noise, of_score = (value.reshape(len(value), -1).norm(dim=1).mean() for value in (noise, score))
    e = 2.0 * (snr * of_noise / of_score) ** 2
    return x + e * score + (2.0 * e).sqrt() * noise


def inputs(shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    x, score, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    return x.to(dtype), (scale * score).to(dtype), noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, dtype):
    for scale in (1.0, 300.0, 1e-3):
        given = inputs(shape, dtype, scale)
        found = ops.langevin_correct(*given, snr=SNR)
        assert found.dtype == torch.float32
        truth = specified(*(value.double() for value in given))
        assert_close_to_truth(found, truth, specified(*(value.float() for value in given)))


def test_any_layout_and_threads(many_threads):
    x, score, noise = inputs((3, 8, 128, 64))
    expected = ops.langevin_correct(x, score, noise, snr=SNR)
    last = [value.to(memory_format=torch.channels_last) for value in (x, score, noise)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.langevin_correct(x, score, noise, snr=SNR), expected)
        assert torch.equal(ops.langevin_correct(*last, snr=SNR), expected)


def test_no_score():
    """As PyTorch: infinitely long steps to nowhere."""
    x, score, noise = inputs((2, 4, 5))
    found = ops.langevin_correct(x, 0.0 * score, noise, snr=SNR)
    assert torch.equal(found.isnan(), specified(x, 0.0 * score, noise).isnan())


def test_calls_that_are_left_to_others():
    x, score, noise = inputs((2, 4, 5))
    assert ops.langevin_correct(x.double(), score, noise, snr=SNR) is None
    assert ops.langevin_correct(x, score[:1], noise, snr=SNR) is None
    assert ops.langevin_correct(x[:0], score[:0], noise[:0], snr=SNR) is None
    assert ops.langevin_correct(x.to("meta"), score, noise, snr=SNR) is None
    recorded = score.clone().requires_grad_()
    assert ops.langevin_correct(x, recorded, noise, snr=SNR) is None
    with torch.no_grad():
        assert ops.langevin_correct(x, recorded, noise, snr=SNR) is not None
    with fastdiff.use_backend("reference"):
        assert ops.langevin_correct(x, score, noise, snr=SNR) is None
