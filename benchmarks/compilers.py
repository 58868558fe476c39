"""Networks as other compilers run them on the CPU: torch.compile, and OpenVINO where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

COMPILED, FROZEN = "torch.compile", "torch.compile frozen"
BACKEND = "inductor"
_PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def compiled(network: Any, *, freezing: bool) -> Any:
    """The network, which compiles itself at its first call, from nothing that an earlier compilation has left.

    freezing: with the weights as constants, which are then laid out beforehand.
    """
    part = network.decoder if hasattr(network, "decoder") else network
    if BACKEND == "inductor":
        torch.compiler.config.force_disable_caches = True
    part.compile(backend=BACKEND, dynamic=False, options={"freezing": freezing} if BACKEND == "inductor" else None)
    return network


def has_openvino() -> bool:
    return find_spec("openvino") is not None


def openvino(
    network: nn.Module, arguments: tuple[Tensor, ...], names: tuple[str, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A call that converts and compiles the network when it is first made, for these shapes, threads and dtype.

    names: of the last arguments, where the network takes them by name.
    """
    request: Any = None
    given = [argument.numpy() for argument in arguments]

    def call() -> Tensor:
        nonlocal request
        if request is None:
            request = _converted(_Positional(network, names), arguments, dtype)
        request.infer(given, share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return call


class _Positional(nn.Module):
    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *arguments: Tensor) -> Tensor:
        first = len(arguments) - len(self.names)
        named = dict(zip(self.names, arguments[first:], strict=True))
        if first == 1:
            decoded: Tensor = self.network(arguments[0])
            return decoded
        output: Tensor = self.network(*arguments[:first], return_dict=False, **named)[0]
        return output


def _converted(network: nn.Module, arguments: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    import openvino

    with warnings.catch_warnings():
        # What tracing warns of, in the library's and in OpenVINO's code.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network, example_input=arguments)
    shapes = (openvino.PartialShape(list(argument.shape)) for argument in arguments)
    model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    how = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    return openvino.Core().compile_model(model, "CPU", how).create_infer_request()
