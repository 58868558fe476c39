"""The samplers that ComfyUI lists, against loops written from their formulas: result, and state before every call."""

from collections.abc import Callable
from functools import partial

import comfyui_loops as loops
import comfyui_sde_loops as sde
import pytest
import torch
from comfyui_peer import EPS as Levels
from comfyui_peer import Model, assert_close, levels_of, noises, ours, predict, start_of

from fastdiff import samplers
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion.comfyui import plans
from fastdiff.ops.row import NEW_X

NODES = {"r": 0.3, "solver_type": "phi_2"}
# By test id: the sampler, its options, the loop.
EPS: dict[str, tuple[str, dict, Callable]] = {
    "ddpm": ("ddpm", {"noise": True}, loops.ddpm),
    "euler_ancestral-1.5": (
        "euler_ancestral",
        {"noise": True, "eta": 1.5},
        partial(loops.euler_ancestral_exploding, eta=1.5),
    ),
    "lcm": ("lcm", {"noise": True}, loops.lcm),
    "lcm-scaled": (
        "lcm",
        {"noise": True, "s_noise": 0.9, "s_noise_end": 1.2, "noise_clip_std": 1.5},
        partial(loops.lcm, s_noise=0.9, s_noise_end=1.2, clip=1.5),
    ),
    "heunpp2": ("heunpp2", {}, loops.heunpp2),
    "lms": ("lms", {}, loops.adams(loops.in_sigma, 4)),
    "lms-2": ("lms", {"order": 2}, loops.adams(loops.in_sigma, 2)),
    "ipndm": ("ipndm", {}, loops.adams(loops.equal_steps, 4)),
    "ipndm-2": ("ipndm", {"max_order": 2}, loops.adams(loops.equal_steps, 2)),
    "ipndm_v-2": ("ipndm_v", {"max_order": 2}, loops.adams(loops.in_sigma, 2)),
    "deis": ("deis", {}, loops.adams(loops.in_time, 3)),
    "deis-4": ("deis", {"max_order": 4}, loops.adams(loops.in_time, 4)),
    "deis-rhoab": ("deis", {"deis_mode": "rhoab"}, loops.adams(loops.in_sigma, 3)),
    "res_multistep": ("res_multistep", {"noise": True}, loops.res_multistep),
    "res_multistep_ancestral": (
        "res_multistep_ancestral",
        {"noise": True, "eta": 0.7, "s_noise": 1.1},
        partial(loops.res_multistep, eta=0.7, s_noise=1.1),
    ),
    "gradient_estimation": ("gradient_estimation", {}, loops.gradient_estimation),
    "gradient_estimation-1.5": (
        "gradient_estimation",
        {"ge_gamma": 1.5},
        partial(loops.gradient_estimation, ge_gamma=1.5),
    ),
    "euler_cfg_pp": ("euler_cfg_pp", {}, partial(loops.euler_ancestral_cfg_pp, eta=0.0)),
    "euler_ancestral_cfg_pp": ("euler_ancestral_cfg_pp", {"noise": True}, loops.euler_ancestral_cfg_pp),
    "dpmpp_2s_ancestral_cfg_pp": ("dpmpp_2s_ancestral_cfg_pp", {"noise": True}, loops.dpmpp_2s_ancestral_cfg_pp),
    "dpmpp_2s_ancestral_cfg_pp-1.5": (
        "dpmpp_2s_ancestral_cfg_pp",
        {"noise": True, "eta": 1.5},
        partial(loops.dpmpp_2s_ancestral_cfg_pp, eta=1.5),
    ),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m_cfg_pp", {}, loops.dpmpp_2m_cfg_pp),
    "res_multistep_cfg_pp": ("res_multistep_cfg_pp", {"noise": True}, partial(loops.res_multistep, guided=True)),
    "res_multistep_ancestral_cfg_pp": (
        "res_multistep_ancestral_cfg_pp",
        {"noise": True},
        partial(loops.res_multistep, eta=1.0, guided=True),
    ),
    "gradient_estimation_cfg_pp": ("gradient_estimation_cfg_pp", {}, partial(loops.gradient_estimation, guided=True)),
}
FLOW: dict[str, tuple[str, dict, Callable]] = {
    "euler_ancestral": ("euler_ancestral", {"noise": True}, loops.euler_ancestral),
    "euler_ancestral-half": (
        "euler_ancestral",
        {"noise": True, "eta": 0.5, "s_noise": 0.9},
        partial(loops.euler_ancestral, eta=0.5, s_noise=0.9),
    ),
    "dpm_2_ancestral": ("dpm_2_ancestral", {"noise": True}, loops.dpm_2_ancestral),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {"noise": True}, loops.dpmpp_2s_ancestral),
    "dpmpp_2s_ancestral-0": (
        "dpmpp_2s_ancestral",
        {"noise": True, "eta": 0.0},
        partial(loops.dpmpp_2s_ancestral, eta=0.0),
    ),
    "euler_cfg_pp": ("euler_cfg_pp", {}, partial(loops.euler_ancestral_cfg_pp, eta=0.0, flow=True)),
    "euler_ancestral_cfg_pp": (
        "euler_ancestral_cfg_pp",
        {"noise": True, "eta": 0.6},
        partial(loops.euler_ancestral_cfg_pp, eta=0.6, flow=True),
    ),
    "dpmpp_2s_ancestral_cfg_pp": (
        "dpmpp_2s_ancestral_cfg_pp",
        {"noise": True},
        partial(loops.dpmpp_2s_ancestral_cfg_pp, flow=True),
    ),
}


