"""Our tables beside diffusers' schedulers: the same state, network output and noise for both, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, samplers, schedules
from fastdiff.ops.row import INPUT_SCALE, INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION
from fastdiff.parameterization import target
from fastdiff.samplers import StepTable
from fastdiff.samplers.table import RowUse
from fastdiff.schedules import Schedule

SHAPE = (2, 3, 8, 8)
ROUNDING = 2.0**-24
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_3m_sde": "DPMSolverMultistepScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "dpm_solver_sde": "DPMSolverMultistepScheduler",
    "dpm_solver_singlestep": "DPMSolverSinglestepScheduler",
    "dpmpp_singlestep": "DPMSolverSinglestepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "ddim_inverse": "DDIMInverseScheduler",
    "pndm": "PNDMScheduler",
    "plms": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
}
# These compute in float64 once their sigmas are float64: test_adams_parity.py compares them so.
IN_FLOAT64 = {
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "sa_solver": "SASolverScheduler",
}
# What makes the method of a class that has several; theirs end at the schedule's own end where they refuse another.
CONFIGS = {
    "plms": {"skip_prk_steps": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "dpmpp_3m": {"solver_order": 3},
    "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    "dpm_solver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "dpm_solver_sde": {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    "dpm_solver_singlestep": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
}
FLOW_CLASSES = (
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.FlowMatchLCMScheduler,
)


@dataclass(frozen=True)
class Step:
    """What both sides gave for one row; bound is the relative error that float32 leaves room for."""

    ours: Tensor
    theirs: Tensor
    input_error: float
    bound: float

    @property
    def error(self) -> float:
        return relative(self.ours, self.theirs)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def scheduler_for(method: str, schedule: str, prediction: str, **config: Any) -> Any:
    """diffusers' class for the method, with its own defaults but for `config`."""
    if method == "flow_euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(1000, **config)
    config = {**CONFIGS.get(method, {}), **config}
    options = {**SCHEDULES[schedule], "prediction_type": PREDICTIONS[prediction], **config}
    return getattr(diffusers, (CLASSES | IN_FLOAT64)[method])(1000, **options)


def schedule_of(scheduler: Any) -> Schedule:
    """Their own float32 schedule, value for value, so that only the steps are compared."""
    if isinstance(scheduler, FLOW_CLASSES):
        return schedules.flow(1000, shift=scheduler.config.shift)
    if isinstance(scheduler, diffusers.CMStochasticIterativeScheduler):
        ends = {name: scheduler.config[name] for name in ("sigma_min", "sigma_max", "sigma_data")}
        return schedules.edm(scheduler.config.num_train_timesteps, timestep_scale=1000.0, **ends)
    return schedules.custom(scheduler.alphas_cumprod.double().numpy())


def table_for(method: str, scheduler: Any, prediction: str, steps: int, **options: Any) -> StepTable:
    """Our table with the options that stand for the class's defaults, but for `options`."""
    defaults = {**samplers.methods()[method].diffusers, **options}
    return samplers.build(method, schedule=schedule_of(scheduler), steps=steps, prediction=prediction, **defaults)


def network(schedule: Schedule, prediction: str, x: Tensor, t: float) -> Tensor:
    """A network whose data prediction is bounded, wavy, and beyond [-1, 1] in places, as a real one's is."""
    alpha, sigma = (float(value) for value in schedule.at(t))
    clean = (1.2 * torch.tanh(1.5 * alpha * x / (alpha**2 + 0.3) + 0.3 * torch.sin(3.0 * x))).double()
    c0, c1 = target(prediction, alpha, sigma)
    return (c0 * clean + c1 * (x.double() - alpha * clean) / sigma).to(x.dtype)


