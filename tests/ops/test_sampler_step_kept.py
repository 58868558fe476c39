"""sampler_step where a mask keeps an image."""

from __future__ import annotations

import math

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS
from step_rows import EVERYWHERE, MASKS, REFERENCE, ROW, ROWS, SEEDS, arguments, check, extended, mask_of, step

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL
from fastdiff.ops.row import KNOWN

SHAPES = [(1,), (3,), (2, 1), (3, 5), (1, 3, 341), (3, 2, 5, 7), (2, 4, 33, 32), (1, 2, 3, 4, 5)]


def kept(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    row: str = "ddim",
    *,
    known: tuple[float, float] = (0.6, -0.8),
    **options: object,
) -> dict:
    given = extended(arguments(ROWS[row], shape, guided=True), "kept", **options)
    given["table"][ROW, KNOWN] = torch.tensor(known)
    return given


def plain(target: Target, given: dict) -> ops.StepOutput:
    """The same step without the image."""
    return step(target, {n: v for n, v in given.items() if n not in ("known", "known_noise", "mask")})


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_masks(target: Target, shape: tuple[int, ...], mask: str, drawn: bool) -> None:
    check(target, kept(shape, mask=mask, drawn=drawn))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_dtypes(target: Target, state: str, dtype: str) -> None:
    given = arguments(ROWS["everything"], (2, 3, 5, 7), state=state, model=dtype, drawn=False)
    check(target, extended(given, "kept", drawn=False))


@pytest.mark.parametrize("row", ["euler_ancestral", "unipc"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_rows(target: Target, row: str) -> None:
    """History and anchor are those of the step, only x' and the model input have the image."""
    given = kept(row=row)
    out, without = check(target, given), plain(target, given)
    for left, right in ((out.history, without.history), (out.anchor, without.anchor)):
        assert (left is None and right is None) or torch.equal(left, right)
    assert torch.equal(out.model_input[:2], torch.tensor(0.2 if row == "euler_ancestral" else 0.7) * out.x)


def test_the_formula() -> None:
    """The specification against the formula written out."""
    given = {
        n: v.double() if n in ("x", "model_output", "known", "known_noise") else v for n, v in kept(drawn=False).items()
    }
    reference = REFERENCE
    made, (signal, noise) = plain(reference, given).x, given["table"][ROW, KNOWN].double()
    mask = given["mask"].double()
    expected = mask * made + (1 - mask) * (signal * given["known"] + noise * given["known_noise"])
    torch.testing.assert_close(step(reference, given).x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 33, 32)], ids=str)
@pytest.mark.parametrize("target", EVERYWHERE)
def test_what_does_not_count_does_not_leak(target: Target, shape: tuple[int, ...]) -> None:
    """Where the mask is 1 the sample is what it is without the image, and 0 keeps NaN of the sample away."""
    given = kept(shape, mask="elements", drawn=False)
    mask = given["mask"]
    expected = plain(target, given).x
    for name in ("known", "known_noise"):
        given[name] = torch.where(mask == 1.0, math.nan, given[name])
    given["x"] = torch.where(mask == 0.0, math.nan, given["x"])
    out = step(target, given)
    assert out.x.isfinite().all()
    assert out.model_input.isfinite().all()
    assert torch.equal(out.x[mask == 1.0], expected[mask == 1.0])
    image = torch.tensor(0.6) * given["known"] + torch.tensor(-0.8) * given["known_noise"]
    torch.testing.assert_close(out.x[mask == 0.0], image[mask == 0.0])


@pytest.mark.parametrize("target", EVERYWHERE)
def test_a_mask_of_ones_changes_no_bit(target: Target) -> None:
    given = kept((2, 4, 33, 32), mask="whole")
    given |= {"mask": torch.ones(1, 1, 33, 32), "known": torch.full((2, 4, 33, 32), math.nan)}
    for left, right in zip(step(target, given), plain(target, given), strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("target", EVERYWHERE)
def test_drawn_noise_is_the_starting_noise(target: Target) -> None:
    """Of every row: the counter's step is 0."""
    given = kept((3, 4, 17, 5), known=(0.0, 1.0))
    given |= {"mask": torch.zeros(1, 1, 17, 5), "known": torch.full((3, 4, 17, 5), math.nan)}
    with target.forced():
        noise = ops.philox_normal(SEEDS.to(target.device), (3, 4, 17, 5), stream=STREAM_INITIAL).cpu()
    assert torch.equal(step(target, given).x, noise)


@pytest.mark.parametrize("target", TARGETS)
def test_given_noise_of_the_step_leaves_the_images_drawn(target: Target) -> None:
    given = extended(arguments(ROWS["euler_ancestral"], (2, 3, 5, 7), drawn=False), "kept")
    assert "noise" in given
    check(target, given)


@pytest.mark.parametrize("target", EVERYWHERE)
def test_an_image_without_noise_needs_none(target: Target) -> None:
    given = kept(known=(1.0, 0.0))
    given |= {"seeds": None, "mask": torch.zeros(1, 1, 5, 7)}
    assert torch.equal(step(target, given).x, given["known"])
    given["known_noise"] = torch.full((2, 3, 5, 7), math.nan)
    assert torch.equal(step(target, given).x, given["known"])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_missing_noise_is_an_error(backend: str) -> None:
    message = "row 3 of the table uses known_noise, which was not given; pass known_noise or seeds$"
    with pytest.raises(InputError, match=message):
        step(Target(backend, "cpu"), kept() | {"seeds": None})


@pytest.mark.parametrize("target", TARGETS[1:])
def test_missing_noise_gives_nan_on_a_gpu(target: Target) -> None:
    given = kept() | {"seeds": None}
    assert torch.equal(step(target, given).x.isnan(), (given["mask"] != 1.0).expand(2, 3, 5, 7))


def test_strided_inputs() -> None:
    given = kept(drawn=False, mask="elements")
    given["mask"] = mask_of((2, 3, 5, 7), "samples").expand(2, 3, 5, 7)
    expected = step(NATIVE, given | {"mask": given["mask"].contiguous()})
    for name in ("known", "known_noise"):
        given[name] = torch.stack([given[name]] * 2, dim=-1)[..., 0]
    for left, right in zip(step(NATIVE, given), expected, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mask_of_one_image_serves_the_batch(target: Target, layout: str) -> None:
    """The same mask for each sample, whichever way it is given."""
    given = kept((3, 4, 9, 11), layout=layout, mask="whole")
    expected = step(target, given)
    for sizes in ((1, 4), (3, 1), (3, 4)):
        out = step(target, given | {"mask": given["mask"].expand(*sizes, 9, 11).contiguous()})
        assert torch.equal(out.x, expected.x)
        assert torch.equal(out.model_input, expected.model_input)
