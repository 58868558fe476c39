"""The rules of the layout: one name in every place, imports in one direction, nothing happening at import."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.operators import BUILDERS
from fastdiff import noise, ops
from fastdiff.ops import native, row
from fastdiff.ops.registry import OPERATORS
from fastdiff.samplers import ADAPTIVE, methods

ROOT = Path(__file__).parent.parent
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "fastdiff").rglob("*.py"))}

NO_CUDA = {
    *("attention", "guidance_weights", "dynamic_threshold", "langevin_step_size"),
    *("geglu", "layer_norm_modulate", "conv_bias_residual", "upsample_conv"),
}
"""Operators that run on Triton on a GPU and have no CUDA C++ kernel."""

HOST_ONLY = {"torch_normal", "langevin_correct", "winograd", "winograd_bfloat16", "convolve_bfloat16"}
"""Compiled functions that are no operators: they stand in for functions of PyTorch on the CPU, and leave every other
call to them."""

LAYERS = (
    {"errors", "files", "__init__"},
    {"config", "noise", "schedules"},
    {"parameterization"},
    {"ops"},
    {"samplers", "nn"},
    {"engine", "models"},
    {"training", "integrations", "evaluation", "profiling"},
    {"cli"},
)
"""Packages and modules of fastdiff from the leaves up; a module imports from its own layer's package or from below."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        now = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            yield module, now
            yield from ((f"{module}.{alias.name}", now) for alias in node.names)


def layer(module: str) -> int | None:
    """The layer of a module of fastdiff; None for the package itself and for everything else."""
    parts = module.split(".")
    if parts[0] != "fastdiff" or len(parts) == 1:
        return None
    found = [index for index, names in enumerate(LAYERS) if parts[1] in names]
    return found[0] if found else None


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_stands_in_every_place(name: str) -> None:
    assert (ROOT / "kernels" / f"{name}.py").is_file(), "a Triton kernel"
    assert (ROOT / "csrc" / "cpu" / f"{name}.cpp").is_file(), "a C++ kernel for the CPU"
    assert (ROOT / "csrc" / "cuda" / f"{name}.cu").is_file() != (name in NO_CUDA), (
        "a CUDA kernel, or a declared absence"
    )
    assert (name in native.ON_CUDA) != (name in NO_CUDA)
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file(), "a test"
    assert name in BUILDERS
    assert name in {case.operator for case in CASES}, "a benchmark case"
    assert name in ops.__all__, "a public function"
    assert (inspect.getdoc(getattr(ops, name)) or "").count("\n") > 2, "a docstring with the formula"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_reference_has_the_signature_of_its_schema(name: str) -> None:
    schema = getattr(torch.ops.fastdiff, name).default._schema
    registered = [(argument.name, argument.default_value) for argument in schema.arguments]
    function = inspect.signature(OPERATORS[name].reference)
    written = [(parameter.name, None) for parameter in function.parameters.values()]
    assert written == registered
    assert all(parameter.default is inspect.Parameter.empty for parameter in function.parameters.values())


def test_no_operator_file_is_left_over() -> None:
    """A kernel, test or case under a name that is no operator is a typing error or a remnant."""
    for folder, pattern in (("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu")):
        stems = {path.stem for path in (ROOT / folder).glob(pattern)}
        assert stems <= {*OPERATORS, *HOST_ONLY}, folder
    whole = {"drop_in", "sampling", "network", "rewrite", "first_call", "compiled"}
    assert {case.operator for case in CASES} <= {*OPERATORS, *HOST_ONLY, *whole}


@pytest.mark.parametrize("path", MODULES)
def test_imports_go_one_way(path: str) -> None:
    here = layer(module_name(path))
    if here is None:
        assert path == "fastdiff/__init__.py" or path.startswith("fastdiff/assets/"), f"{path} is in no layer"
        return
    for module, _ in imports(MODULES[path]):
        there = layer(module)
        assert there is None or there <= here, f"{path} imports {module}, which lies above it"


def test_samplers_and_the_engine_never_import_models() -> None:
    for path, file in MODULES.items():
        if path.startswith(("fastdiff/samplers/", "fastdiff/engine/", "fastdiff/ops/")):
            assert not any(module.startswith("fastdiff.models") for module, _ in imports(file)), path


def test_networks_use_only_operators_and_torch() -> None:
    allowed = {"torch", "fastdiff", "__future__", *sys.stdlib_module_names}
    for name in ("nn.py", "models/unet.py", "models/blocks.py", "models/attention.py", "models/embeddings.py"):
        for module, _ in imports(ROOT / "fastdiff" / name):
            assert module.split(".")[0] in allowed, f"{name} imports {module}"


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "fastdiff", "__future__", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for module, _ in imports(path):
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"
            if module.startswith("fastdiff."):
                assert module.startswith(("fastdiff.kernels", "fastdiff.noise", "fastdiff.ops.row")), (
                    f"{path.name} imports {module}: kernels import only torch, triton and constants"
                )