def compare(table: StepTable, scheduler: Any, **step_options: Any) -> Iterator[Step]:
    """Each row of ours beside each call of theirs, both from their state, their network output and their noise."""
    schedule, generator, twin = schedule_of(scheduler), *(torch.Generator().manual_seed(7) for _ in range(2))
    if "generator" in scheduler.step.__code__.co_varnames:
        step_options["generator"] = generator
    rows, noise = table.tensor(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    assert relative(table.init_scale * noise, x) < 1e-6
    anchor, history, scale, sizes = None, (), table.first_input_scale, {}
    for index, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        input_error = relative(scale * x, model_input)
        m = network(schedule, table.prediction, model_input, float(t))
        before = generator.get_state()
        theirs = scheduler.step(m, t, x, **step_options).prev_sample
        drew = not torch.equal(before, generator.get_state())
        drawn = torch.randn(SHAPE, generator=twin) if drew else torch.full(SHAPE, torch.nan)
        use = table.uses[index]
        given = {"anchor": anchor if use.anchor else None, "history": history[: use.history], "noise": drawn}
        wanted = {"new_history": use.new_history, "new_anchor": use.new_anchor}
        step = ops.sampler_step(x, m, rows, index, **given, **wanted)
        row = table.rows[index]
        sizes = _sizes(row, x, m, sizes)
        largest = sizes["x"] + _terms(row, NEW_X, sizes) + _their_terms(table, scheduler, index, sizes)
        bound = 1e-5 + 4.0 * ROUNDING * largest / float(theirs.norm())
        yield Step(step.x, theirs, input_error, bound)
        history = history if step.history is None else (step.history, *history[:2])
        anchor = anchor if step.anchor is None else step.anchor
        sizes = _carried(row, use, sizes)
        x, scale = theirs, row[INPUT_SCALE]


# How much larger than the result the terms are that cancel in it: a float32 rounding of each grows by that. It is near
# 1 but where a step crosses orders of magnitude of noise (the first ones of the cosine schedule, whose sigma / alpha
# starts at 20000), or where epsilon is divided by a small alpha. So a data prediction, an anchor and a history count as
# the sum of the terms that made them.
def _sizes(row, x: Tensor, m: Tensor, carried: dict[str, float]) -> dict[str, float]:
    """Norms of a row's inputs."""
    ax, am = (abs(float(value)) for value in row[PREDICTION])
    sizes = carried | {"x": float(x.norm()), "m": float(m.norm())}
    return sizes | {"D": ax * sizes["x"] + am * sizes["m"]}


def _terms(row, block: slice, sizes: dict[str, float]) -> float:
    """The sum of the terms' norms of one of a row's outputs."""
    return sum(abs(float(c)) * sizes.get(name, 0.0) for name, c in zip(INPUTS, row[block], strict=True))


def _carried(row, use: RowUse, sizes: dict[str, float]) -> dict[str, float]:
    """The sizes with those of the row's new anchor and history."""
    carried = dict(sizes)
    if use.new_anchor:
        carried["anchor"] = _terms(row, NEW_ANCHOR, sizes)
    if use.new_history:
        carried |= {"hist1": _terms(row, NEW_HISTORY, sizes), "hist2": sizes.get("hist1", 0.0)}
        carried["hist3"] = sizes.get("hist2", 0.0)
    return carried


def _their_terms(table: StepTable, scheduler: Any, index: int, sizes: dict[str, float]) -> float:
    """What theirs has to cancel where it integrates the noise: (alpha'/alpha) x, of which ours is rid in float64, and
    the same again for the rounding of lambda, from whose float32 difference it takes e^h."""
    if getattr(scheduler.config, "algorithm_type", "") not in ("dpmsolver", "sde-dpmsolver"):
        return 0.0
    alphas = table.grid.alphas
    first = alphas[max(index - scheduler.config.solver_order + 1, 0)]
    return (1.0 + abs(float(np.log(first)))) * float(alphas[index + 1] / first) * sizes["x"]


def assert_parity(table: StepTable, scheduler: Any, *, steps: int | None = None, **step_options: Any) -> None:
    """Timesteps, network inputs and states agree at every step."""
    scheduler.set_timesteps(table.steps if steps is None else steps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-4)
    for index, step in enumerate(compare(table, scheduler, **step_options)):
        assert step.input_error < 1e-6, f"row {index}: network input off by {step.input_error:.1e}"
        assert step.error < step.bound, f"row {index}: relative error {step.error:.1e}, bound {step.bound:.1e}"


def differs(table: StepTable, scheduler: Any, **step_options: Any) -> list[int]:
    """The rows at which the two sides differ by more than float32 explains."""
    return [i for i, step in enumerate(compare(table, scheduler, **step_options)) if step.error > step.bound]
