"""What a wheel and a source distribution hold."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def setup(folder: Path, *commands: str) -> str:
    """What setup.py says; its own files go to `folder`, the compiled objects are those of the last installation."""
    egg_info = ["egg_info", "--egg-base", str(folder)]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *egg_info, *commands], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize(
    ("value", "home", "said"),
    [
        ("yes", None, "FASTDIFF_CUDA=yes: expected auto, 0 or 1"),
        ("1", "/nowhere", "is no CUDA toolkit" if torch.version.cuda else "PyTorch is built without CUDA"),
    ],
)
def test_cuda_that_cannot_be_built(value: str, home: str | None, said: str) -> None:
    environment = {**os.environ, "FASTDIFF_CUDA": value} | ({} if home is None else {"CUDA_HOME": home})
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["build", "--build-base", str(folder / "build")]
    setup(folder, *build, "bdist_wheel", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder))
    (path,) = folder.glob("*.whl")
    assert path.name.startswith("fastdiff_engine-")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def tracked(*patterns: str) -> set[str]:
    """The files of the tree under these patterns, without what is built."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_wheel_holds_every_module_and_nothing_at_top_level(wheel: set[str]) -> None:
    modules = tracked("fastdiff/**/*.py") | {f"fastdiff/{name}" for name in tracked("kernels/*.py")}
    assert modules <= wheel
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"fastdiff"}


def test_wheel_holds_the_model_the_types_and_the_extension(wheel: set[str]) -> None:
    assert "fastdiff/py.typed" in wheel
    assert tracked("fastdiff/assets/*.safetensors", "fastdiff/assets/*.md") <= wheel
    assert any(name.startswith("fastdiff/_C.") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
    assert any(name.endswith("/LICENSE") for name in wheel)


def test_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    setup(tmp_path, "sdist", "--dist-dir", str(tmp_path), "--formats", "gztar")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = tracked(
        "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh", "kernels/*.py", "fastdiff/**/*.py"
    )
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_the_licence_is_named_without_a_warning(tmp_path: Path) -> None:
    assert "deprecated" not in setup(tmp_path)
    (information,) = tmp_path.glob("*.egg-info/PKG-INFO")
    assert {"License: MIT", "License-File: LICENSE"} <= set(information.read_text(encoding="utf-8").splitlines())


def test_packages_are_listed() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "fastdiff").rglob("__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {folder.replace("/", ".") for folder in folders} | {"fastdiff.kernels"}


def test_the_version_stands_in_two_places_and_is_equal() -> None:
    import fastdiff

    assert fastdiff.__version__ == PROJECT["project"]["version"]


def test_pins_satisfy_what_the_package_asks_for() -> None:
    """Every dependency has one pinned version for development, inside the range that users may have."""
    from packaging.requirements import Requirement

    groups = PROJECT["dependency-groups"]
    pins = {Requirement(text).name: Requirement(text).specifier for group in groups.values() for text in group}
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["bench"]]
    for requirement in map(Requirement, [*asked, *PROJECT["build-system"]["requires"]]):
        (pin,) = pins[requirement.name]
        assert pin.operator == "==", requirement.name
        assert requirement.specifier.contains(pin.version), requirement.name
