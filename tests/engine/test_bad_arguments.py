"""What `run`, `sample` and `Guidance` refuse, by name."""

import math

import pytest
import torch

import fastdiff
from fastdiff import Guidance, samplers, schedules
from fastdiff.errors import InputError

TABLE = samplers.build("ddim", schedule=schedules.linear(1000), steps=2, prediction="sample")
IMAGE = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("denoiser", 3),
        ("table", "ddim"),
        ("table", None),
        ("callback", 3),
        ("shape", 3),
        ("shape", "ab"),
        ("shape", (True, 2)),
        ("shape", (1, 2.5)),
        ("shape", ()),
        ("x", 3),
        ("x", IMAGE.double()),
        ("x", IMAGE[:, :1]),
        ("dtype", "float32"),
        ("guidance", True),
        ("guidance", math.nan),
        ("device", "bar"),
        ("device", 1.5),
    ],
    ids=lambda value: f"{value!r}"[:24],
)
def test_run(name, value):
    given = {"denoiser": lambda x, t: x, "table": TABLE, "shape": tuple(IMAGE.shape), "seeds": [0], name: value}
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        fastdiff.run(**given)


@pytest.mark.parametrize("mask", [torch.ones(4, 4, dtype=torch.uint8), torch.ones(4, 4).to(torch.complex64)], ids=str)
def test_a_mask_of_integers(mask):
    """255 would not mean white."""
    with pytest.raises(InputError, match="mask: expected bool or floating"):
        fastdiff.run(lambda x, t: x, TABLE, seeds=[0], image=IMAGE, mask=mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("perpendicular", value) for value in ("no", 1, None, math.nan)),
        *(("classifier", value) for value in (3, "p", True)),
        *(("interval", value) for value in ((True, 2.0), ("1", "2"), (0.0, math.nan), (0.0, 1.0, 2.0))),
        *(("rescale", value) for value in ("1", True, math.nan, -0.1)),
        *(("classifier_scale", value) for value in ("1", True, math.inf)),
    ],
    ids=str,
)
def test_guidance(name, value):
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        Guidance(**{"scale": (3.0, -1.0), name: value})


@pytest.mark.parametrize(("name", "value"), [("guidance", True), ("device", "bar"), ("callback", 3)], ids=str)
def test_sample(name, value):
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        fastdiff.sample(fastdiff.load_model("fashion"), seeds=[0], labels=[3], steps=1, **{name: value})
