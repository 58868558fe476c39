"""Which backend runs, what is said about it, and what is refused."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from backends import INTERPRETED, NATIVE, Target
from inputs import normal

import fastdiff
from fastdiff import config, ops
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import dispatch
from fastdiff.ops.row import ROW_SIZE


class Refusing:
    """A backend that never runs, for its reason."""

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self) -> None:
        return None

    def supports(self, *args: object) -> str:
        return f"{self.name} does not feel like it"


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend of group_norm_silu but the reference refuses; the record is empty."""
    refusing = tuple(Refusing(backend.name) for backend in dispatch.BACKENDS["group_norm_silu"][:-1])
    monkeypatch.setitem(dispatch.BACKENDS, "group_norm_silu", (*refusing, dispatch.BACKENDS["group_norm_silu"][-1]))
    fastdiff.report(reset=True)


def test_native_code_is_preferred_on_the_cpu() -> None:
    fastdiff.report(reset=True)
    ops.group_norm_silu(normal(1, 4, 3, 3), 2)
    report = fastdiff.report()
    assert report.calls == {("group_norm_silu", "native"): 1}
    assert report.fallbacks == {}
    assert "group_norm_silu: native x 1" in str(report)


def test_fallback_to_the_reference_is_reported_and_warned_of_once(only_reference: None) -> None:
    x = normal(1, 4, 3, 3)
    with pytest.warns(UserWarning, match="runs on the reference.*native does not feel like it"):
        ops.group_norm_silu(x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.group_norm_silu(x, 2)
    report = fastdiff.report()
    assert report.calls == {("group_norm_silu", "reference"): 2}
    assert report.fallbacks["group_norm_silu", "native"] == "native does not feel like it"


def test_demanded_backend_never_falls_back(only_reference: None) -> None:
    with (
        fastdiff.use_backend("native"),
        pytest.raises(BackendError, match="'native' was demanded but cannot run this call: native does not feel"),
    ):
        ops.group_norm_silu(normal(1, 4, 3, 3), 2)


@pytest.mark.parametrize("target", [NATIVE, INTERPRETED], ids=str)
def test_no_kernel_reads_or_writes_float64(target: Target) -> None:
    """A kernel's arithmetic is float32: float64 that it wrote would hold no more."""
    x, table, seeds = target.move((normal(1, 4), torch.zeros(1, ROW_SIZE), torch.tensor([1])))
    with target.forced():
        with pytest.raises(BackendError, match="it takes float32, float16 and bfloat16, not float64"):
            ops.sampler_step(x, x.double(), table, 0)
        with pytest.raises(BackendError, match="it writes float32, float16 and bfloat16, not float64"):
            ops.sampler_step(x, x, table, 0, model_input=torch.float64)
        with pytest.raises(BackendError, match="it writes float32, float16 and bfloat16, not float64"):
            ops.philox_normal(seeds, (1, 4), dtype=torch.float64)


def test_explain_says_why_not_and_runs_nothing() -> None:
    fastdiff.report(reset=True)
    text = fastdiff.explain("group_norm_silu", normal(1, 4, 3, 3), 2)
    assert text.startswith("group_norm_silu: native")
    assert "not triton: " in text
    assert "not reference: able, but not preferred" in text
    assert fastdiff.report().calls == {}


def test_explain_gives_the_reason_that_selection_and_the_error_give() -> None:
    x = normal(1, 4, 3, 3, dtype=torch.float64)
    text = fastdiff.explain("group_norm_silu", x, 2)
    reason = dispatch.BACKENDS["group_norm_silu"][0].supports(x, 2, None, None, 1e-5, True, None, None, None, False)
    assert reason is not None
    assert f"not native: {reason}" in text
    with fastdiff.use_backend("native"), pytest.raises(BackendError) as error:
        ops.group_norm_silu(x, 2)
    assert reason in str(error.value)


def test_explain_checks_arguments_as_the_operator_does() -> None:
    with pytest.raises(InputError, match="C=4 is not divisible by groups=3"):
        fastdiff.explain("group_norm_silu", normal(1, 4, 3, 3), 3)
    with pytest.raises(InputError, match="unknown operator 'group_norm'"):
        fastdiff.explain("group_norm")


def test_use_backend_is_undone_and_nests() -> None:
    assert config.forced_backend("attention") is None
    with fastdiff.use_backend("reference"):
        with fastdiff.use_backend({"attention": "torch"}):
            assert config.forced_backend("attention") == "torch"
            assert config.forced_backend("sampler_step") == "reference"
        assert config.forced_backend("attention") == "reference"
    assert config.forced_backend("attention") is None


def test_use_backend_stays_in_its_thread() -> None:
    seen = []
    with fastdiff.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(config.forced_backend("attention")))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", "unknown backend 'fast'"),
        ("attention=fast", "unknown backend 'fast' for attention"),
        ("attentoin=native", "unknown operator 'attentoin'"),
        ({"attention": "cuda"}, "unknown backend 'cuda' for attention"),
    ],
    ids=str,
)
def test_use_backend_refuses_unknown_names(choice: str | dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message), fastdiff.use_backend(choice):
        pass


def test_environment_syntax() -> None:
    assert config.parse_backends("") == {}
    assert config.parse_backends("native") == dict.fromkeys(config.OPERATORS, "native")
    assert config.parse_backends("reference, attention=torch")["attention"] == "torch"


def test_operator_names_agree() -> None:
    assert set(config.OPERATORS) == set(dispatch.OPERATORS)


def test_input_that_requires_grad_is_refused() -> None:
    weight = normal(4).requires_grad_()
    with pytest.raises(InputError, match=r"requires grad.*torch.no_grad\(\).*use_backend\('reference'\)"):
        ops.group_norm_silu(normal(1, 4, 3, 3), 2, weight)
    with torch.no_grad():
        ops.group_norm_silu(normal(1, 4, 3, 3), 2, weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("input_needs_grad", [False, True], ids=["weights", "input"])
def test_reference_is_differentiable(layout: torch.memory_format, input_needs_grad: bool) -> None:
    x = normal(2, 4, 3, 3).to(memory_format=layout).requires_grad_(input_needs_grad)
    weight = normal(4, seed=1).requires_grad_()
    with fastdiff.use_backend("reference"):
        ops.group_norm_silu(x, 2, weight).square().sum().backward()
    x64 = x.detach().double().contiguous().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    F.silu(F.group_norm(x64, 2, weight64)).square().sum().backward()
    torch.testing.assert_close(weight.grad, weight64.grad.float())
    if input_needs_grad:
        torch.testing.assert_close(x.grad, x64.grad.float(), rtol=1e-4, atol=1e-5)


def test_meta_tensors_give_shapes_and_run_nothing() -> None:
    fastdiff.report(reset=True)
    x = torch.empty(1, 4, 8, 8, device="meta")
    assert ops.sampler_step(x, x, torch.empty(3, 32, device="meta"), 0).x.shape == x.shape
    assert ops.group_norm_silu(x, 2).is_meta
    assert fastdiff.report().calls == {}
