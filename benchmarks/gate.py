"""The gate in front of every speed: right results, by the tests' own rule."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch import Tensor

from benchmarks.work import Contender, Work

SAME = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How far a peer may be from the truth and still do the same work: it rounds where it likes, but computes this."""


def _tolerance():  # type: ignore[no-untyped-def]
    path = Path(__file__).parent.parent / "tests" / "tolerance.py"
    spec = spec_from_file_location("tolerance", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tolerance = _tolerance()


def check(contender: Contender, work: Work, dtype: str) -> tuple[float | None, str | None]:
    """(relative error to float64, what is wrong or None); the error is None where there is nothing to compare."""
    with contender.context():
        result: Tensor = contender.call()
    if contender.backend is None and not work.comparable:
        return None, None
    error = tolerance.relative_error(result, work.truth)
    if contender.backend is None:
        same = result.shape == work.truth.shape and error <= SAME[dtype]
        return error, None if same else f"relative error {error:.1e}: it does not do the same work"
    try:
        tolerance.assert_close_to_truth(result, work.truth, work.plain)
    except AssertionError as wrong:
        return error, str(wrong).splitlines()[0]
    return error, None
