"""torch.randn's normals, bit for bit, and its generator's state after them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff import ops
from fastdiff.ops import torch_noise

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [(1,), (15,), (16,), (17,), (2, 3, 5), (623,), (624,), (625,), (2, 4, 33, 32), (3, 70001), (0, 4)]


def pair(seed=5):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_bits_and_generator(shape, dtype, many_threads):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours, theirs = pair()
        for _ in range(3):
            found = ops.torch_normal(shape, generator=ours, dtype=dtype)
            wanted = torch.randn(shape, generator=theirs, dtype=dtype)
            assert found.dtype == dtype
            assert torch.equal(found, wanted)
            assert torch.equal(ours.get_state(), theirs.get_state())


def test_after_other_draws():
    """The state is taken up wherever other functions left it, and leaves them where torch.randn would."""
    ours, theirs = pair(9)
    for count in (1, 7, 617, 1300):
        for generator, draw in ((ours, ops.torch_normal), (theirs, torch.randn)):
            torch.rand(count, generator=generator)
            torch.randn(3, generator=generator)  # leaves a normal behind for the next odd draw
            draw((40,), generator=generator)
        assert torch.equal(ours.get_state(), theirs.get_state())
        assert torch.equal(torch.randn(3, generator=ours), torch.randn(3, generator=theirs))


def test_the_global_generator():
    torch.manual_seed(11)
    found = ops.torch_normal((2, 50))
    after = torch.rand(4)
    torch.manual_seed(11)
    assert torch.equal(found, torch.randn(2, 50))
    assert torch.equal(after, torch.rand(4))


def test_a_processor_with_avx2_uses_the_compiled_function():
    expected = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    for dtype in DTYPES[:3]:
        assert (torch_noise._native(dtype) is not None) == expected


def test_a_pytorch_that_draws_otherwise_is_noticed(monkeypatch):
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **options: real(*args, **options) + 1.0)
    torch_noise._native.cache_clear()
    try:
        assert torch_noise._native(torch.float32) is None
        assert torch.equal(*(ops.torch_normal((64,), generator=generator) for generator in pair()))
    finally:
        torch_noise._native.cache_clear()


def test_modes_see_torch_randn():
    with FakeTensorMode():
        assert type(ops.torch_normal((4, 8))).__name__ == "FakeTensor"


def test_bad_arguments_are_torch_randn_s_own():
    for arguments in ({"shape": (-1, 20)}, {"shape": (32,), "dtype": torch.int64}):
        with pytest.raises(RuntimeError):
            ops.torch_normal(**arguments)
