"""A schedule and a prediction that fit a method, for tests that take every method of the registry."""

from fastdiff import samplers, schedules
from fastdiff.schedules import Schedule


def fitting(method: str, vp: Schedule | None = None) -> tuple[Schedule, str]:
    """(schedule, prediction); `vp` where the method takes it, and the cosine schedule if it is None."""
    kinds = samplers.methods()[method].kinds
    if not kinds or "vp" in kinds:
        return vp or schedules.cosine(1000), "v"
    return {"flow": (schedules.flow(1000), "flow"), "ve": (schedules.edm(1000), "edm")}[kinds[0]]
