"""sampler_step's CUDA kernel with weights, variance channels, scales and a kept image, run on the CPU by the shim."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_shim import ORDERS, Launchers
from inputs import DTYPES, LAYOUTS
from step_rows import FEATURES, MASKS, ROW, ROWS, arguments, extended, truth
from tolerance import assert_close_to_truth

from fastdiff.ops import reference
from fastdiff.ops.registry import OPERATORS
from fastdiff.ops.row import KNOWN, VARIANCE

NAMES = [part.split()[1] for part in OPERATORS["sampler_step"].schema.partition(")")[0].lstrip("(").split(", ")]
SHAPES = {"chunks": (2, 4, 4, 6), "remainder": (2, 3, 5, 3), "one_element": (1, 1, 1, 1), "blocks": (2, 4, 24, 24)}
SETS = {name: (name,) for name in FEATURES} | {"all": FEATURES}


def schema(given: dict[str, Any]) -> list[Any]:
    """The public function's arguments in the order of the registered operator's."""
    flat = given | {f"hist{i + 1}": h for i, h in enumerate(given["history"])}
    return [flat.get(name) for name in NAMES]


def run(shim: Launchers, given: dict[str, Any]) -> torch.Tensor:
    return shim.sampler_step(*schema(given))[0]


def check(shim: Launchers, given: dict[str, Any]) -> None:
    outputs = zip(shim.sampler_step(*schema(given)), truth(given), reference.sampler_step(*schema(given)), strict=True)
    for result, exact, plain in outputs:
        if result is not None:
            assert result.dtype == plain.dtype
            assert_close_to_truth(result, exact, plain)


def everything(shape: tuple[int, ...] = SHAPES["chunks"], *features: str, **options: Any) -> dict[str, Any]:
    return extended(arguments(ROWS["everything"], shape), *(features or FEATURES), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", SETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_features(shim: Launchers, shape: str, features: str, layout: str) -> None:
    check(shim, everything(SHAPES[shape], *SETS[features], layout=layout))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(shim: Launchers, layout: str, groups: int) -> None:
    check(shim, everything(SHAPES["chunks"], "weights", "variance", groups=groups, layout=layout))


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (3,), (2, 8), (3, 8, 4)], ids=str)
def test_masks(shim: Launchers, shape: tuple[int, ...], mask: str, drawn: bool) -> None:
    check(shim, everything(shape, "kept", mask=mask, drawn=drawn))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_dtypes(shim: Launchers, drawn: bool, dtype: str, order: str) -> None:
    shim.device(order)
    given = arguments(ROWS["everything"], SHAPES["chunks"], state=dtype, model=dtype, drawn=drawn)
    check(shim, extended(given, *FEATURES, groups=3, drawn=drawn, mask="elements"))


@pytest.mark.parametrize("copies", [1, 3])
def test_copies(shim: Launchers, copies: int) -> None:
    check(shim, everything() | {"copies": copies})


@pytest.mark.parametrize("shape", ["chunks", "remainder"])
def test_what_does_not_count_is_not_read(shim: Launchers, shape: str) -> None:
    """NaN in a group of weight 0, in the variance of all groups but the last, and behind each side of the mask."""
    given = everything(SHAPES[shape], groups=3, mask="elements", drawn=False)
    samples, channels = given["x"].shape[:2]
    given["weights"][:, 1] = 0.0
    given["model_output"][samples : 2 * samples] = math.nan
    given["model_output"][: 2 * samples, channels:] = math.nan
    for name in ("known", "known_noise"):
        given[name] = torch.where(given["mask"] == 1.0, math.nan, given[name])
    given["x"] = torch.where(given["mask"] == 0.0, math.nan, given["x"])
    assert run(shim, given).isfinite().all()


@pytest.mark.parametrize("shape", ["chunks", "remainder"])
def test_coefficients_of_zero_read_nothing(shim: Launchers, shape: str) -> None:
    given = everything(SHAPES[shape], drawn=False)
    given["table"][ROW, KNOWN] = torch.tensor([0.0, 1.0])
    given["table"][ROW, VARIANCE] = 0.0
    given["known"].fill_(math.nan)
    given["model_output"][:, given["x"].shape[1] :] = math.nan
    assert run(shim, given).isfinite().all()
    given["table"][ROW, KNOWN] = torch.tensor([1.0, 0.0])
    given["known"].fill_(1.0)
    assert run(shim, given | {"known_noise": None}).isfinite().all()


def test_an_image_changes_nothing_where_the_mask_is_one(shim: Launchers) -> None:
    given = everything(SHAPES["chunks"], "kept", mask="elements")
    made, ones = run(shim, given | {"known": None, "mask": None}), given["mask"] == 1.0
    assert torch.equal(run(shim, given)[ones], made[ones])


@pytest.mark.parametrize("features", [(), ("weights", "scales")], ids=["plain", "more"])
def test_a_missing_variance_gives_nan(shim: Launchers, features: tuple[str, ...]) -> None:
    given = extended(arguments(ROWS["only_noise"], SHAPES["chunks"]), *features)
    given["table"][ROW, VARIANCE] = 0.4
    assert run(shim, given).isnan().all()


def test_missing_noise_of_the_image_gives_nan(shim: Launchers) -> None:
    given = extended(arguments(ROWS["ddim"], SHAPES["chunks"]), "kept") | {"seeds": None}
    assert torch.equal(run(shim, given).isnan(), (given["mask"] != 1.0).expand(given["x"].shape))


@pytest.mark.parametrize("name", ["known", "known_noise", "mask"])
def test_unaligned_addresses(shim: Launchers, name: str) -> None:
    given = everything(drawn=False, mask="elements")
    value = given[name]
    given[name] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    check(shim, given)
