"""The score SDE against diffusers: predictor and corrector at every level."""

from collections.abc import Callable, Iterator

import pytest
import torch
from drop_in import pair, relative
from torch import Tensor

NAME = "ScoreSdeVeScheduler"
SHAPE = (3, 2, 6, 6)
Score = Callable[[Tensor, float], Tensor]


def score(x: Tensor, sigma: float) -> Tensor:
    """Of data tanh(x), as a network with that much noise gives it."""
    return -(x - torch.tanh(x)) / sigma**2


def large(x: Tensor, sigma: float) -> Tensor:
    """Much larger, so that a step is all score."""
    return -0.5 * x / sigma**1.5


def exact(x: Tensor, sigma: float) -> Tensor:
    """Of data of size 1, of which the state has little: what is left of a large step is a small difference."""
    data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    return -(x - torch.tanh(x / (1.0 + sigma**2) + 0.5 * data)) / sigma**2


def schedulers(steps: int, config: dict, calls: dict, levels: int | None = None):
    both = pair(NAME, config)
    for scheduler in both:
        scheduler.set_timesteps(steps, **calls)
        scheduler.set_sigmas(steps if levels is None else levels, **calls)
    return both


def steps_of(both, network: Score, dtype: torch.dtype = torch.float32) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Their state through both, a corrector before each predictor: pairs (ours, theirs), and equal generators."""
    generators = [torch.Generator().manual_seed(5) for _ in both]
    theirs = both[1]
    x = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * theirs.init_noise_sigma).to(dtype)
    for t in theirs.timesteps:
        sigma = float(theirs.discrete_sigmas[int(t * (len(theirs.timesteps) - 1))])
        m = network(x, sigma)
        corrected = [
            scheduler.step_correct(m, x, generator=generator, return_dict=False)
            for scheduler, generator in zip(both, generators, strict=True)
        ]
        x = corrected[1][0].to(dtype)
        m = network(x, sigma)
        predicted = [
            scheduler.step_pred(m, t, x, generator=generator, return_dict=False)
            for scheduler, generator in zip(both, generators, strict=True)
        ]
        yield from zip([*corrected[0], *predicted[0]], [*corrected[1], *predicted[1]], strict=True)
        assert generators[0].get_state().equal(generators[1].get_state())
        x = predicted[1][0].to(dtype)


@pytest.mark.parametrize("network", [score, large])
@pytest.mark.parametrize(
    ("config", "calls"),
    [
        ({}, {}),
        ({"snr": 0.3, "sigma_max": 50.0, "num_train_timesteps": 100}, {}),
        ({"sampling_eps": 1e-3}, {}),
        ({}, {"sampling_eps": 0.01}),
    ],
    ids=["defaults", "other ends", "eps of the config", "eps of the call"],
)
def test_parity(config, calls, network):
    for steps in (1, 2, 20, 100):
        for our, their in steps_of(schedulers(steps, config, calls), network):
            assert our.dtype == their.dtype
            assert relative(our, their) < 1e-5


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 8, 9, 12])
@pytest.mark.parametrize("config", [{}, {"sigma_min": 0.002}, {"sigma_max": 80.0}], ids=str)
def test_few_steps(config, steps):
    """Each makes the state many times smaller, so that what is left of it is rounding as diffusers does it."""
    for our, their in steps_of(schedulers(steps, config, {}), exact):
        assert relative(our, their) < 1e-5


def test_usual_runs_have_a_row_for_each_step():
    for steps in (20, 100, 2000):
        ours, _ = schedulers(steps, {}, {})
        ours.step_pred(torch.ones(SHAPE), ours.timesteps[0], torch.ones(SHAPE))
        assert not ours._separate


def test_parity_of_thousands_of_levels():
    """Neighbours there differ by little more than float32 rounding of their squares."""
    ours, theirs = schedulers(2000, {"sigma_max": 20.0}, {})
    x = torch.randn(SHAPE)
    for t in theirs.timesteps[::50]:
        our, their = (s.step_pred(50.0 * x, t, x, generator=torch.Generator()).prev_sample_mean for s in (ours, theirs))
        assert relative(our, their) < 1e-6


def test_levels_of_another_count():
    """Timesteps are looked up among as many levels as there were when they were set."""
    for our, their in steps_of(schedulers(10, {}, {}, levels=40), score):
        assert relative(our, their) < 1e-5
    ours, theirs = schedulers(30, {}, {}, levels=20)
    x = torch.zeros(SHAPE)
    for scheduler in (ours, theirs):
        with pytest.raises(IndexError):
            scheduler.step_pred(x, scheduler.timesteps[0], x)


def test_levels_that_change():
    both = schedulers(10, {}, {})
    list(steps_of(both, score))
    for scheduler in both:
        scheduler.set_sigmas(10, sigma_max=100.0)
    for our, their in steps_of(both, score):
        assert relative(our, their) < 1e-5


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 4, 2, 6, 6)], ids=str)
def test_any_rank(shape):
    ours, theirs = schedulers(5, {}, {})
    x, m = torch.randn(2, *shape)
    t = theirs.timesteps[2]
    for step in (lambda s, g: s.step_pred(m, t, x, generator=g), lambda s, g: s.step_correct(m, x, generator=g)):
        our, their = (step(scheduler, torch.Generator()) for scheduler in (ours, theirs))
        assert relative(our.prev_sample, their.prev_sample) < 1e-5


@pytest.mark.parametrize("time", [0.7, torch.tensor([0.7]), torch.tensor([0.2, 0.7, 1.0])], ids=repr)
def test_other_times(time):
    ours, theirs = schedulers(11, {}, {})
    x = torch.randn(SHAPE)
    our, their = (scheduler.step_pred(x, time, x, generator=torch.Generator()) for scheduler in (ours, theirs))
    assert relative(our.prev_sample, their.prev_sample) < 1e-5
    assert relative(our.prev_sample_mean, their.prev_sample_mean) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype):
    """float32 results, as theirs, at least as near to those of the same tensors in float32."""
    ours, theirs = schedulers(8, {"sigma_max": 50.0}, {})
    x, m = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(scheduler, t, x, m):
        options = {"generator": torch.Generator().manual_seed(2), "return_dict": False}
        return *scheduler.step_pred(m, t, x, **options), *scheduler.step_correct(m, x, **options)

    for t in theirs.timesteps:
        # The noise of a prediction has the dtype of the state, so that only its mean is that of float32 tensors.
        _, *truth = step(theirs, t, x.float(), m.float())
        (our_state, *our), (their_state, *their) = (step(scheduler, t, x, m) for scheduler in (ours, theirs))
        for ours_is, theirs_is, exact in zip(our, their, truth, strict=True):
            assert ours_is.dtype == theirs_is.dtype == torch.float32
            assert relative(ours_is, exact) <= 1.01 * relative(theirs_is, exact) + 2.0**-23
        assert our_state.dtype == torch.float32
        assert relative(our_state, their_state) < 1e-5


def test_gradients():
    results = []
    for scheduler in schedulers(4, {"sigma_max": 10.0}, {}):
        x = torch.ones(SHAPE, requires_grad=True)
        generator = torch.Generator()
        y = scheduler.step_correct(torch.sin(x), x, generator=generator).prev_sample
        scheduler.step_pred(torch.sin(y), scheduler.timesteps[1], y, generator=generator).prev_sample.sum().backward()
        results.append(x.grad)
    assert relative(*results) < 1e-5


def test_steps_need_timesteps():
    x = torch.zeros(SHAPE)
    for scheduler in pair(NAME):
        scheduler.timesteps = None
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step_pred(x, 0.5, x)
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step_correct(x, x)
