"""Page faults of accelerated networks, as JSON: {kind: {dtype: [inside the arena, outside of it]}} for three calls.

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
    for _ in range(3):
        results(kind, network, dtype, side=SIDE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


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
