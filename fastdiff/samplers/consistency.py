"""Multistep sampling with networks that were trained to reach the data, or a cleaner point of the path, at once.

Song et al. 2023, "Consistency Models"; Luo et al. 2023, "Latent Consistency Models"; Zheng et al. 2024, "Trajectory
Consistency Distillation". Each step jumps and adds noise again, so a perfect network gives the distribution of the data
in any number of steps, and more steps of an ordinary denoiser do not converge to it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat

from fastdiff.errors import InputError
from fastdiff.parameterization import Linear
from fastdiff.samplers.problem import Interval, Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, fraction, make_row, make_table
from fastdiff.schedules.schedule import positive


def lcm(problem: Problem, *, timestep_scaling: float | None = 10.0, sigma_data: float = 0.5) -> StepTable:
    """x' = alpha' f + sigma' z, f = c_skip x + c_out D, c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2).

    d = sigma_data, u = timestep_scaling * t with t the network's timestep. The last step gives f without noise.
    timestep_scaling    None: f = D, the limit of a large scaling (FlowMatchLCMScheduler, ComfyUI).

    With timesteps of its own and a strength below 1, diffusers' LCMScheduler counts the steps before it drops some, and
    returns f noised to the last timestep; this one returns f.
    Source: Luo et al. 2023, algorithm 3; the scalings are those of the released code.
    """
    scale = None if timestep_scaling is None else positive("lcm: timestep_scaling", timestep_scaling)
    return make_table("lcm", problem, _lcm_rows(problem, scale, positive("lcm: sigma_data", sigma_data)))


def _lcm_rows(problem: Problem, scale: float | None, sigma_data: float) -> Iterator[Row]:
    for interval in problem.intervals():
        start, end = interval.start, interval.end
        skip, out = (0.0, 1.0) if scale is None else _boundary(start, scale, sigma_data)
        yield make_row(problem, start, {"x": end.alpha * skip, "D": end.alpha * out, "noise": end.sigma}, to=end)


def _boundary(point: Point, scale: float, sigma_data: float) -> tuple[float, float]:
    """(c_skip, c_out)."""
    if point.timestep < 0.0:
        raise InputError(
            f"lcm: timestep_scaling: the schedule {point.schedule.name!r} has the timestep {point.timestep:g}, and the "
            "scalings need timesteps of at least 0; pass timestep_scaling=None"
        )
    u = scale * point.timestep
    return sigma_data**2 / (u**2 + sigma_data**2), u / math.hypot(u, sigma_data)


def tcd(problem: Problem, *, eta: float = 0.3, beyond: Sequence[float] | None = None) -> StepTable:
    """x' = (alpha'/alpha_s) x_s + sqrt(sigma'^2 - (alpha'/alpha_s)^2 sigma_s^2) z, x_s = alpha_s D + sigma_s epsilon.

    s = (1 - eta) t', rounded down where t' is a whole timestep: the network leads past t' to s, and noise leads back.
    eta     the paper's gamma: 0 is DDIM, 1 goes to the clean end of the schedule in each step. Where D is clipped,
            epsilon is the one that leads from x to the clipped D.
    beyond  sigma / alpha of the point s of each step, where they are known otherwise than by eta.

    diffusers' TCDScheduler clips nothing and ends at timestep 0, which is final_sigma="schedule".
    Source: Zheng et al. 2024 (strategic stochastic sampling).
    """
    eta = fraction("tcd", "eta", eta)
    intervals = problem.intervals()
    if beyond is None:
        passed = [_beyond(problem, interval.end, eta) for interval in intervals]
    else:
        pairs = zip(intervals, beyond, strict=True)
        passed = [_or_end(problem.at_ratio(ratio), interval.end) for interval, ratio in pairs]
    return make_table("tcd", problem, map(_tcd_row, repeat(problem), intervals, passed))


def _tcd_row(problem: Problem, interval: Interval, beyond: Point) -> Row:
    start, end = interval.start, interval.end
    shrink = end.alpha / beyond.alpha
    signal, noise = end.alpha, shrink * beyond.sigma
    std = math.sqrt(max(end.sigma**2 - noise**2, 0.0))
    if problem.bounded:
        new_x = {"x": noise / start.sigma, "D": signal - noise * start.alpha / start.sigma}
    else:
        new_x = {"x": noise * start.noise.x, "m": noise * start.noise.m, "D": signal}
    return make_row(problem, start, {**new_x, "noise": std}, to=end)


def _beyond(problem: Problem, end: Point, eta: float) -> Point:
    """The point s; for continuous schedules (1 - eta) of the schedule's own time."""
    if eta == 0.0 or end.sigma == 0.0:
        return end
    schedule = problem.schedule
    t = float(schedule.timestep_of(end.ratio))
    if schedule.continuous:
        s = float(schedule.curve.timestep((1.0 - eta) * schedule.time(t)))
    else:
        # A timestep found from its level, and a product that is whole in decimals, have to come out whole.
        t = round(t, 6)
        s = round((1.0 - eta) * t, 6)
        s = float(math.floor(s)) if t.is_integer() else s
    return _or_end(problem.at_timestep(s), end)


