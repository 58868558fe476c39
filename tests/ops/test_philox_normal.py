"""The noise: published vectors of Philox, its normals to a few ulp on every backend, and their statistics."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES
from noise_truth import box_muller, normals_truth
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.kernels.philox import normals
from fastdiff.ops import reference

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words.
PUBLISHED = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SEEDS = torch.tensor([0, 1, -1, 2**62 + 12345678901, -(2**63), 4294967296])
SHAPES = [(1, 1), (2, 3), (6, 5), (3, 1023), (2, 4, 33, 32), (4,)]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def draw(target: Target, seeds: Tensor, shape: tuple[int, ...], **options: object) -> Tensor:
    with target.forced():
        return ops.philox_normal(seeds.to(target.device), shape, **options).cpu()


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_words_in_the_reference(counter: tuple, key: tuple, words: tuple) -> None:
    seed = torch.tensor([signed(key[1] << 32 | key[0])])
    block = torch.tensor([signed(counter[3] << 32 | counter[0])])
    found = reference.philox_words(seed, block, counter[1], counter[2])
    assert tuple(int(word) for word in found) == words


@pytest.mark.parametrize("target", TARGETS)
def test_published_words_in_every_backend(target: Target) -> None:
    words = tuple(torch.tensor([word]) for word in PUBLISHED["zeros"][2])
    values = draw(target, torch.tensor([0]), (1, 4))
    torch.testing.assert_close(values.double(), box_muller(words), rtol=4e-7, atol=0)


def test_header(tmp_path: Path) -> None:
    """The published words, and the functions of one word where they are hardest: at ends, branches and octants."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[-1])
    assert compiler is not None, "the extension was compiled, so there is a compiler"
    near = [0, 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, int(2**31.5), 2**32 - int(2**31.5), int(2**30.5)]
    hard = sorted({(word + shift) % 2**32 for word in near for shift in range(-3, 4)})
    lines = [
        f"  {{ uint32_t a = {c[0]}u, b = {c[1]}u, c = {c[2]}u, d = {c[3]}u; words(a, b, c, d, {k[0]}u, {k[1]}u);"
        ' std::printf("%u %u %u %u\\n", a, b, c, d); }'
        for c, k, _ in PUBLISHED.values()
    ]
    program = tmp_path / "header.cpp"
    program.write_text(
        '#include <cstdio>\n#include "philox.h"\nusing namespace fastdiff::philox;\nint main() {\n'
        + "\n".join(lines)
        + f"\n  const uint32_t hard[] = {{{', '.join(f'{word}u' for word in hard)}}};\n"
        '  for (uint32_t w : hard) { float c, s; cos_sin(w, c, s); std::printf("%a %a %a\\n", radius(w), c, s); }\n}\n'
    )
    executable = tmp_path / "header"
    header = Path(__file__).parents[2] / "csrc"
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{header}", program, "-o", executable], check=True)
    printed = subprocess.run([executable], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [tuple(map(int, line.split())) for line in printed[:3]] == [words for *_, words in PUBLISHED.values()]
    found = torch.tensor([[float.fromhex(value) for value in line.split()] for line in printed[3:]]).double()
    word = torch.tensor(hard)
    turn = word.double() / 2**32 * 2 * math.pi
    radius = torch.sqrt(-2.0 * torch.log((word.double() + 0.5) / 2**32))
    exact = torch.stack([radius, torch.cos(turn), torch.sin(turn)], dim=1)
    torch.testing.assert_close(found, exact, rtol=4e-7, atol=1e-15)


@triton.jit
def draw_four(seed, element, step, stream, out):
    tl.store(out + tl.arange(0, 4), normals(tl.load(seed), tl.load(element), step, stream, 4))


def test_published_words_in_the_triton_kernel() -> None:
    """A whole counter, its high word too, which no tensor of a bearable size reaches."""
    counter, key, words = PUBLISHED["pi"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = torch.tensor([signed(key[1] << 32 | key[0])], device=device)
    element = torch.tensor([4 * (counter[3] << 32 | counter[0])], device=device)
    out = torch.empty(4, device=device)
    draw_four[(1,)](seed, element, counter[1], counter[2], out)
    expected = box_muller(tuple(torch.tensor(word) for word in words))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth(target: Target, dtype: str, shape: tuple[int, ...]) -> None:
    seeds, step, stream = SEEDS[: shape[0]], 7, 2
    values = draw(target, seeds, shape, step=step, stream=stream, dtype=DTYPES[dtype])
    plain = reference.philox_normal(seeds, shape, step, stream, DTYPES[dtype])
    assert values.is_contiguous()
    assert values.dtype == DTYPES[dtype]
    assert_close_to_truth(values, normals_truth(seeds, shape, step, stream), plain)


@pytest.mark.parametrize("target", TARGETS)
def test_each_normal_is_right_to_a_few_ulp(target: Target) -> None:
    seeds, shape = SEEDS[3:4], (1, 8192)
    exact = normals_truth(seeds, shape, 2**32 - 1, 2**32 - 1)
    values = draw(target, seeds, shape, step=2**32 - 1, stream=2**32 - 1)
    ulps = (values.double() - exact).abs() / (exact.abs() * 2.0**-23)
    assert float(ulps.max()) < 6.0


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_depends_on_its_seed_alone(target: Target) -> None:
    seeds, size = SEEDS[:3], 1500
    batch = draw(target, seeds, (3, size))
    alone = torch.cat([draw(target, seeds[n : n + 1], (1, size)) for n in range(3)])
    assert torch.equal(batch, alone)
    assert torch.equal(draw(target, seeds.flip(0), (3, size)).flip(0), batch)
    assert torch.equal(draw(target, seeds, (3, 2 * size + 1))[:, :size], batch)


def test_threads_do_not_change_the_bits(many_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(draw(NATIVE, SEEDS[:3], (3, 20_001)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_moments_and_normality() -> None:
    n = 2**20
    z = ops.philox_normal(torch.tensor([42]), (1, n)).double().flatten()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    normal = torch.special.ndtr(z.sort().values)
    kolmogorov = (normal - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)
    assert float(kolmogorov) < 1.95  # the 0.1 % point of Kolmogorov's distribution
    assert float(z.abs().max()) > 4.5  # the tails are there


def test_steps_streams_seeds_and_neighbours_are_independent() -> None:
    n = 2**18

    def noise(seed: int = 0, **options: int) -> Tensor:
        return ops.philox_normal(torch.tensor([seed]), (1, n), **options).double().flatten()

    z = noise()
    others = [noise(1), noise(2**32), noise(step=1), noise(stream=1), noise(stream=2), z.roll(1), z.roll(2), z.roll(4)]
    for other in others:
        for left, right in ((z, other), (z**2 - 1, other**2 - 1)):
            correlation = float((left * right).mean() / (left.std() * right.std()))
            assert abs(correlation) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: str) -> None:
    torch.library.opcheck(torch.ops.fastdiff.philox_normal.default, (SEEDS[:2], [2, 3, 5], 3, 1, DTYPES[dtype]))


def test_compiles_whole() -> None:
    def scaled(seeds: Tensor) -> Tensor:
        return 2.0 * ops.philox_normal(seeds, (3, 33), step=5)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(SEEDS[:3]), scaled(SEEDS[:3]))


def test_empty() -> None:
    assert ops.philox_normal(SEEDS[:0], (0, 5)).shape == (0, 5)
    assert ops.philox_normal(SEEDS[:2], (2, 0)).shape == (2, 0)


def test_float64_runs_on_the_reference() -> None:
    fastdiff.report(reset=True)
    with pytest.warns(UserWarning, match=r"it writes float32, float16 and bfloat16, not float64"):
        values = ops.philox_normal(SEEDS[:1], (1, 4), dtype=torch.float64)
    assert values.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.tensor([1])}, r"seeds is torch.int64 of shape \(1,\); expected int64 \(2,\), one per sample"),
        ({"seeds": torch.tensor([1.0, 2.0])}, r"seeds is torch.float32 of shape \(2,\)"),
        ({"seeds": torch.arange(4)[::2]}, r"seeds is not contiguous; pass seeds.contiguous\(\)"),
        ({"shape": ()}, r"shape is \(\); expected \(N, ...\)"),
        ({"shape": (2, -1)}, r"shape is \(2, -1\); expected"),
        ({"step": -1}, r"step is -1; expected an integer from 0 to 2\^32 - 1"),
        ({"stream": 2**32}, r"stream is 4294967296; expected"),
        ({"dtype": torch.int32}, r"dtype is torch.int32; expected float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    arguments = {"seeds": torch.tensor([1, 2]), "shape": (2, 3), **change}
    with pytest.raises(InputError, match="philox_normal: " + message):
        ops.philox_normal(arguments.pop("seeds"), arguments.pop("shape"), **arguments)
