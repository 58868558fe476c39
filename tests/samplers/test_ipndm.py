"""iPNDM against loops of its own, its orders, and diffusers."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from convergence import assert_graded_order, assert_order, distance, graded_levels
from diffusers_peer import SHAPE, network, relative
from interpret import trajectory
from mixture import Mixture

from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_X

VP, FLOW, MIXTURE = schedules.linear(1000), schedules.flow(1000, shift=2.0), Mixture()
EQUAL = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def released(h):
    """The weights of the released code for steps h, newest first, written out."""
    if len(h) == 1:
        return [1.0]
    q = h[0] / h[1]
    if len(h) == 2:
        return [(2 + q) / 2, -q / 2]
    t1 = (1 - h[0] / (3 * (h[0] + h[1])) * (h[0] * (h[0] + h[1])) / (h[1] * (h[1] + h[2]))) / 2
    if len(h) == 3:
        return [(2 + q) / 2 + t1, -q / 2 - (1 + h[1] / h[2]) * t1, t1 * h[1] / h[2]]
    t2 = (1 - h[0] / (3 * (h[0] + h[1]))) / 2
    t2 += (1 - h[0] / (2 * (h[0] + h[1]))) * h[0] / (6 * (h[0] + h[1] + h[2]))
    t2 *= h[0] * (h[0] + h[1]) * (h[0] + h[1] + h[2]) / (h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3]))
    p = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
    return [
        (2 + q) / 2 + t1 + t2,
        -q / 2 - (1 + h[1] / h[2]) * t1 - (1 + h[1] / h[2] + p) * t2,
        t1 * h[1] / h[2] + (h[1] / h[2] + p * (1 + h[2] / h[3])) * t2,
        -t2 * p * h[1] / h[2],
    ]


def integrated(nodes, end):
    """1/h times the integrals of the Lagrange polynomials, by solving for the moments."""
    u = (np.array(nodes) - nodes[0]) / (end - nodes[0])
    powers = np.arange(len(u))
    return np.linalg.solve(u[None, :] ** powers[:, None], 1.0 / (powers + 1.0))


def loop(grid, schedule, x, order, weights, final):
    states, slopes = [], []
    points = list(zip(grid.alphas, grid.sigmas, strict=True))
    ratios = [sigma / alpha if alpha else math.inf for alpha, sigma in points]
    for i, ((alpha, sigma), (alpha1, sigma1)) in enumerate(pairwise(points)):
        data = MIXTURE.denoise(x, alpha, sigma)
        slopes = [(x - alpha * data) / sigma, *slopes[: order - 1]]
        used = slopes[:1] if final and sigma1 == 0.0 else slopes
        nodes = [ratios[i - j] for j in range(len(used)) if math.isfinite(ratios[i - j]) or j == 0]
        if weights == "equal":
            b = EQUAL[len(used)]
        elif weights == "exact":
            b = integrated(nodes, ratios[i + 1]) if math.isfinite(nodes[0]) else [1.0]
        else:
            b = released([later - earlier for later, earlier in pairwise([ratios[i + 1], *nodes])])
        e = sum(w * slope for w, slope in zip(b, used, strict=False))
        if alpha == 0.0:
            x = alpha1 * data + sigma1 * slopes[0]
        else:
            x = alpha1 / alpha * x + (sigma1 - alpha1 * sigma / alpha) * e
        states.append(x)
    return states


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(
    ("method", "weights"), [("ipndm", "equal"), ("ipndm_v", "exact"), ("ipndm_v", "published")], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_against_a_loop(method, weights, final, order, steps):
    options = {"order": order, "lower_order_final": final, "spacing": "karras"}
    options |= {} if method == "ipndm" else {"weights": weights}
    table = samplers.build(method, schedule=VP, steps=steps, prediction="v", **options)
    x = np.random.default_rng(0).standard_normal(30)
    found = trajectory(MIXTURE.denoiser(VP, "v"), table, x)
    for ours, right in zip(found, loop(table.grid, VP, x, order, weights, final), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ipndm", "ipndm_v"])
def test_a_start_without_signal(method):
    """The flow schedule's t = 1, where the first data prediction comes from the network alone."""
    table = samplers.build(method, schedule=FLOW, steps=9, prediction="flow")
    assert table.grid.alphas[0] == 0.0
    x = np.random.default_rng(0).standard_normal(30)
    weights = "equal" if method == "ipndm" else "exact"
    *found, last = trajectory(MIXTURE.denoiser(FLOW, "flow"), table, x)
    *expected, end = loop(table.grid, FLOW, x, 4, weights, True)
    for ours, right in zip([*found, last], [*expected, end], strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


def test_ipndm_v_is_lms():
    options = {"schedule": VP, "steps": 10, "prediction": "v", "spacing": "karras"}
    lms, v = samplers.build("lms", **options), samplers.build("ipndm_v", lower_order_final=False, **options)
    x = np.random.default_rng(0).standard_normal(20)
    alphas = lms.grid.alphas
    pairs = zip(
        trajectory(MIXTURE.denoiser(VP, "v"), lms, x / alphas[0]),
        trajectory(MIXTURE.denoiser(VP, "v"), v, x),
        alphas[1:],
        strict=True,
    )
    for in_y, in_x, alpha in pairs:
        np.testing.assert_allclose(alpha * in_y, in_x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_is_of_order_2(order, spacing):
    assert_order(2, "ipndm", VP, "v", spacing, order=order)
    assert samplers.methods()["ipndm"].order == 2


def test_ipndm_of_order_1_is_ddim():
    options = {"schedule": VP, "steps": 10, "prediction": "v", "spacing": "karras"}
    ddim, ipndm = samplers.build("ddim", **options), samplers.build("ipndm", order=1, **options)
    np.testing.assert_allclose(ipndm.rows, ddim.rows, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_has_the_order_it_says(order):
    assert_graded_order(order, "ipndm_v", VP, "v", order=order)
    assert samplers.methods()["ipndm_v"].order == 4


def test_the_published_weights_do_not():
    options = {"schedule": VP, "prediction": "v", "final_sigma": "last"}
    errors = {}
    for weights in ("exact", "published"):
        tables = [
            samplers.build("ipndm_v", sigmas=graded_levels(steps), weights=weights, **options) for steps in (160, 320)
        ]
        errors[weights] = [distance(table, VP) for table in tables]
    assert np.log2(errors["exact"][0] / errors["exact"][1]) > 3.8
    assert np.log2(errors["published"][0] / errors["published"][1]) < 1.5
    assert errors["published"][1] > 1000 * errors["exact"][1]


@pytest.mark.parametrize(("order", "same"), [(2, True), (3, True), (4, False)])
def test_the_published_weights_on_equal_steps(order, same):
    """The sign in the fourth order's weights is wrong even there."""
    options = {"schedule": VP, "prediction": "v", "sigmas": [10.0, 9.0, 8.0, 7.0, 6.0, 5.0], "final_sigma": "last"}
    exact, published = (samplers.build("ipndm_v", order=order, weights=w, **options) for w in ("exact", "published"))
    assert np.allclose(exact.rows[:, NEW_X], published.rows[:, NEW_X], rtol=1e-9, atol=1e-12) == same


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 50])
def test_diffusers(steps):
    """Its schedule is `schedules.crash`, its network predicts v."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    schedule = schedules.crash(max(steps, 2))
    defaults = samplers.methods()["ipndm"].diffusers
    table = samplers.build("ipndm", schedule=schedule, steps=steps, prediction="v", **defaults)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-5)
    x, history = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), ()
    for index, t in enumerate(scheduler.timesteps):
        m = network(schedule, "v", x, float(t))
        theirs = scheduler.step(m, t, x).prev_sample
        use = table.uses[index]
        given = {"history": history[: use.history], "new_history": use.new_history}
        step = ops.sampler_step(x, m, table.tensor(), index, **given)
        history = history if step.history is None else (step.history, *history[:2])
        # The single step of theirs is 0: it loses the data prediction, and ends at sigma = 0.
        assert float((step.x - theirs).norm()) <= 1e-5 * float(theirs.norm())
        x = theirs


def test_diffusers_loses_the_first_data_prediction():
    """At alpha = 0 theirs divides x - sigma epsilon, which is 0, by 1e-8; the data prediction is -v."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(5)
    x, v = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    theirs = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    table = samplers.build("ipndm", schedule=schedules.crash(5), steps=5, prediction="v", spacing="trailing")
    alpha, sigma = table.grid.alphas[1], table.grid.sigmas[1]
    ours = ops.sampler_step(x, v, table.tensor(), 0, new_history=True).x
    assert relative(ours, sigma * x - alpha * v) < 1e-6
    assert relative(theirs, sigma * x) < 1e-6


@pytest.mark.parametrize("clip", [None, 0.4])
def test_clipped_epsilon_leads_to_the_clipped_data(clip):
    """With D clipped, what the history keeps is (x - alpha D)/sigma."""
    table = samplers.build("ipndm", schedule=VP, steps=4, prediction="v", clip=clip, lower_order_final=False)
    (alpha, sigma), (alpha1, sigma1), (alpha2, sigma2) = zip(table.grid.alphas[:3], table.grid.sigmas[:3], strict=True)
    x, v = np.array([0.9]), np.array([-1.3])
    first, second, *_ = trajectory(lambda *_: v, table, x)

    def split(x, alpha, sigma):
        data = alpha * x - sigma * v
        if clip is None:
            return data, alpha * v + sigma * x
        data = np.clip(data, -clip, clip)
        return data, (x - alpha * data) / sigma

    data, e1 = split(x, alpha, sigma)
    np.testing.assert_allclose(first, alpha1 * data + sigma1 * e1, rtol=1e-12)
    data, e0 = split(first, alpha1, sigma1)
    e = 1.5 * e0 - 0.5 * e1
    np.testing.assert_allclose(second, alpha2 / alpha1 * first + (sigma2 - alpha2 * sigma1 / alpha1) * e, rtol=1e-9)


def test_the_last_row_of_order_1_reads_no_history():
    table = samplers.build("ipndm", schedule=VP, steps=6, prediction="v")
    assert [use.history for use in table.uses] == [0, 1, 2, 3, 3, 0]
    assert [use.new_history for use in table.uses] == [True] * 4 + [False] * 2
    assert table.rows[-1, NEW_X][INPUTS.index("D")] == 1.0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ipndm", {"order": 5}, "ipndm: order: expected a whole number from 1 to 4, got 5"),
        ("ipndm_v", {"order": 0}, "ipndm_v: order: expected"),
        ("ipndm_v", {"weights": "equal"}, "ipndm_v: weights: expected one of exact, published"),
        ("ipndm", {"schedule": FLOW, "prediction": "sample"}, None),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message):
    given = {"schedule": VP, "steps": 5, "prediction": "v", **options}
    if message is None:
        samplers.build(method, **given)
        return
    with pytest.raises(InputError, match=message):
        samplers.build(method, **given)