def seeds(nodes: list[float], eta: float, rule: str, s_noise: float = 1.0) -> Callable:
    return partial(sde.seeds, nodes=nodes, eta=eta, s_noise=s_noise, rule=rule)


# Of both kinds of levels; a flow begins below 1.
SDE: dict[str, tuple[str, dict, Callable]] = {
    "seeds_2": ("seeds_2", {"noise": True}, seeds([0.5], 1.0, "midpoint")),
    "seeds_2-heun": ("seeds_2", {"noise": True, "eta": 0.4, "s_noise": 1.1, **NODES}, seeds([0.3], 0.4, "heun", 1.1)),
    "seeds_3": ("seeds_3", {"noise": True, "eta": 0.8}, seeds([1 / 3, 2 / 3], 0.8, "heun")),
    "exp_heun_2_x0": ("exp_heun_2_x0", {}, seeds([1.0], 0.0, "heun")),
    "exp_heun_2_x0-phi_1": ("exp_heun_2_x0", {"solver_type": "phi_1"}, seeds([1.0], 0.0, "midpoint")),
    "exp_heun_2_x0_sde": ("exp_heun_2_x0_sde", {"noise": True}, seeds([1.0], 1.0, "heun")),
    "er_sde": ("er_sde", {"noise": True}, sde.er_sde),
    "er_sde-2": ("er_sde", {"noise": True, "max_stage": 2, "s_noise": 0.8}, partial(sde.er_sde, stages=2, s_noise=0.8)),
    "er_sde-scaler": (
        "er_sde",
        {"noise": True, "noise_scaler": lambda r: r**2 + r},
        partial(sde.er_sde, phi=lambda r: r**2 + r),
    ),
    "sa_solver": ("sa_solver", {"noise": True, "tau_func": lambda s: 0.7}, partial(sde.sa_solver, tau=lambda s: 0.7)),
    "sa_solver-levels": (
        "sa_solver",
        {"noise": True, "tau_func": lambda s: float(s) / 20.0, "predictor_order": 2, "corrector_order": 0},
        partial(sde.sa_solver, tau=lambda s: s / 20.0, predictor=2, corrector=0),
    ),
    "sa_solver_pece": (
        "sa_solver_pece",
        {"noise": True, "tau_func": lambda s: 0.0},
        partial(sde.sa_solver, tau=lambda s: 0.0, pece=True),
    ),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {"noise": True, "eta": 0.6}, partial(sde.dpmpp_2m_sde, eta=0.6)),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde_gpu", {"noise": True}, sde.dpmpp_2m_sde),
    "dpmpp_sde": ("dpmpp_sde", {"noise": True, "eta": 0.6, "r": 0.4}, partial(sde.dpmpp_sde, eta=0.6, r=0.4)),
}


