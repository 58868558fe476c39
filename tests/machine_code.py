"""What a kernel's machine code says: stack, spills, widths of memory accesses, tensor-core instructions."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s*(.*?)\s*;", re.MULTILINE)
_SECTION = struct.Struct("<IIQQQQIIQQ")
"""Of a 64-bit ELF file: its name's place in the table of names, type, flags, address, place in the file, size, ..."""


def _tool(name: str) -> Path:
    """One of NVIDIA's that Triton carries."""
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__file__).parent / "bin" / name


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _codes(cubin: bytes) -> dict[str, bytes]:
    """The instructions of each kernel: the sections .text.KERNEL."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [_SECTION.unpack_from(cubin, table + number * _SECTION.size) for number in range(count)]
    codes = {}
    for section in sections:
        start = sections[names][4] + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            codes[name.removeprefix(".text.")] = cubin[section[4] : section[4] + section[5]]
    return codes


def read(cubins: Sequence[Path], target: int) -> dict[Path, list[Kernel]]:
    """The kernels of each cubin for sm_<target>, disassembled together: to start the disassembler takes longer."""
    codes = {(cubin, name): code for cubin in cubins for name, code in _codes(cubin.read_bytes()).items()}
    ends = list(accumulate(map(len, codes.values())))
    with tempfile.NamedTemporaryFile() as image:
        image.write(b"".join(codes.values()))
        image.flush()
        text = _run(_tool("nvdisasm"), "--binary", f"SM{target}" + "a" * (target >= 90), image.name)
    lines: list[list[str]] = [[] for _ in codes]
    for place, instruction in _INSTRUCTION.findall(text):
        lines[bisect_right(ends, int(place, 16))].append(instruction)
    stacks: dict[tuple[Path, str], int] = {}
    for cubin in cubins:
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", cubin)
        for name, stack in re.findall(r"Function (\S+):\s*\n.*?STACK:(\d+)", usage):
            stacks[cubin, name] = int(stack)
    kernels = [Kernel(key[1], stacks[key], "\n".join(code)) for key, code in zip(codes, lines, strict=True)]
    return {cubin: [kernel for key, kernel in zip(codes, kernels, strict=True) if key[0] == cubin] for cubin in cubins}
