"""The wrappers of networks that predict noise or v, against k-diffusion's: the same numbers, bit for bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from k_diffusion_drop_in import SHAPE, assert_parity, karras, start
from k_diffusion_peer import load
from torch import nn

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import external as ours

theirs = load().external
ALPHAS = torch.linspace(1.0 - 1e-4, 1.0 - 0.02, 1000, dtype=torch.float64).cumprod(0).float()
SIGMAS = torch.tensor([0.7, 11.0])


class Network(nn.Module):
    """(x, t, cond) -> as many channels, or twice as many."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, channels, 3, padding=1)
        self.alphas_cumprod = ALPHAS

    def forward(self, x, t, cond=0.0):
        return self.convolution(x) * torch.cos(t * 0.01).view(-1, 1, 1, 1) + cond

    def apply_model(self, x, t, cond=0.0):
        return self(x, t, cond)


DIFFUSION = SimpleNamespace(alphas_cumprod=ALPHAS.double().numpy())
WRAPPERS = {
    "v": lambda module: module.VDenoiser(Network()),
    "eps": lambda module: module.DiscreteEpsDDPMDenoiser(Network(), ALPHAS, False),
    "eps-quantized": lambda module: module.DiscreteEpsDDPMDenoiser(Network(), ALPHAS, True),
    "discrete-v": lambda module: module.DiscreteVDDPMDenoiser(Network(), ALPHAS, False),
    "discrete-v-quantized": lambda module: module.DiscreteVDDPMDenoiser(Network(), ALPHAS, quantize=True),
    "openai": lambda module: module.OpenAIDenoiser(Network(), DIFFUSION, has_learned_sigmas=False),
    "openai-variance": lambda module: module.OpenAIDenoiser(Network(6), DIFFUSION, quantize=True),
    "compvis": lambda module: module.CompVisDenoiser(Network()),
    "compvis-quantized": lambda module: module.CompVisDenoiser(Network(), quantize=True),
    "compvis-v": lambda module: module.CompVisVDenoiser(Network()),
}


@pytest.fixture(params=WRAPPERS)
def pair(request):
    return tuple(WRAPPERS[request.param](module) for module in (ours, theirs))


def test_forward_and_loss(pair):
    x, noise = start(3.0), start(1.0).flip(0)
    given = {"cond": 0.3}
    results = [
        [each(x, SIGMAS, **given), each.loss(x, noise, SIGMAS, **given), *each.get_scalings(SIGMAS), each.sigma_data]
        for each in pair
    ]
    for mine, other in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_gradients(pair):
    gradients = []
    for each in pair:
        each.loss(start(3.0), start(1.0).flip(0), SIGMAS, cond=0.0).sum().backward()
        gradients.append([value.grad for value in each.parameters()])
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


def test_state(pair):
    """The same buffers and parameters, which load into one another."""
    mine, other = pair
    assert mine.state_dict().keys() == other.state_dict().keys()
    mine.load_state_dict(other.state_dict())
    assert copy.deepcopy(mine).state_dict().keys() == mine.state_dict().keys()


@pytest.mark.parametrize("name", ["VDenoiser", "DiscreteSchedule"])
@pytest.mark.parametrize("quantize", [False, True, None])
def test_times_and_levels(name, quantize):
    both = []
    for module in (ours, theirs):
        if name == "VDenoiser":
            both.append(module.VDenoiser(Network()))
        else:
            both.append(module.DiscreteSchedule(((1 - ALPHAS) / ALPHAS) ** 0.5, True))
    options = {} if name == "VDenoiser" else {"quantize": quantize}
    levels = torch.cat([torch.logspace(-4, 4, 101), both[0].sigmas[::97] if options else torch.empty(0)])
    mine, other = (each.sigma_to_t(levels, **options) for each in both)
    assert torch.equal(mine, other)
    assert torch.equal(*(each.sigma_to_t(torch.tensor(3.0), **options) for each in both))
    times = torch.linspace(0, 0.9, 50) * (999 if options else 1)
    assert torch.equal(*(each.t_to_sigma(times) for each in both))


@pytest.mark.parametrize("count", [None, 1, 7, 1000])
def test_discrete_levels(count):
    mine, other = (module.CompVisDenoiser(Network()) for module in (ours, theirs))
    assert torch.equal(mine.get_sigmas(count), other.get_sigmas(count))
    assert torch.equal(mine.sigma_min, other.sigma_min)
    assert torch.equal(mine.sigma_max, other.sigma_max)


def test_a_sampler_with_a_wrapper():
    model = ours.CompVisDenoiser(Network())
    assert_parity("dpmpp_2m", start(10.0), karras(6, 0.05, 10.0), model=model, extra_args={"cond": 0.1})


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], torch.ones(2, 2), torch.ones(1)], ids=["list", "matrix", "one"])
def test_a_schedule_has_timesteps(sigmas):
    with pytest.raises(InputError, match="sigmas: expected a tensor of two timesteps or more"):
        ours.DiscreteSchedule(sigmas, False)


def test_dimensions_of_sigma():
    with pytest.raises(InputError, match="expected at most target_dims = 4"):
        ours.VDenoiser(Network())(start(), torch.ones(2, 1, 1, 1, 1), cond=torch.zeros(SHAPE))
