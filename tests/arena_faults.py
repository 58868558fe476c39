"""Page faults of accelerated networks but for those of their results, as JSON: {kind: {dtype: [with the arena, without
it]}} for three calls.

Run as a program, where malloc was told to take larger blocks from the system each time and to give them back.
"""

from __future__ import annotations

import json
import resource

import torch
from arena_kinds import DTYPES, KINDS, accelerated, results

from fastdiff.models.rewrites import names

SIDE = 64


def faults(kind: str, dtype: torch.dtype, rewrites: set[str]) -> int:
    network = accelerated(kind, dtype, rewrites=rewrites)
    for _ in range(3):
        results(kind, network, dtype, side=SIDE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pages = 0
    for _ in range(3):
        pages += sum(out.nbytes for out in results(kind, network, dtype, side=SIDE)) // resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before - pages


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything = set(names())
    with torch.no_grad():
        found = {
            kind: {name: [faults(kind, dtype, everything - less) for less in (set(), {"arena"})]
                   for name, dtype in DTYPES.items()}
            for kind in KINDS
        }  # fmt: skip
    print(json.dumps(found))
