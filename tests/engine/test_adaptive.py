"""Adaptive steps: k-diffusion's numbers, the exact flow of the mixture, independence of the batch, what is refused."""

import math
import sys

import k_diffusion_peer
import numpy as np
import pytest
import torch
from convergence import QUANTILES
from mixture import Mixture

import fastdiff
from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP
from fastdiff.ops import philox_normal

SHAPE = (2, 3, 8, 8)
VE = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)
VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
ENDS = {"sigma_min": 0.05, "sigma_max": 50.0}

METHODS = ["dpm_adaptive", "rk45"]


def small_network() -> torch.nn.Module:
    """A random data prediction, of two layers, that depends on the noise level."""
    torch.manual_seed(3)
    first, second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        hidden = torch.sin(first(x / (1.0 + level**2).sqrt()) + level.log() / 4.0)
        return torch.tanh(second(hidden))

    return denoise


def mixture_network(schedule: schedules.Schedule, prediction: str):
    exact = Mixture().denoiser(schedule, prediction)

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        outputs = [exact(sample.double().numpy(), float(time)) for sample, time in zip(x, t, strict=True)]
        return torch.from_numpy(np.stack(outputs)).to(x.dtype)

    return denoiser


def quantiles(schedule: schedules.Schedule, ratio: float) -> np.ndarray:
    """Of y = x / alpha where sigma / alpha is `ratio`."""
    alpha, sigma = map(float, schedule.from_ratio(ratio))
    return Mixture().quantile(QUANTILES, alpha, sigma) / alpha


def flow_error(method: str, schedule: schedules.Schedule, prediction: str, tolerance: float, **options) -> float:
    """Root mean square distance from the exact quantiles at the last level."""
    x = torch.from_numpy(quantiles(schedule, ENDS["sigma_max"])).float()[None]
    tolerances = {"rtol": tolerance, "atol": tolerance}
    result = fastdiff.run_adaptive(
        mixture_network(schedule, prediction),
        **{"method": method, "schedule": schedule, "prediction": prediction, "shape": x.shape, "seeds": [0], "x": x},
        **{**ENDS, "final_sigma": "schedule", **tolerances, **options},
    )
    return float(np.sqrt(np.mean((result.x[0].double().numpy() - quantiles(schedule, ENDS["sigma_min"])) ** 2)))


def run(method: str = "dpm_adaptive", seeds=(1, 2), **options):
    network = small_network()
    arguments = {"method": method, "schedule": VE, "prediction": "sample", "shape": (len(seeds), 3, 8, 8)}
    return fastdiff.run_adaptive(lambda x, t: network(x, t), seeds=seeds, **{**arguments, **options})


PARITY = {
    "order-3": {},
    "order-2": {"order": 2},
    "tight": {"rtol": 0.002, "atol": 0.001},
    "pid": {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1, "accept_safety": 0.9},
    "long-first-step": {"h_init": 4.0},
    "ancestral": {"eta": 0.7, "s_noise": 0.9},
}


@pytest.mark.parametrize("case", PARITY)
def test_k_diffusion_parity(case):
    """The same steps, tries and samples; k-diffusion evaluates anew where a try starts from the same state."""
    options, network, seeds = PARITY[case], small_network(), torch.tensor([1, 2])
    x = 80.0 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    drawn = (philox_normal(seeds, SHAPE, step=step, stream=STREAM_STEP) for step in range(1000))
    theirs, info = k_diffusion_peer.load().sampling.sample_dpm_adaptive(
        network, x, 0.02, 80.0, disable=True, noise_sampler=lambda *_: next(drawn), return_info=True, **options
    )
    ends = {"sigma_min": 0.02, "sigma_max": 80.0, "final_sigma": "schedule"}
    ours = run(x=x, per_sample=False, **ends, **options)
    assert (ours.accepted, ours.rejected) == (info["n_accept"], info["n_reject"])
    assert ours.evaluations == info["nfe"] - info["n_reject"]
    assert float((ours.x - theirs).norm() / theirs.norm()) < 1e-5


