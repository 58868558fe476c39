"""k-diffusion's names and signatures, what the loop asks of a device, and how bad arguments are refused."""

import inspect
import subprocess
import sys

import pytest
import torch
from k_diffusion_drop_in import denoiser, karras, start
from k_diffusion_peer import load
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion import sampling as ours

SIGMAS = [
    name
    for name in ours.__all__
    if name.startswith("sample_") and name not in ("sample_dpm_fast", "sample_dpm_adaptive")
]
NOISY = [name for name in SIGMAS if "noise_sampler" in inspect.signature(getattr(ours, name)).parameters]
WHOLE = {"sample_dpm_fast": (0.3, 20.0, 7), "sample_dpm_adaptive": (0.3, 20.0)}


def functions(module):
    return {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}


@pytest.mark.parametrize("part", ["sampling", "external"])
def test_names_and_signatures(part):
    """Every function and class of theirs but the solver object that sample_dpm_fast and sample_dpm_adaptive make."""
    module, peer = getattr(k_diffusion, part), getattr(load(), part)
    for name, theirs in functions(peer).items():
        if name in ("DPMSolver", "PIDStepSizeController"):
            continue
        mine = getattr(module, name)
        if name.startswith("sample_"):
            # The package's own also takes ComfyUI's callers, and hands the others on.
            assert inspect.signature(getattr(k_diffusion, name)) == inspect.signature(mine)
        else:
            assert getattr(k_diffusion, name) is mine
        if inspect.isclass(theirs):
            assert str(inspect.signature(mine)).split("<")[0] == str(inspect.signature(theirs)).split("<")[0]
            for method, function in functions_of(theirs).items():
                assert inspect.signature(getattr(mine, method)) == inspect.signature(function), f"{name}.{method}"
        else:
            assert inspect.signature(mine) == inspect.signature(theirs), name


def functions_of(kind):
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name != "__init__"}