def test_kernels_are_imported_by_one_module() -> None:
    naming = [path for path, file in MODULES.items() if re.search(r"fastdiff\.kernels\b", _code(file))]
    assert naming == ["fastdiff/ops/triton.py"]


def _code(path: Path) -> str:
    """A file without its comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("path", MODULES)
def test_the_environment_is_read_in_config_alone(path: str) -> None:
    if path != "fastdiff/config.py":
        assert not re.search(r"\benviron\b|\bgetenv\b", _code(MODULES[path])), path


@pytest.mark.parametrize("path", MODULES)
def test_nothing_catches_everything(path: str) -> None:
    for node in ast.walk(ast.parse(MODULES[path].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            assert caught not in ("", "Exception", "BaseException"), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastdiff", ["triton", "diffusers", "matplotlib", "PIL"]),
        ("import fastdiff.cli.sample, fastdiff.cli.info, fastdiff.cli.methods", ["triton", "diffusers", "matplotlib"]),
    ],
    ids=["fastdiff", "the command line"],
)
def test_importing_does_little(statement: str, absent: list[str]) -> None:
    """No library that is not needed, no kernel package, and no CUDA initialisation."""
    program = f"""{statement}
import json, sys
cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
print(json.dumps([cuda, "fastdiff.kernels" in sys.modules, [name for name in sys.modules if "." not in name]]))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    cuda, kernels, loaded = json.loads(done.stdout)
    assert not cuda
    assert not kernels
    assert not set(absent) & set(loaded)


def test_row_constants_are_equal_in_cpp() -> None:
    header = (ROOT / "csrc" / "step_row.h").read_text(encoding="utf-8")
    found = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", header)}
    for name, value in vars(row).items():
        if name.isupper() and isinstance(value, int | slice):
            expected = value.start if isinstance(value, slice) else value
            assert found.pop({"ROW_SIZE": "SIZE"}.get(name, name)) == expected, name
    assert found == {"STREAM_INITIAL": noise.STREAM_INITIAL, "STREAM_STEP": noise.STREAM_STEP}
    enum = re.search(r"enum Input \{([^}]*)\}", header)
    assert enum is not None
    names = [name.strip().lower() for name in enum[1].split(",")]
    assert names == [*(name.lower() for name in row.INPUTS), "inputs"]


def in_the_root(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("from kernels import attention", "ImportError: cannot import name 'attention' from 'kernels'"),
        ("import kernels.attention", "ModuleNotFoundError: No module named 'kernels.attention'"),
        (
            "import kernels; kernels.attention",
            "'attention' is not here: the folder kernels/ was imported as 'kernels': expected",
        ),
    ],
    ids=["from it", "below it", "of it"],
)
def test_the_folder_kernels_has_nothing_under_that_name(program: str, said: str) -> None:
    done = in_the_root(program)
    assert done.returncode == 1
    assert said in done.stderr


def test_the_folder_kernels_under_any_other_name_says_what_is_wrong() -> None:
    program = """import importlib.util
spec = importlib.util.spec_from_file_location("other.kernels", "kernels/__init__.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))"""
    done = in_the_root(program)
    assert done.returncode == 1
    assert (
        "ImportError: the folder kernels/ was imported as 'other.kernels': expected 'fastdiff.kernels'" in done.stderr
    )


def test_the_folder_kernels_gives_way_to_the_package_of_that_name(tmp_path: Path) -> None:
    other = tmp_path / "checkout" / "kernels" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_bytes((ROOT / "kernels" / "__init__.py").read_bytes())
    program = "from kernels import get_kernel; import kernels.layer; print(get_kernel)"
    assert "cannot import name 'get_kernel'" in in_the_root(program, tmp_path / "checkout", ROOT).stderr
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.layer import get_kernel\n", encoding="utf-8")
    (package / "layer.py").write_text("get_kernel = 'found'\n", encoding="utf-8")
    for path in ([tmp_path], [tmp_path / "checkout", ROOT, tmp_path]):
        done = in_the_root(program, *path)
        assert done.stdout == "found\n", done.stderr


def test_transformers_is_not_told_that_its_kernels_are_here() -> None:
    """Its search for the package of that name ends in our folder."""
    program = "from transformers.utils.import_utils import is_kernels_available as there; print(there())"
    done = in_the_root(program)
    assert done.stdout == "False\n", done.stderr


def test_files_stay_short() -> None:
    for folder in ("fastdiff", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, path


def test_the_readme_names_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Samplers")[1].split("## ")[0]
    assert set(re.findall(r"`(\w+)`", section.split("[The table of methods]")[0])) >= {*methods(), *ADAPTIVE}
    assert f"{len(methods())} methods" in text