def test_parity_has_rejected_steps():
    assert run(x=80.0 * torch.ones(SHAPE), per_sample=False, h_init=4.0).rejected > 0


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(VP, "v"), (VP, "epsilon"), (FLOW, "flow")], ids=lambda v: getattr(v, "name", v)
)
@pytest.mark.parametrize("method", METHODS)
def test_converges_to_the_exact_flow(method, schedule, prediction):
    """The error falls with the tolerance: by more than 300 where that falls by 1000."""
    errors = [flow_error(method, schedule, prediction, tolerance) for tolerance in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 300.0, errors
    assert errors[-1] < 1e-4, errors


def test_the_second_order_pair_converges():
    errors = [flow_error("dpm_adaptive", VP, "v", tolerance, order=2) for tolerance in (1e-2, 1e-3, 1e-4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 30.0, errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "schedule", [VP, FLOW, VE, schedules.cosine(1000), schedules.sub_vp_sde(1000)], ids=lambda s: s.name
)
def test_default_ends_on_every_schedule(method, schedule):
    """From pure noise to the data: the first and second moments of the mixture, within four standard errors."""
    count = 4000
    result = fastdiff.run_adaptive(
        mixture_network(schedule, "sample"),
        **{"method": method, "schedule": schedule, "prediction": "sample", "shape": (1, count), "seeds": [7]},
    )
    mean, variance = Mixture().moments()
    found = result.x.double()
    assert abs(float(found.mean()) - mean) < 4.0 * math.sqrt(variance / count)
    assert abs(float(found.var()) / variance - 1.0) < 4.0 * math.sqrt(2.0 / count)


def test_steps_with_noise_leave_the_distribution():
    count = 4000
    result = fastdiff.run_adaptive(
        mixture_network(VP, "v"),
        **{"method": "dpm_adaptive", "schedule": VP, "prediction": "v", "shape": (1, count), "seeds": [7], "eta": 1.0},
        **{"rtol": 0.01, "atol": 0.002},
    )
    mean, variance = Mixture().moments()
    found = result.x.double()
    assert abs(float(found.mean()) - mean) < 4.0 * math.sqrt(variance / count)
    assert abs(float(found.var()) / variance - 1.0) < 4.0 * math.sqrt(2.0 / count) + 0.02


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}, {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1}], ids=str)
def test_a_sample_depends_on_its_own_seed(options):
    """In a batch whose other samples need other steps."""
    together, alone = run(seeds=(11, 12, 13), **options), run(seeds=(12,), **options)
    torch.testing.assert_close(together.x[1:2], alone.x, rtol=0.0, atol=2e-6)
    assert together.accepted >= alone.accepted
    assert not torch.equal(together.x[0], together.x[1])


@pytest.mark.parametrize("method", METHODS)
def test_one_step_size_for_the_batch_depends_on_it(method):
    """What per_sample is for, and what rk45 cannot do: within the tolerance, but not to the last digits."""
    options = {"per_sample": False} if method == "dpm_adaptive" else {"rtol": 1e-3, "atol": 1e-3}
    together, alone = run(method, seeds=(11, 12, 13), **options), run(method, seeds=(12,), **options)
    difference = float((together.x[1:2] - alone.x).abs().max())
    assert 5e-6 < difference < 0.05