def test_k_diffusion_is_not_needed():
    """Nor are torchsde and torchdiffeq before they are used."""
    program = (
        "import sys; sys.modules.update(k_diffusion=None, torchsde=None, torchdiffeq=None, diffusers=None)\n"
        "from fastdiff.integrations import k_diffusion as K, k_diffusion\n"
        "import torch; K.sample_heun(lambda x, s: x, torch.ones(1, 2), K.get_sigmas_karras(3, 0.1, 1.0), disable=True)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


class Waits(TorchDispatchMode):
    """Counts what a device would be waited for: tensors read as numbers, or moved."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SIGMAS)
def test_no_step_waits_for_the_device(name):
    """From the model's first call to its last nothing is read. A Brownian path reads its times; a caller's does not."""
    options = {"noise_sampler": lambda *_: torch.ones(2, 3, 8, 8)} if name in NOISY else {}
    waits, counts = Waits(), []

    def model(x, sigma):
        counts.append(waits.count)
        return 0.9 * x

    with waits:
        getattr(ours, name)(model, start(), karras(5), callback=lambda info: None, disable=True, **options)
    assert len(counts) >= 5
    assert counts[0] == counts[-1] == waits.count


@pytest.mark.parametrize("name", SIGMAS)
def test_one_operator_a_call(name):
    """But for the last step of the methods whose result is the model's output itself."""
    calls = []

    def model(x, sigma):
        calls.append(x)
        return denoiser(x, sigma)

    ops.report(reset=True)
    options = {"noise_sampler": ours.default_noise_sampler(start())} if name in NOISY else {}
    getattr(ours, name)(model, start(), karras(5), disable=True, **options)
    applied = sum(count for (operator, _), count in ops.report().calls.items() if operator == "sampler_step")
    assert applied == len(calls) - (name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"))


def test_the_model_hears_its_arguments_in_their_order():
    """Positional: model, x, sigmas, extra_args, callback, disable, and then the sampler's own."""
    told = []
    ours.sample_euler(lambda x, sigma, a: a * x, start(), karras(2), {"a": 0.5}, told.append, True, 1.0, 0.0, 99.0, 1.1)
    assert [info["i"] for info in told] == [0, 1]
    assert told[0]["sigma_hat"] > told[0]["sigma"]


def test_the_progress_bar(capsys):
    for disable in (False, True):
        ours.sample_euler(denoiser, start(), karras(4), disable=disable)
        assert ("4/4" in capsys.readouterr().err) is not disable


BAD_SIGMAS = {
    "list": ([3.0, 1.0], "sigmas: expected a floating tensor"),
    "whole": (torch.tensor([3, 1]), "sigmas: expected a floating tensor"),
    "matrix": (torch.ones(2, 2), r"sigmas: .* got torch.float32 \(2, 2\)"),
    "empty": (torch.ones(0), "sigmas: expected a floating tensor"),
    "zero": (torch.tensor([3.0, 0.0, 0.0]), "positive numbers of which the last may be 0, got"),
    "negative": (torch.tensor([3.0, -1.0]), "positive numbers"),
    "endless": (torch.tensor([float("inf"), 1.0]), "positive numbers"),
    "nan": (torch.tensor([float("nan"), 1.0]), "positive numbers"),
}


@pytest.mark.parametrize("name", SIGMAS)
@pytest.mark.parametrize("case", BAD_SIGMAS)
def test_bad_sigmas(name, case):
    sigmas, message = BAD_SIGMAS[case]
    with pytest.raises(InputError, match=message):
        getattr(ours, name)(denoiser, start(), sigmas, disable=True)


@pytest.mark.parametrize("name", NOISY)
def test_rising_sigmas(name):
    with pytest.raises(InputError, match="sigmas: expected falling numbers for a sampler that adds noise"):
        getattr(ours, name)(denoiser, start(), torch.tensor([1.0, 2.0]), disable=True)


@pytest.mark.parametrize("name", [*SIGMAS, *WHOLE])
def test_bad_states_and_outputs(name):
    after = WHOLE.get(name, (karras(3),))
    for x in (3.0, torch.tensor(3.0), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(InputError, match="x: expected a floating tensor"):
            getattr(ours, name)(denoiser, x, *after, disable=True)
    for output in (None, torch.ones(4, 3, 8, 8)):
        with pytest.raises(InputError, match=r"model: expected a data prediction of x's shape \(2, 3, 8, 8\)"):
            getattr(ours, name)(lambda x, sigma, output=output: output, start(), *after, disable=True)


@pytest.mark.parametrize("name", [*SIGMAS, *WHOLE])
@pytest.mark.parametrize("value", [-0.1, 11.0, float("nan"), "1", None, True])
def test_bad_options(name, value):
    after = WHOLE.get(name, (karras(3),))
    parameters = inspect.signature(getattr(ours, name)).parameters
    for option in ("eta", "s_noise"):
        if option in parameters:
            with pytest.raises(InputError, match=f"{option}: expected a number from 0 to 10"):
                getattr(ours, name)(denoiser, start(), *after, disable=True, **{option: value})


BAD = {
    "order-lms": (lambda: ours.sample_lms(denoiser, start(), karras(3), order=0), "order: expected a whole number"),
    "churn": (lambda: ours.sample_euler(denoiser, start(), karras(3), s_churn=-1.0), "s_churn: expected a number"),
    "r": (lambda: ours.sample_dpmpp_sde(denoiser, start(), karras(3), r=0.0), "r: expected a number above 0"),
    "solver": (
        lambda: ours.sample_dpmpp_2m_sde(denoiser, start(), karras(3), solver_type="euler"),
        "solver_type: expected one of midpoint, heun, got 'euler'",
    ),
    "calls": (lambda: ours.sample_dpm_fast(denoiser, start(), 0.3, 20.0, 0), "n: expected a whole number from 1"),
    "sigma_min": (lambda: ours.sample_dpm_fast(denoiser, start(), 0.0, 20.0, 3), "sigma_min: expected a positive"),
    "sigma_max": (lambda: ours.sample_dpm_adaptive(denoiser, start(), 0.1, None), "sigma_max: expected a positive"),
    "reverse": (lambda: ours.sample_dpm_adaptive(denoiser, start(), 9.0, 1.0, eta=1.0), "eta: expected 0 for a run"),
    "order": (lambda: ours.sample_dpm_adaptive(denoiser, start(), 0.1, 1.0, order=4), "order: expected 2 or 3, got 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call()