def check(kind: str, name: str, options: dict, loop: Callable, sigmas: torch.Tensor, s: list[float]) -> None:
    drawn, calls = noises(), []

    def model(x, level):
        calls.append((x, level))
        return predict(x, torch.tensor([level], dtype=torch.float64))

    expected = loop(model, lambda: next(drawn).double(), start_of(kind).double(), s)
    found = ours(name, kind, sigmas, **options)
    assert_close(found.result, expected)
    assert len(found.model.calls) == len(calls)
    for (x, sigma), (state, level) in zip(found.model.calls, calls, strict=True):
        assert_close(x, state)
        assert sigma.tolist() == pytest.approx([level] * len(sigma), rel=1e-6)


# The level down of a long step is a small difference of float32 numbers.
SHORT_STEPS = {"dpmpp_2s_ancestral_cfg_pp"}
RUNS = [(case, steps) for case in EPS for steps in (1, 2, 3, 7) if case not in SHORT_STEPS or steps in (1, 7)]


@pytest.mark.parametrize(("case", "steps"), RUNS)
def test_levels_that_explode(case, steps):
    sigmas = levels_of("eps", steps)
    check("eps", *EPS[case], sigmas, sigmas.double().tolist())


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("case", FLOW)
def test_levels_of_a_flow(case, steps):
    sigmas = levels_of("flow", steps)
    check("flow", *FLOW[case], sigmas, sigmas.double().tolist())


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("case", SDE)
def test_both_kinds_of_levels(case, steps, kind):
    name, options, loop = SDE[case]
    sigmas = levels_of(kind, steps)
    s = sigmas.double().tolist()
    if kind == "flow":
        s[0] = float(torch.tensor(1.0 - 1e-4))
    check(kind, name, options, partial(loop, flow=kind == "flow"), sigmas, s)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("case", ["seeds_2", "er_sde", "sa_solver", "sa_solver_pece", "dpmpp_2m_sde"])
def test_a_last_level_above_zero(case, kind):
    name, options, loop = SDE[case]
    sigmas = levels_of(kind, 5, last=0.02)
    s = sigmas.double().tolist()
    if kind == "flow":
        s[0] = float(torch.tensor(1.0 - 1e-4))
    check(kind, name, options, partial(loop, flow=kind == "flow"), sigmas, s)


@pytest.mark.parametrize("order", [3, 4])
def test_ipndm_v_has_the_published_weights(order):
    levels = tuple(levels_of("eps", 7).double().tolist())
    plan = plans.method("ipndm_v", levels, {"order": order, "weights": "published"})
    given = {"order": order, "weights": "published"}
    table = samplers.find("ipndm_v").rows(plans.problem_of(levels), **given)
    exact = samplers.find("ipndm_v").rows(plans.problem_of(levels), order=order)
    assert plan.table.rows[:, NEW_X].tolist() == table.rows[:, NEW_X].tolist() != exact.rows[:, NEW_X].tolist()


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_unipc(variant, steps):
    sigmas = levels_of("eps", steps).double()
    s = [*sigmas.tolist()[:-1], 0.001]
    name = {"bh1": "uni_pc", "bh2": "uni_pc_bh2"}[variant]
    x = start_of("eps").double()
    expected = sde.unipc(lambda x, level: predict(x, torch.tensor([level]).double()), None, x, s, variant)
    for callback in (None, [].append):
        model = Model(Levels())
        function = getattr(k_diffusion, f"sample_{name}")
        found = function(model, x, sigmas, extra_args={"seed": 1}, callback=callback, disable=True)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9 * float(expected.abs().max()))
        assert len(model.calls) == steps
    assert sigmas[-1] == 0.0


@pytest.mark.parametrize(("name", "loop"), [("er_sde", sde.er_sde), ("deis", EPS["deis"][2])])
def test_sums_have_as_many_points(name, loop):
    """In float64, where one point more or less shows."""
    sigmas, x = levels_of("eps", 6).double(), start_of("eps").double()
    noise = {"noise_sampler": lambda sigma, sigma_next: torch.ones_like(x)} if name == "er_sde" else {}
    found = getattr(k_diffusion, f"sample_{name}")(Model(Levels()), x, sigmas, disable=True, **noise)

    def model(y, level):
        return predict(y, torch.tensor([level]).double())

    expected = loop(model, lambda: torch.ones_like(x), x, sigmas.tolist())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-11 * float(expected.abs().max()))
