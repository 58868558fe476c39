"""add_noise: alpha[n] * x[n] + sigma[n] * noise[n]."""

from __future__ import annotations

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS, normal
from noise_truth import normals_truth
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops import reference

SHAPES = [(1, 1), (2, 3), (3, 5), (2, 1023), (3, 3, 5, 7), (2, 4, 33, 32), (2, 2, 3, 4, 5)]
SEEDS = torch.tensor([5, -6, 2**40])
STEP, STREAM = 9, 2
BLOCKS = (2, 4, 33, 32)  # more than one block of every kernel
CASES = [
    pytest.param(dtype, noise, shape, layout, id=f"{dtype}-{noise}-{'x'.join(map(str, shape))}-{layout}")
    for dtype in DTYPES
    for noise in ("drawn", *DTYPES)
    for shape in SHAPES
    for layout in LAYOUTS
    if (noise in ("drawn", dtype) or shape == BLOCKS) and (layout == "contiguous" or len(shape) > 3)
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    x = normal(*shape, seed=1, dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    return x, normal(shape[0], seed=2), normal(shape[0], seed=3)


def noised(target: Target, x: Tensor, alpha: Tensor, sigma: Tensor, **options: Tensor | int) -> Tensor:
    with target.forced():
        return ops.add_noise(*target.move((x, alpha, sigma)), **target.move(options)).cpu()


@pytest.mark.parametrize(("dtype", "noise_dtype", "shape", "layout"), CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth(target: Target, dtype: str, noise_dtype: str, shape: tuple[int, ...], layout: str) -> None:
    x, alpha, sigma = inputs(shape, DTYPES[dtype], layout)
    if noise_dtype == "drawn":
        given = {"seeds": SEEDS[: shape[0]], "step": STEP, "stream": STREAM}
        exact = normals_truth(given["seeds"], shape, STEP, STREAM)
        plain = reference.add_noise(x, alpha, sigma, None, given["seeds"], STEP, STREAM)
    else:
        noise = normal(*shape, seed=4, dtype=DTYPES[noise_dtype])
        given, exact = {"noise": noise}, noise.double()
        plain = reference.add_noise(x, alpha, sigma, noise, None, 0, 0)
    result = noised(target, x, alpha, sigma, **given)
    truth = reference.add_noise(x.double(), alpha.double(), sigma.double(), exact, None, 0, 0)
    assert result.dtype == x.dtype
    assert result.stride() == x.stride()
    assert_close_to_truth(result, truth, plain)


@pytest.mark.parametrize("target", TARGETS)
def test_drawn_noise_is_philox_normal(target: Target) -> None:
    x, alpha, sigma = inputs((3, 4, 17, 5), torch.float32)
    zeros, ones = torch.zeros(3), torch.ones(3)
    with target.forced():
        z = ops.philox_normal(SEEDS.to(target.device), x.shape, step=STEP, stream=STREAM).cpu()
    options = {"seeds": SEEDS, "step": STEP, "stream": STREAM}
    assert torch.equal(noised(target, x, zeros, ones, **options), z)
    assert torch.equal(noised(target, x, alpha, sigma, **options), noised(target, x, alpha, sigma, noise=z))


@pytest.mark.parametrize("options", [{"seeds": SEEDS}, {"noise": normal(3, 4, 17, 5, seed=4)}], ids=["drawn", "given"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target, options: dict[str, Tensor]) -> None:
    x, alpha, sigma = inputs((3, 4, 17, 5), torch.float32)
    batch = noised(target, x, alpha, sigma, **options)
    for n in range(3):
        one = {name: value[n : n + 1] for name, value in options.items()}
        assert torch.equal(noised(target, x[n : n + 1], alpha[n : n + 1], sigma[n : n + 1], **one), batch[n : n + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"seeds": SEEDS}, {"noise": normal(3, 8, 64, 64, seed=4)}], ids=["drawn", "given"])
def test_threads_do_not_change_the_bits(many_threads: None, options: dict[str, Tensor], layout: str) -> None:
    x, alpha, sigma = inputs((3, 8, 64, 64), torch.bfloat16, layout)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(noised(NATIVE, x, alpha, sigma, **options))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_inputs() -> None:
    x, alpha, sigma = inputs((2, 6, 5, 8), torch.float32)
    noise = normal(2, 5, 6, 8, seed=4).transpose(1, 2)
    expected = ops.add_noise(x[..., ::2].contiguous(), alpha, sigma, noise=noise[..., ::2].contiguous())
    assert torch.equal(ops.add_noise(x[..., ::2], alpha, sigma, noise=noise[..., ::2]), expected)


def test_empty() -> None:
    assert ops.add_noise(torch.ones(0, 3), torch.ones(0), torch.ones(0), noise=torch.ones(0, 3)).shape == (0, 3)
    assert ops.add_noise(torch.ones(2, 0), torch.ones(2), torch.ones(2), seeds=SEEDS[:2]).shape == (2, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_opcheck(drawn: bool, layout: str) -> None:
    x, alpha, sigma = inputs((2, 3, 4, 5), torch.bfloat16, layout)
    noise, seeds = (None, SEEDS[:2]) if drawn else (torch.ones_like(x), None)
    torch.library.opcheck(torch.ops.fastdiff.add_noise.default, (x, alpha, sigma, noise, seeds, 1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout: str) -> None:
    def forward(x: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
        return 2 * ops.add_noise(x, alpha, sigma, seeds=seeds, stream=2)

    arguments = (*inputs((2, 3, 4, 5), torch.float32, layout), SEEDS[:2])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, forward(*arguments))
    assert compiled.stride() == arguments[0].stride()


def test_gradients_through_the_reference() -> None:
    x, alpha, sigma = inputs((2, 3), torch.float32)
    with fastdiff.use_backend("reference"):
        ops.add_noise(x.requires_grad_(), alpha, sigma, seeds=SEEDS[:2]).sum().backward()
    torch.testing.assert_close(x.grad, alpha[:, None].expand(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x is torch.int64; expected float32, float16"),
        ({"x": torch.tensor(1.0)}, r"x has no dimensions; expected \(N, ...\)"),
        ({"alpha": torch.ones(3)}, r"alpha is torch.float32 of shape \(3,\); expected contiguous float32 \(2,\)"),
        ({"sigma": torch.ones(2, dtype=torch.float16)}, r"sigma is torch.float16 of shape \(2,\); expected contiguous"),
        ({"noise": None}, r"expected exactly one of noise and seeds, got none"),
        ({"seeds": SEEDS[:2]}, r"expected exactly one of noise and seeds, got both"),
        ({"noise": torch.ones(2, 4)}, r"noise has shape \(2, 4\); expected \(2, 3\)"),
        ({"noise": None, "seeds": SEEDS}, r"seeds is torch.int64 of shape \(3,\); expected int64 \(2,\)"),
        ({"sigma": torch.ones(2, device="meta")}, r"sigma is on meta, the first tensor on cpu; move one of them"),
        ({"step": 2**32}, r"step is 4294967296; expected an integer from 0 to 2\^32 - 1"),
        ({"stream": -1}, r"stream is -1; expected"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    arguments = {"x": torch.ones(2, 3), "alpha": torch.ones(2), "sigma": torch.ones(2), "noise": torch.ones(2, 3)}
    arguments |= change
    with pytest.raises(InputError, match="add_noise: " + message):
        ops.add_noise(arguments.pop("x"), arguments.pop("alpha"), arguments.pop("sigma"), **arguments)
