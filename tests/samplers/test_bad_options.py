"""Every option of the methods of the first families refuses what it cannot mean, by the method's and its own name."""

import math

import pytest

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

METHODS = (
    *("ddpm", "ddim", "ddim_inverse", "pndm", "plms", "ipndm", "ipndm_v", "lms", "euler", "euler_ancestral", "heun"),
    *("dpm2", "dpm2_ancestral", "restart", "lcm", "tcd", "consistency", "flow_euler", "flow_heun", "pf_ode"),
    "reverse_sde",
)
SCHEDULES = {"vp": schedules.linear(1000), "flow": schedules.flow(1000), "ve": schedules.edm(1000)}
PREDICTIONS = {"vp": "epsilon", "flow": "flow", "ve": "edm"}
NUMBERS = ("1", True, math.nan, -1.0, [], {})
BAD = {
    bool: ("yes", "", 0, 1, 1.0, None, math.nan, []),
    int: ("2", True, 1.5, 2.0, math.nan, -1, 999, None, []),
    float: (*NUMBERS, None),
    str: ("", "nothing", None, 1, True, math.nan, [], {}),
}
OWN = {
    "s_tmax": NUMBERS,
    "timestep_scaling": NUMBERS,
    "intervals": (3, "ab", None, [(0.1, 2.0, 1)], [(2.0, 0.1, 1, 9)], [(0.1, 2.0, True, 9)], [("0.1", 2.0, 1, 9)]),
}
OPTIONS = [(method, option) for method in METHODS for option in samplers.methods()[method].options]


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_methods(method, option):
    info = samplers.methods()[method]
    kind = "vp" if "vp" in (info.kinds or ("vp",)) else info.kinds[0]
    given = {"schedule": SCHEDULES[kind], "steps": 6, "prediction": PREDICTIONS[kind]}
    for value in OWN.get(option, ()) or BAD[type(info.options[option])]:
        with pytest.raises(InputError, match=rf"^{method}: {option}: .*(expected|needs)"):
            samplers.build(method, **given, **{option: value})


@pytest.mark.parametrize("value", ["3", math.nan, 0.5, True, None])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_maximum_needs_a_threshold_and_a_number(threshold, value):
    options = {"dynamic_threshold": threshold, "dynamic_maximum": value}
    with pytest.raises(InputError, match="dynamic_maximum: expected"):
        samplers.build("ddim", schedule=SCHEDULES["vp"], steps=3, **options)
