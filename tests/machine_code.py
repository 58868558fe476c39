"""What a kernel's machine code says: stack, spills, widths of memory accesses, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Scalar widths that an access names; one that names none moves four bytes.
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_ACCESS = re.compile(r"\b(LDGSTS|LDG|STG|REDG)((?:\.\w+)*)")
_BULK = {"load": re.compile(r"\b(UTMALDG|UBLKCP)\b"), "store": re.compile(r"\b(UTMASTG|UBLKCP)\b")}
_MATRIX = {80: ("HMMA",), 90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA", "HMMA")}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin: its name, bytes of stack frame, and disassembly."""

    name: str
    stack: int
    code: str

    def wide_share(self, kind: str) -> float:
        """Of the bytes that the global loads ("load") or stores ("store") name, the share in accesses of 16 bytes or
        more; 1 where bulk copies do the work, 0 where there is nothing."""
        if _BULK[kind].search(self.code):
            return 1.0
        total = wide = 0
        for access, suffixes in _ACCESS.findall(self.code):
            if access.startswith("LDG") != (kind == "load"):
                continue
            size = next((_BYTES[part] for part in reversed(suffixes.split(".")) if part in _BYTES), 4)
            total += size
            wide += size if size >= 16 else 0
        return wide / total if total else 0.0

    def faults(self, *, target: int, wide_loads: float, wide_stores: float, matrix: bool) -> list[str]:
        """What the gate objects to, with `wide_*` the least shares; empty for a good kernel."""
        found = []
        local = re.findall(r"\b(?:LDL|STL)\b", self.code)
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if local:
            found.append(f"{len(local)} accesses to local memory (spills, or an array indexed at run time)")
        for kind, wanted in (("load", wide_loads), ("store", wide_stores)):
            share = self.wide_share(kind)
            if share < wanted:
                found.append(f"only {share:.0%} of the bytes of global {kind}s in accesses of 16 bytes")
        if matrix and not any(re.search(rf"\b{name}\b", self.code) for name in _MATRIX[target]):
            found.append(f"no tensor-core instruction of sm_{target} ({' or '.join(_MATRIX[target])})")
        return found


def cuobjdump() -> Path:
    """NVIDIA's disassembler, as Triton carries it."""
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def read(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin."""
    command = [str(cuobjdump()), "--dump-resource-usage", "--dump-sass", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stacks = {name: int(stack) for name, stack in re.findall(r"Function (\S+):\s*\n.*?STACK:(\d+)", text)}
    parts = re.split(r"Function : (\S+)", text)
    return [Kernel(name, stacks[name], code) for name, code in zip(parts[1::2], parts[2::2], strict=True)]
