"""Pseudo numerical methods: Runge-Kutta and Adams-Bashforth on the noise prediction.

Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", equations 9, 11, 12 and 13. phi(x, e) is
the step x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e, equation 9.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fastdiff.errors import InputError
from fastdiff.samplers.ddim import PREVIOUS, stride_end, stride_length
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, make_row, make_table
from fastdiff.samplers.terms import ADAMS_BASHFORTH, ddim_step, epsilon, total

COMBINED = ("noise", "output")
RUNGE_KUTTA_STEPS = 3


def pndm(problem: Problem, *, previous_timestep: str = "grid", combined: str = "noise") -> StepTable:
    """x' = phi(x, (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3)/24), e_j the newest and the three earlier noise predictions.

    Each of the first three steps calls the network four times: k1 at (x, t), k2 at (phi(x, k1), t_mid), k3 at
    (phi(x, k2), t_mid), k4 at (phi(x, k3), t'), and x' = phi(x, (k1 + 2 k2 + 2 k3 + k4)/6); t_mid is halfway in t. A
    step from alpha = 0 or to sigma' = 0 has no such calls and takes the predictions it has, with the weights of a lower
    order. phi is exact for a constant e only, so the order of convergence is 2 (the paper's theorem 2).
    previous_timestep   "grid": a step ends where the next begins. "stride": where diffusers has it end, which is the
                same for the spacing "leading" and an even T // steps. Else its Runge-Kutta steps take k2 at a state of
                t - T // steps // 2, but tell the network, and have k3, at t' + T // steps // 2; its other steps end
                at t - T // steps, and the corrected one of `plms` starts again at t' + T // steps
    combined    "noise": the weighted sum is of noise predictions. "output": of the network's outputs as they are, and
                its noise prediction is taken at x, as diffusers does; that is another sum where the outputs are v
    """
    return make_table("pndm", problem, _rows(_Solver("pndm", problem, previous_timestep, combined), True))


def plms(problem: Problem, *, previous_timestep: str = "grid", combined: str = "noise") -> StepTable:
    """`pndm` without Runge-Kutta: the weights of orders 1, 2, 3 and then 4, the first step corrected.

    The first step calls the network twice, at (x, t) and at the result (x', t') of the first call: the mean of the two
    predictions makes the step again. One step alone is DDIM's. This is PNDM as Stable Diffusion has it
    (skip_prk_steps). The options are those of `pndm`.
    """
    return make_table("plms", problem, _rows(_Solver("plms", problem, previous_timestep, combined), False))


@dataclass(frozen=True, eq=False)
class Call:
    """A step x' = phi(x, e) from `start` to `end`, e the sum of weights * (m, hist1, hist2, hist3)."""

    start: Point
    end: Point
    weights: tuple[float, ...]


def separate_calls(problem: Problem, calls: Iterable[Call]) -> StepTable:
    """A row for each call, which need not be those of one run: for a caller who keeps x and the network's outputs of
    earlier calls, and gives them back. The outputs are combined as they are (`combined` = "output")."""
    solver = _Solver("pndm", problem, "stride", "output")
    rows = (
        make_row(problem, call.start, _combined(solver, call.start, call.end, call.weights), to=call.end)
        for call in calls
    )
    return make_table("pndm", problem, rows)


@dataclass(frozen=True)
class _Solver:
    method: str
    problem: Problem
    previous_timestep: str
    combined: str

    def __post_init__(self) -> None:
        choice(self.method, "previous_timestep", self.previous_timestep, PREVIOUS)
        choice(self.method, "combined", self.combined, COMBINED)
        if self.combined == "output" and self.problem.bounded:
            raise InputError(
                f"{self.method}: combined: 'output' makes no data prediction that could be clipped; leave clip and "
                "dynamic_threshold out, or take combined='noise'"
            )

    @property
    def stride(self) -> bool:
        return self.previous_timestep == "stride"

    def slope(self, point: Point) -> dict[str, float]:
        """What is combined, by its coefficients at `point`."""
        return {"m": 1.0} if self.combined == "output" else epsilon(self.problem, point)

    def phi(self, start: Point, end: Point) -> tuple[float, float]:
        """(a, b) of x' = a x + b e."""
        a = end.alpha / start.alpha
        b = end.sigma - a * start.sigma
        if self.combined == "output":
            return a + b * start.noise.x, b * start.noise.m
        return a, b


def _rows(solver: _Solver, runge_kutta: bool) -> Iterator[Row]:
    problem, steps = solver.problem, solver.problem.grid.steps
    points = problem.points()
    for i, (start, following) in enumerate(pairwise(points)):
        end = stride_end(problem, start, points[-1]) if solver.stride else following
        last, inside = i + 1 == steps, start.alpha > 0.0 and following.sigma > 0.0
        if runge_kutta and inside and i < RUNGE_KUTTA_STEPS:
            yield from _runge_kutta(solver, start, following)
        elif not runge_kutta and inside and i == 0 and not last:
            yield from _corrected(solver, start, end, following)
        else:
            yield _multistep(solver, start, end, earlier=min(i, 3), keep=not last)


def _multistep(solver: _Solver, start: Point, end: Point, *, earlier: int, keep: bool) -> Row:
    slope = solver.slope(start)
    if start.alpha == 0.0:
        new_x = ddim_step(end, epsilon(solver.problem, start))
    else:
        new_x = _combined(solver, start, end, ADAMS_BASHFORTH[earlier])
    return make_row(solver.problem, start, new_x, to=end, history=slope if keep else None)


def _combined(solver: _Solver, start: Point, end: Point, weights: Sequence[float]) -> dict[str, float]:
    """phi(x, e), e the sum of weights * (newest, hist1, hist2, hist3)."""
    a, b = solver.phi(start, end)
    newest, *others = weights
    hist = {f"hist{j}": b * weight for j, weight in enumerate(others, start=1)}
    return total((a, {"x": 1.0}), (b * newest, solver.slope(start)), (1.0, hist))


def _corrected(solver: _Solver, start: Point, end: Point, following: Point) -> Iterator[Row]:
    """Two rows: the step to `end`, and the step again from the anchor, which has the first slope's half in it."""
    problem, again = solver.problem, start
    if solver.stride:
        end = replace(end, timestep=following.timestep)
        again = problem.at_timestep(following.timestep + stride_length(problem))
    first, second = solver.slope(start), solver.slope(end)
    (a, b), (a_again, b_again) = solver.phi(start, end), solver.phi(again, following)
    halfway = total((a_again, {"x": 1.0}), (b_again / 2, first))
    yield make_row(problem, start, total((a, {"x": 1.0}), (b, first)), to=end, anchor=halfway, history=first)
    yield make_row(problem, end, total((1.0, {"anchor": 1.0}), (b_again / 2, second)), to=following)


def _runge_kutta(solver: _Solver, start: Point, end: Point) -> Iterator[Row]:
    """Four rows. The anchor is x, and from the third row on x' but for the last slope's share; hist1 is k1."""
    problem = solver.problem
    first, second = _middles(solver, start, end)
    (a, b), (a1, b1), (a2, b2) = (solver.phi(start, point) for point in (end, first, second))
    k1, k2, k3, k4 = (solver.slope(point) for point in (start, first, second, end))
    x: dict[str, float] = {"anchor": 1.0}
    to_first = total((a1, {"x": 1.0}), (b1, k1))
    yield make_row(problem, start, to_first, to=first, anchor={"x": 1.0}, history=k1)
    yield make_row(problem, first, total((a2, x), (b2, k2)), to=second)
    # The state is a2 x + b2 k2 now, from which k2 comes back; where the middle is the start, k2 is k1.
    back = total((1.0 / b2, {"x": 1.0}), (-a2 / b2, x)) if b2 != 0.0 else {"hist1": 1.0}
    most = total((a, x), (b / 6, {"hist1": 1.0}), (b / 3, back), (b / 3, k3))
    yield make_row(problem, second, total((a, x), (b, k3)), to=end, anchor=most)
    yield make_row(problem, end, total((1.0, x), (b / 6, k4)), to=end)


def _middles(solver: _Solver, start: Point, end: Point) -> tuple[Point, Point]:
    """Where k2 and k3 are taken."""
    problem = solver.problem
    if not solver.stride:
        middle = problem.at_timestep(0.5 * (start.timestep + end.timestep))
        return middle, middle
    half = stride_length(problem) // 2
    second = problem.at_timestep(end.timestep + half)
    return replace(problem.at_timestep(start.timestep - half), timestep=second.timestep), second


# Slopes of points between which r falls by orders of magnitude do not average: the noisy end of the cosine schedule.
GRID = {"spacing": "karras"}
PAPER = "Liu et al. 2022, Pseudo Numerical Methods for Diffusion Models on Manifolds"
OPTIONS = {"previous_timestep": "grid", "combined": "noise"}
DIFFUSERS = {
    "spacing": "leading",
    "endpoint": True,
    "final_sigma": "schedule",
    "previous_timestep": "stride",
    "combined": "output",
}

PNDM = MethodInfo(
    name="pndm",
    paper=PAPER,
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=3,
    options=OPTIONS,
    diffusers=DIFFUSERS,
    rows=pndm,
    grid=GRID,
)
PLMS = MethodInfo(
    name="plms",
    paper=f"{PAPER}; Katherine Crowson's form in latent diffusion",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=3,
    options=OPTIONS,
    diffusers=DIFFUSERS,
    rows=plms,
    grid=GRID,
)