def test_guidance_is_a_mixed_output():
    network, given = small_network(), []

    def both(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given.append((x.shape[0], t.shape[0]))
        return torch.cat([0.5 * network(x[:2], t[:2]), network(x[2:], t[2:])])

    arguments = {"method": "dpm_adaptive", "schedule": VE, "prediction": "sample", "shape": SHAPE, "seeds": (1, 2)}
    guided = fastdiff.run_adaptive(both, guidance=3.0, **arguments)
    plain = fastdiff.run_adaptive(lambda x, t: 2.0 * network(x, t), **arguments)
    assert set(given) == {(4, 4)}
    assert (guided.accepted, guided.rejected) == (plain.accepted, plain.rejected)
    assert float((guided.x - plain.x).norm() / plain.x.norm()) < 1e-5


def test_clip_bounds_the_samples():
    assert float(run(clip=0.125).x.abs().max()) == 0.125
    assert float(run().x.abs().max()) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_callback_and_counts(method):
    seen = []
    result = run(method, callback=seen.append, final_sigma="schedule")
    tries = [step.accepted for step in seen]
    assert max(sum(column) for column in zip(*tries, strict=True)) == result.accepted
    ratios = [max(step.ratios) for step in seen]
    assert ratios == sorted(ratios, reverse=True)
    if method == "dpm_adaptive":
        assert ratios[-1] == pytest.approx(0.02)
        calls = np.diff([0, *(step.evaluations for step in seen)])
        assert set(calls.tolist()) <= {2, 3}
        assert torch.equal(seen[-1].x, result.x)
    assert seen[-1].evaluations <= result.evaluations
    assert run(method).evaluations == result.evaluations + 1


def test_a_try_in_vain_calls_the_network_less():
    """Three calls a step, two where the state has not moved since the last."""
    result = run(seeds=(1,), h_init=4.0, final_sigma="schedule")
    assert result.rejected > 0
    assert result.evaluations == 3 * result.accepted + 2 * result.rejected


def test_half_precision_network():
    network = small_network()

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert (x.dtype, t.dtype) == (torch.bfloat16, torch.float32)
        return network(x.float(), t).to(x.dtype)

    arguments = {"method": "dpm_adaptive", "schedule": VE, "prediction": "sample", "shape": SHAPE, "seeds": (1, 2)}
    result = fastdiff.run_adaptive(denoiser, dtype=torch.bfloat16, **arguments).x
    assert result.dtype == torch.float32
    assert float((result - run().x).norm() / run().x.norm()) < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "euler"}, "expected one of dpm_adaptive, rk45, got 'euler'"),
        ({"rtoll": 1.0}, "no option 'rtoll'; did you mean 'rtol'"),
        ({"method": "rk45", "order": 3}, "rk45: no option 'order'"),
        ({"order": 4}, "order: expected a whole number from 2 to 3, got 4"),
        ({"rtol": 0.0}, "rtol: expected a positive number, got 0"),
        ({"h_init": 0}, "h_init: expected a positive number"),
        ({"eta": 1.5}, "eta: expected a number from 0 to 1"),
        ({"per_sample": 1}, "per_sample: expected True or False, got 1"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max, got 2 and 1"),
        ({"sigma_min": 0.0}, "sigma_min: expected a positive number"),
        ({"final_sigma": "last"}, "final_sigma: expected zero or schedule, got 'last'"),
        ({"shape": (3, 3, 8, 8)}, "seeds: expected 3"),
        ({"shape": ()}, "shape: expected"),
        ({"shape": 3}, "shape: expected the positive sizes of the batch .*, got 3"),
        ({"x": [1.0]}, r"x: expected a tensor, got list"),
        ({"method": ["rk45"]}, "method: expected one of dpm_adaptive, rk45"),
        ({"s_noise": "1"}, "dpm_adaptive: s_noise: expected a number from 0 to 10, got '1'"),
        ({"atol": True}, "dpm_adaptive: atol: expected a number from 0 to 1, got True"),
        ({"accept_safety": math.nan}, "dpm_adaptive: accept_safety: expected a number from 0 to 1, got nan"),
        ({"pcoeff": -1.0}, "dpm_adaptive: pcoeff: expected a number from 0 to 10, got -1.0"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
        ({"guidance": math.nan}, "guidance: expected a finite number"),
        ({"clip": 0.0}, "clip: expected a positive number"),
        ({"schedule": "cosine"}, "schedule: expected a Schedule"),
        ({"prediction": "v"}, "'v' does not fit the ve schedule"),
        ({"x": torch.zeros(2, 3, 8, 7)}, r"x: expected float32 \(2, 3, 8, 8\)"),
        ({"max_steps": 5}, "0.05 and 0.0078 are not met within max_steps=5"),
        ({"max_steps": 0}, "max_steps: expected a whole number from 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=words):
        run(**options)


def test_rk45_says_that_the_tolerances_are_too_tight():
    with pytest.raises(InputError, match="1e-12 and 1e-05 are not met within max_steps=20"):
        run("rk45", rtol=1e-12, max_steps=20)


def test_rk45_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(InputError, match=r"pip install 'fastdiff-engine\[adaptive\]'"):
        run("rk45")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda x, t: x * math.nan, "not finite at t = "),
        (lambda x, t: x[:, :2], r"expected an output of shape \(2, 3, 8, 8\), got \(2, 2, 8, 8\)"),
        (lambda x, t: None, "got NoneType"),
    ],
    ids=["nan", "shape", "none"],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_networks(method, broken, words):
    with pytest.raises(InputError, match=words):
        fastdiff.run_adaptive(broken, method=method, schedule=VE, prediction="sample", shape=SHAPE, seeds=(1, 2))


def test_build_names_run_adaptive():
    for method in samplers.ADAPTIVE:
        with pytest.raises(InputError, match=r"fastdiff\.run_adaptive"):
            samplers.build(method, schedule=VP, steps=10)
