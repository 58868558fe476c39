"""Every option of these methods and of the grids refuses what it cannot mean, and says so by name."""

import math

import pytest

from fastdiff import parameterization, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.samplers.grid import GridOptions
from fastdiff.samplers.grid import build as build_grid

VP = schedules.linear(1000)
METHODS = (
    "dpm_solver",
    "dpm_solver_sde",
    "dpm_solver_singlestep",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_inverse",
    "dpmpp_singlestep",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "unipc",
    "deis",
    "sa_solver",
    "gradient_estimation",
    "heunpp2",
    "res_multistep",
    "seeds_2",
    "seeds_3",
    "er_sde",
)
NUMBERS = ("1", True, math.nan, -1.0, [], {})
WHOLE = ("2", True, 1.5, 2.0, math.nan, -1, 99, None, [])
FLAGS = ("yes", "", 0, 1, 1.0, math.nan, [], ("a",))
NAMES = ("", "none", None, 1, True, math.nan, [], {})
INNER = ("0.5", True, math.nan, -0.5, 0.0, 1.0, math.inf, [], {})
RANGES = (1.0, "ab", (1,), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (True, 2.0), ("1", "2"))
BAD = {
    "lower_order_final": FLAGS,
    "s_tmax": NUMBERS,
    "r": INNER,
    "r1": INNER,
    "r2": INNER,
    "evaluations": ("7", True, 0, 7.0, -1, 1000, math.nan, []),
    "corrector": (None, "yes", 1, 1.0, math.nan, [-1], [True], [0.5], ["a"], {}),
    "tau_timesteps": RANGES,
    "tau_ratios": RANGES,
}
COUNTS = ("200", True, 1.5, 200.0, math.nan, -1, 0, [])
# Where a name means something else than in the other methods.
OWN = {
    ("seeds_2", "r"): tuple(value for value in INNER if value != 1.0),
    ("er_sde", "points"): COUNTS,
    ("deis", "points"): COUNTS,
}
NEEDED = {"r2": {"order": 3}, "evaluations": {"order": 3}}
OPTIONS = [(method, option) for method in METHODS for option in samplers.methods()[method].options]


def bad_values(method: str, option: str) -> tuple:
    default = samplers.methods()[method].options[option]
    bad = OWN.get((method, option), BAD.get(option))
    if bad is not None:
        # None is refused as well where it is not the default, "automatic".
        return bad if default is None else (*bad, None)
    return {bool: (*FLAGS, None), int: WHOLE, float: (*NUMBERS, None), str: NAMES}[type(default)]


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_methods(method, option):
    needed = {k: v for k, v in NEEDED.get(option, {}).items() if k in samplers.methods()[method].options}
    given = {"schedule": VP, "steps": 6, "prediction": "v", **needed}
    for value in bad_values(method, option):
        with pytest.raises(InputError, match=rf"^{method}: (\w+, )*{option}(, \w+)*: .*"):
            samplers.build(method, **given, **{option: value})


LEVELS = ("1", True, math.nan, -1.0, 0.0, math.inf, [], {})
GIVEN = ("9, 5", ["9", "5"], [True, False], [9.0, None], [9.0, math.nan], [5.0, 9.0], [[9.0], [5.0]], 9.0, {}, [1j])
GRID = {
    "spacing": ({}, ("", 0, True, [], "karass")),
    "endpoint": ({"spacing": "karras"}, FLAGS),
    "integer": ({}, FLAGS),
    "steps_offset": ({"spacing": "leading"}, ("1", True, 1.5, -1, math.nan, [], ("a",))),
    "interpolation": ({"spacing": "linspace"}, ("", "cubic", 0, True, [])),
    "sigma_min": ({"spacing": "karras"}, LEVELS),
    "sigma_max": ({"spacing": "karras"}, LEVELS),
    "rho": ({"spacing": "karras"}, LEVELS),
    "beta_a": ({"spacing": "beta"}, LEVELS),
    "beta_b": ({"spacing": "beta"}, LEVELS),
    "ays_model": ({"spacing": "align_your_steps"}, ("", "sd3", 1, True, [], {})),
    "original_steps": ({"spacing": "lcm"}, ("50", True, 0, 1001, 50.0, math.nan, [])),
    "timesteps": ({"steps": None}, GIVEN),
    "sigmas": ({"steps": None}, GIVEN),
    "final_sigma": ({}, ("", "none", 0, False, [], "last")),
    "strength": ({}, ("1", True, 0.0, 1.5, -0.5, math.nan, [])),
    "shift": ({"schedule": schedules.flow(1000)}, LEVELS),
    "shift_terminal": ({"schedule": schedules.flow(1000)}, (*LEVELS, 1.0)),
}


@pytest.mark.parametrize("option", samplers.GRID_OPTIONS)
def test_grids(option):
    needed, values = GRID[option]
    given = {"schedule": VP, "steps": 6, **needed}
    schedule, steps = given.pop("schedule"), given.pop("steps")
    for value in values:
        with pytest.raises(InputError, match=rf"^(\w+, )*{option}(, \w+)*: .*"):
            build_grid(schedule, steps, GridOptions(**{**given, option: value}))


@pytest.mark.parametrize("name", [[], {}, None, 3])
def test_names_that_are_no_words(name):
    with pytest.raises(InputError, match="method: no method"):
        samplers.find(name)
    with pytest.raises(InputError, match="prediction: expected one of"):
        parameterization.check(name, VP)


FRACTIONS = ("0.5", None, True, math.nan, 0.0, 1.0, [])
SCHEDULES = {
    "linear": {"beta_start": FRACTIONS, "beta_end": FRACTIONS},
    "scaled_linear": {"beta_start": FRACTIONS, "beta_end": FRACTIONS},
    "sigmoid": {"beta_start": FRACTIONS, "beta_end": FRACTIONS},
    "cosine": {"offset": FRACTIONS, "max_beta": FRACTIONS},
    "laplace": {"max_beta": FRACTIONS},
    "flow": {"shift": LEVELS},
    "ve": {"sigma_min": LEVELS, "sigma_max": LEVELS},
    "edm": {"sigma_min": LEVELS, "sigma_max": LEVELS, "sigma_data": LEVELS, "timestep_scale": LEVELS},
    "vp_sde": {"beta_min": LEVELS, "beta_max": LEVELS, "time_min": (*LEVELS, 1.0)},
    "sub_vp_sde": {"beta_min": LEVELS, "beta_max": LEVELS, "time_min": (*LEVELS, 1.0)},
    "crash": {"steps": ("9", True, 1, 9.0, None)},
    "custom": {"alphas_cumprod": ("a", ["a"], {}, None, [], 0.5, [0.5, math.nan], [0.2, 0.5], [1.0, 0.5], [[0.5]])},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in SCHEDULES for option in SCHEDULES[name]])
def test_schedules(name, option):
    for value in SCHEDULES[name][option]:
        with pytest.raises(InputError, match=rf"{option}(, \w+)*: expected"):
            getattr(schedules, name)(**{option: value})


@pytest.mark.parametrize("option", ["image_tokens", "base_tokens", "max_tokens", "base_shift", "max_shift"])
def test_dynamic_shift(option):
    for value in ("1", None, True, math.nan, math.inf, []):
        with pytest.raises(InputError, match=f"{option}: expected"):
            schedules.dynamic_shift(**{"image_tokens": 1024, option: value})
