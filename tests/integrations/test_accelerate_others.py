"""An accelerated network among other code: what hooks, patches, compiles, transforms or takes it apart."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from layouts import Case
from other_layouts import OTHERS
from tiny_pipelines import make
from tolerance import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models import UNet
from fastdiff.models.forward import forward
from fastdiff.models.rewrites import Rewrites

SEEDED = torch.Generator().manual_seed(0)
X, T, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.tensor(7), torch.randn(2, 5, 14, generator=SEEDED)
CASE = Case(diffusers.UNet2DConditionModel, OTHERS["one layer each, odd sizes"].config)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    gc.collect()
    fastdiff.report(reset=True)
    with torch.no_grad():
        yield


def unet() -> Any:
    return fastdiff.accelerate(CASE.network(), strict=True)


def own(network: nn.Module) -> Tensor:
    return type(network).forward(network, X, T, TEXT).sample


def ours_ran() -> bool:
    return any(operator == "group_norm_silu" for operator, _ in fastdiff.report(reset=True).calls)


def assert_ours(network: nn.Module) -> None:
    fastdiff.report(reset=True)
    actual = network(X, T, TEXT).sample
    assert ours_ran()
    assert relative_error(actual, own(network)) < 1e-5


def test_a_class_that_somebody_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet()
    assert_ours(network)
    kind = type(network.mid_block)
    former = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda *args, **kwargs: 2 * former(*args, **kwargs))
        with pytest.warns(UserWarning, match=f"{kind.__name__}.forward was replaced by {__name__}"):
            actual = network(X, T, TEXT).sample
        assert torch.equal(actual, own(network))
        with pytest.raises(InputError, match="was replaced by"):
            fastdiff.accelerate(CASE.network(), strict=True)
    assert_ours(network)


def test_a_hook_on_all_modules_fires() -> None:
    network, seen = unet(), []
    handle = torch_module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    with pytest.warns(UserWarning, match="all modules have a forward hook"):
        network(X, T, TEXT)
    handle.remove()
    assert network.mid_block.resnets[0].norm1 in seen
    assert_ours(network)


def test_pytorchs_counter_counts_what_runs() -> None:
    network = unet()
    with FlopCounterMode(display=False) as counter:
        network(X, T, TEXT)
    assert ours_ran()
    assert counter.get_total_flops() > 0


def test_projections_that_were_fused_and_are_no_more() -> None:
    network = unet()
    network.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="attention processor"):
        network(X, T, TEXT)
    network.unfuse_qkv_projections()
    assert_ours(network)


def mapped(network: nn.Module) -> Tensor:
    return torch.func.vmap(lambda x: network(x[None], T, TEXT[:1]).sample[0])(X)


def recorded(network: nn.Module) -> Tensor:
    return make_fx(lambda x: network(x, T, TEXT).sample)(X)(X)


def differentiated(network: nn.Module) -> Tensor:
    return torch.func.grad(lambda x: network(x, T, TEXT).sample.square().sum())(X)


def with_other_parameters(network: nn.Module) -> Tensor:
    state = {name: 1.1 * value for name, value in network.state_dict().items()}
    return torch.func.functional_call(network, state, (X, T, TEXT)).sample


def without_data(network: nn.Module) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = network(*map(mode.from_tensor, (X, T, TEXT))).sample.shape
    return torch.ones(shape)


TRANSFORMS = {
    "vmap": mapped,
    "make_fx": recorded,
    "grad": differentiated,
    "functional_call": with_other_parameters,
    "fake tensors": without_data,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_pytorch_makes_of_a_network(transform: Callable[[nn.Module], Tensor]) -> None:
    network = unet()
    assert relative_error(transform(network), transform(CASE.network())) < 1e-5
    assert_ours(network)


def test_a_compiled_network_says_so() -> None:
    compiled = torch.compile(CASE.network(), backend="eager")
    with pytest.raises(InputError, match=r"torch\.compile runs the library's code"):
        fastdiff.accelerate(compiled, strict=True)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        fastdiff.accelerate(compiled)
    assert forward(compiled._orig_mod) is None


def test_a_configuration_that_changes_is_left() -> None:
    network = unet()
    network.register_to_config(act_fn="gelu")
    with pytest.warns(UserWarning, match="time_embedding.act is a .*SiLU, not a GELU"):
        assert torch.equal(network(X, T, TEXT).sample, own(network))
    network.register_to_config(act_fn="silu")
    assert_ours(network)


def test_image_prompts_are_left() -> None:
    network = unet()
    plain = network.attn_processors
    image = diffusers.models.embeddings.ImageProjection(8, 14, num_image_text_embeds=2)
    network.encoder_hid_proj = diffusers.models.embeddings.MultiIPAdapterImageProjection([image])
    network.config.encoder_hid_dim_type = "ip_image_proj"
    processors = dict(plain)
    for name in processors:
        if name.endswith("attn2.processor"):
            width = network.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(width, 14, num_tokens=(2,))
    network.set_attn_processor(processors)
    given = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 8)]}}
    with pytest.raises(InputError, match=r"encoder_hid_proj|IPAdapter"):
        fastdiff.accelerate(network, strict=True)
    with pytest.warns(UserWarning, match=r"encoder_hid_proj|IPAdapter"):
        actual = network(X, T, TEXT, **given).sample
    assert torch.equal(actual, type(network).forward(network, X, T, TEXT, **given).sample)
    network.encoder_hid_proj = network.config.encoder_hid_dim_type = None
    network.set_attn_processor(plain)
    assert_ours(network)


def test_a_part_is_restored_alone() -> None:
    pipe = copy.deepcopy(make("SD", diffusers.DDIMScheduler()))
    latents, picture = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16, 16)
    fastdiff.accelerate(pipe)
    fastdiff.restore(pipe.vae.decoder)
    assert "vae (AutoencoderKL)" in fastdiff.report(reset=True).networks
    pipe.vae.decode(latents)
    assert not ours_ran()
    pipe.vae.encode(picture)
    assert ours_ran()
    fastdiff.accelerate(pipe)
    pipe.vae.decode(latents)
    assert ours_ran()
    fastdiff.restore(pipe.vae.decoder)
    fastdiff.restore(pipe.vae)
    assert list(fastdiff.report(reset=True).networks) == ["unet (UNet2DConditionModel)"]
    pipe.vae.encode(picture)
    assert not ours_ran()


def test_a_part_first_and_then_the_whole() -> None:
    pipe = copy.deepcopy(make("SD", diffusers.DDIMScheduler()))
    kept = fastdiff.accelerate(pipe.unet).forward
    fastdiff.accelerate(pipe)
    assert pipe.unet.forward is kept
    fastdiff.restore(pipe.unet)
    assert forward(pipe.unet) is None
    assert forward(pipe.vae.decoder) is not None


def test_a_shallow_copy_is_restored_alone() -> None:
    network = unet()
    shallow = copy.copy(network)
    fastdiff.restore(shallow)
    assert forward(shallow) is None
    assert_ours(network)


def test_restore_frees_what_was_made() -> None:
    network = unet()
    for t in (900, 7):
        network(X, torch.tensor([900, 7])[t // 900], TEXT)
    conversion = weakref.ref(network.forward.conversion)
    inside = weakref.ref(conversion()._shared.network)
    kept = [weakref.ref(value) for cache in conversion()._shared.caches() for value in _tensors(cache.values())]
    assert kept
    fastdiff.restore(network)
    gc.collect()
    assert conversion() is None
    assert inside() is None
    assert not any(each() is not None for each in kept)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def test_single_parts_of_a_model_that_is_not_supported() -> None:
    """Something was found in it, but not the network that the caller has asked for."""

    class Model(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        @diffusers.configuration_utils.register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

    Model.__module__ = "diffusers.models.somewhere"
    with pytest.raises(InputError, match="no network for Model"):
        fastdiff.accelerate(Model(), strict=True)
    fastdiff.accelerate(nn.ModuleList([Model().part]), strict=True)


def test_a_network_of_ours_inside_another_module() -> None:
    ours = UNet(**{**OTHERS["one layer each, odd sizes"].config, "_class_name": "UNet2DConditionModel"})
    holder = nn.ModuleDict({"network": ours, "head": nn.Linear(2, 2)})
    fastdiff.accelerate(holder, rewrites="geglu", strict=True)
    assert ours.rewrites == Rewrites.parse("geglu")
    fastdiff.restore(holder)
    assert ours.rewrites == Rewrites()


@pytest.mark.parametrize("count", [2, 4])
def test_threads_with_inputs_of_their_own(count: int) -> None:
    network = unet()
    shapes = [(1, 6, 8), (2, 12, 8), (2, 6, 6), (3, 4, 4)][:count]
    inputs = [(torch.randn(n, 4, h, w), torch.tensor(7 * n), torch.randn(n, 5, 14)) for n, h, w in shapes]
    expected = [type(network).forward(network, *each).sample for each in inputs]
    wrong: list[float] = []
    together = threading.Barrier(count)

    def work(index: int) -> None:
        together.wait()
        with torch.no_grad():
            for _ in range(8):
                error = relative_error(network(*inputs[index]).sample, expected[index])
                if not error < 1e-5:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_changes_weights_between_calls() -> None:
    network, results = unet(), []
    turn = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def change() -> None:
        for _ in range(3):
            turn.acquire()
            for p in network.parameters():
                p.data.mul_(1.05)
            done.release()

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(3):
        turn.release()
        done.acquire()
        results.append(relative_error(network(X, T, TEXT).sample, own(network)))
    thread.join()
    assert max(results) < 1e-5


def test_warnings_come_once_for_a_reason() -> None:
    network = unet()
    handle = network.mid_block.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match="mid_block has a forward hook"):
        network(X, T, TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X, T, TEXT)
        handle.remove()
        assert_ours(network)
        network.mid_block.register_forward_hook(lambda module, args, output: None)
        network(X, T, TEXT)
    assert list(fastdiff.report().left.values()) == [1]
