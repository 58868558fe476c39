"""DPM-Solver's methods against k-diffusion's samplers: the state before every network call."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from k_diffusion_peer import load
from k_diffusion_steps import SCHEDULE, SHAPE, assert_parity, denoise, noises, our_states, start, their_states

from fastdiff import samplers

FULL = {"lower_order_final": False}


def levels(steps: int, *, to_data: bool = True) -> torch.Tensor:
    """Their grid, from which they compute in its dtype: in float32 a long ancestral step's difference of squares loses
    five digits."""
    sigmas = load().sampling.get_sigmas_karras(steps, 0.05, 60.0).double()
    return sigmas if to_data else sigmas[:-1]


CASES = [
    ("dpmpp_2m", "dpmpp_2m", {}, FULL),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {"eta": 1.0, "s_noise": 1.1}, {"s_noise": 1.1}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}, {"eta": 0.5, "solver": "heun"}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {"eta": 0.0}, {"eta": 0.0}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"s_noise": 1.1}, {"s_noise": 1.1, "curvature": "half"}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"eta": 0.5}, {"eta": 0.5, "curvature": "half"}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"s_noise": 1.1}, {"s_noise": 1.1}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.5}, {"eta": 0.5}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.0}, {"eta": 0.0}),
    ("dpmpp_sde", "dpmpp_sde", {"s_noise": 1.1}, {"s_noise": 1.1, "noise": "independent"}),
    ("dpmpp_sde", "dpmpp_sde", {"eta": 0.5, "r": 0.3}, {"eta": 0.5, "r": 0.3, "noise": "independent"}),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("to_data", [True, False], ids=["to-data", "to-noise"])
@pytest.mark.parametrize(("method", "name", "their", "ours"), CASES, ids=str)
def test_samplers(method, name, their, ours, to_data, steps):
    if (name, steps, to_data) in [("dpmpp_2m_sde", 1, True), ("dpmpp_3m_sde", 1, True)]:
        # Theirs reads a variable that such a run never sets; ours gives the data prediction.
        with pytest.raises(UnboundLocalError):
            their_states(name, levels(1), noise_sampler=True)
        return
    if name != "dpmpp_2m":
        their = {**their, "noise_sampler": True}
    if "m" in method.removeprefix("dpmpp_"):
        ours = {**ours, **FULL}
    if not to_data:
        ours = {**ours, "final_sigma": "last"}
    assert_parity(method, name, levels(steps + (not to_data), to_data=to_data), their=their, **ours)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 12, 13, 14])
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (1.0, 1.0), (0.6, 1.1)])
def test_dpm_fast(evaluations, eta, s_noise, monkeypatch):
    """Its points are even in log sigma; noise is drawn at every step and added where eta > 0, but at the last.

    In float32 one step of theirs over the whole range would cancel numbers as many times larger than what is left.
    """
    steps = evaluations // 3 + 1
    sigmas = torch.linspace(math.log(8.0), math.log(0.3), steps + 1, dtype=torch.float64).exp()
    table = samplers.build(
        "dpm_solver_singlestep",
        schedule=SCHEDULE,
        prediction="sample",
        sigmas=sigmas.tolist(),
        final_sigma="last",
        order=3,
        evaluations=evaluations,
        eta=eta,
        s_noise=s_noise,
    )
    assert len(table) == evaluations
    states, calls, drawn = [], [], iter([noise for noise, _ in zip(noises(), range(steps), strict=False)])

    def model(x, sigma):
        states.append(x.clone())
        calls.append(float(sigma[0]))
        return denoise(x, calls[-1])

    options = {"eta": eta, "s_noise": s_noise, "noise_sampler": lambda *_: next(drawn), "disable": True}
    sampler, x = load().sampling.sample_dpm_fast, start(8.0)
    with monkeypatch.context() as patch:
        # They make their levels in the default dtype.
        patch.setattr(torch, "linspace", partial(torch.linspace, dtype=torch.float64))
        patch.setattr(torch, "tensor", partial(torch.tensor, dtype=torch.float64))
        result = sampler(model, x, 0.3, 8.0, evaluations, **options)
    torch.testing.assert_close(torch.tensor(table.timesteps), torch.tensor(calls).double(), rtol=1e-5, atol=0.0)
    for ours, theirs in zip(our_states(table), [*states[1:], result], strict=True):
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < 1e-5


@pytest.mark.parametrize("seed", [4, 5])
def test_their_brownian_path_can_be_handed_in(seed):
    """With noise="independent" a caller's draws from one path take the place of ours, both of each step."""
    sigmas, sampling = levels(6), load().sampling
    table = samplers.build(
        "dpmpp_sde", schedule=SCHEDULE, prediction="sample", sigmas=sigmas.tolist(), noise="independent"
    )
    tree = sampling.BrownianTreeNoiseSampler(torch.zeros(SHAPE), sigmas[-2], sigmas[0], seed=seed)
    expected = sampling.sample_dpmpp_sde(
        lambda x, sigma: denoise(x, float(sigma[0])), start(float(sigmas[0])), sigmas, noise_sampler=tree, disable=True
    )
    spans = []
    for high, low in pairwise(sigmas[:-1]):
        spans += [(high, (high * low).sqrt()), (high, low)]
    *_, found = our_states(table, (tree(high, low).float() for high, low in spans))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