def _or_end(beyond: Point, end: Point) -> Point:
    """`end` where both are the same but for rounding, which would otherwise come out as noise."""
    return end if math.isclose(beyond.ratio, end.ratio, rel_tol=1e-9) else beyond


def consistency(problem: Problem, *, s_noise: float = 1.0) -> StepTable:
    """x' = f + s_noise sqrt(sigma'^2 - sigma_min^2) z, f the network's consistency function, sigma_min the schedule's.

    With the prediction "edm", f = c_skip x + c_out m with c_skip = d^2 / ((sigma - sigma_min)^2 + d^2) and c_out =
    (sigma - sigma_min) d / sqrt(sigma^2 + d^2), d = sigma_data, so that f = x at sigma_min; with any other f is the
    data prediction. The last step gives f.

    Source: Song et al. 2023, algorithm 1 and appendix C; Song and Dhariwal 2024 (iCT) sample in the same way.
    """
    s_noise = fraction("consistency", "s_noise", s_noise, high=10.0)
    return make_table("consistency", problem, _consistency_rows(problem, s_noise))


def _consistency_rows(problem: Problem, s_noise: float) -> Iterator[Row]:
    sigma_min = float(problem.schedule.sigmas[0])
    for start, end in pairwise(problem.points()):
        data = _consistency_function(problem, start, sigma_min) if problem.prediction == "edm" else None
        std = s_noise * math.sqrt(max(end.sigma**2 - sigma_min**2, 0.0))
        yield make_row(problem, start, {"D": 1.0, "noise": std}, to=end, data=data)


def _consistency_function(problem: Problem, point: Point, sigma_min: float) -> Linear:
    d, sigma = problem.schedule.sigma_data, point.sigma
    above = max(sigma - sigma_min, 0.0)
    return Linear(d**2 / (above**2 + d**2), above * d / math.hypot(sigma, d))


LCM = MethodInfo(
    name="lcm",
    paper="Luo et al. 2023, Latent Consistency Models",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"timestep_scaling": 10.0, "sigma_data": 0.5},
    grid={"spacing": "lcm"},
    diffusers={"spacing": "lcm"},
    rows=lcm,
)
TCD = MethodInfo(
    name="tcd",
    paper="Zheng et al. 2024, Trajectory Consistency Distillation",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"eta": 0.3},
    grid={"spacing": "lcm"},
    diffusers={"spacing": "lcm", "final_sigma": "schedule"},
    rows=tcd,
)
CONSISTENCY = MethodInfo(
    name="consistency",
    paper="Song et al. 2023, Consistency Models",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"s_noise": 1.0},
    # The function is the identity at sigma_min: an evaluation there does nothing.
    grid={"spacing": "karras", "endpoint": False},
    kinds=("ve",),
    diffusers={"clip": 1.0},
    rows=consistency,
)
