"""An arena under several threads, in a forked process, and with those in PyTorch who know memory by its address."""

from __future__ import annotations

import subprocess
import sys
import threading

import torch
from arena_network import Network, network

from fastdiff.models.arena import Arena

__all__ = ["network"]

MEGABYTE = 2**20


def test_another_thread_is_outside_and_may_free() -> None:
    arena, values = Arena(), []
    with arena:
        values.append(torch.empty(1000))
        thread = threading.Thread(target=lambda: (values.append(torch.empty(1000)), values.clear()))
        thread.start()
        thread.join()
        assert (arena.misses, arena.idle) == (1, arena.bytes)


def test_threads_share_an_arena(network: Network) -> None:
    """Each thread's results stay what they are while the others run, and are freed by all of them."""
    arena, failures, kept = Arena(), [], []
    inputs = [torch.randn(1 + index % 2, 4, 16, 16 + 4 * index) for index in range(4)]
    expected = [network(x) for x in inputs]

    def work(index: int) -> None:
        for turn in range(25):
            with arena:
                out = network(inputs[index])
            kept.append((index, out))
            if turn % 3 == 0:
                other, value = kept.pop(0)
                if not torch.equal(value, expected[other]):
                    failures.append(other)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(torch.equal(value, expected[index]) for index, value in kept)
    kept.clear()
    assert arena.idle == arena.bytes


def test_a_fork_while_another_thread_allocates() -> None:
    """The child finds the arena as it was, and not held by a thread that it does not have."""
    program = """
import os, signal, threading, torch
from fastdiff.models.arena import Arena
arena, done = Arena(), threading.Event()
with arena:
    value = torch.full((1000,), 7)

def churn():
    while not done.is_set():
        with arena:
            torch.empty(100)

threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(12):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with arena:
            fine = (value == 7).all() and torch.full((5000,), 3).sum() == 15000
        value.fill_(5)
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
done.set()
assert (value == 7).all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_of_onednn_from_before_is_given_back_where_it_came_from() -> None:
    """oneDNN returns its memory by address alone; some of it is older than the first arena."""
    program = """
import torch
from fastdiff.models.arena import Arena
x = torch.randn(2, 8, 9, 9)
old = x.to_mkldnn()
arena = Arena()
with arena:
    new = x.to_mkldnn()
    assert arena.misses > 0
    assert torch.equal((old + new).to_dense(), 2 * x)
    del old
later = x.to_mkldnn()
del arena, new, later
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_that_pytorch_counts() -> None:
    with Arena(), torch.profiler.profile(profile_memory=True) as profile:
        torch.empty(MEGABYTE)
    assert max(event.cpu_memory_usage for event in profile.events()) >= 4 * MEGABYTE


def test_uninitialized_memory_is_filled_where_pytorch_is_asked_to() -> None:
    arena, before = Arena(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with arena:
            for _ in range(2):
                value = torch.empty(1000)
                assert value.isnan().all()
                value.fill_(1.0)
                del value
    finally:
        torch.use_deterministic_algorithms(before)
    assert arena.hits >= 1


def test_tensors_of_an_arena_are_ordinary_ones() -> None:
    arena = Arena()
    with arena:
        value, shared, resized = (torch.arange(1000.0) for _ in range(3))
    array = value.numpy()
    shared.share_memory_()
    resized.resize_(3000)[1000:] = 1.0
    torch.full((1000,), 9.0)
    assert array.sum() == shared.sum() == resized[:1000].sum() == 499500
    assert shared.is_shared()
