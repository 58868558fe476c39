"""Puts fastdiff's schedulers into a pipeline of diffusers, and diffusers' own back into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import get_annotations, signature
from typing import Any

from fastdiff.errors import InputError

__all__ = ["SchedulerPatch", "patch_scheduler", "unpatch_scheduler"]


@dataclass(frozen=True)
class SchedulerPatch:
    """What was done to the schedulers of a pipeline; `str` gives a line for each.

    replaced   the name of the class of each scheduler that was replaced, by the component's name
    kept       why each of the others was left as it is, by the component's name
    library    whose classes they have been replaced by
    """

    replaced: Mapping[str, str]
    kept: Mapping[str, str]
    library: str

    def __str__(self) -> str:
        lines = [f"{component}: {name}, now from {self.library}" for component, name in self.replaced.items()]
        return "\n".join(lines + [f"{component}: kept, {reason}" for component, reason in self.kept.items()])


def patch_scheduler(pipe: Any, *, strict: bool = False) -> SchedulerPatch:
    """Replaces, in place, each scheduler of a pipeline by fastdiff's class of the same name; says which.

    The new object has all that the old one had: configuration (keys of other classes too), timesteps, levels, begin
    index and whatever was set on it; not the history of a run under way. The old object is left alone. Pipelines inside
    the pipeline are patched with it. A scheduler that fastdiff has no class for is kept, as is a subclass of somebody
    else's, whose changes would be lost. A pipeline that is saved afterwards names fastdiff's classes, and
    `import fastdiff.integrations.diffusers` has to come before it is loaded again; after `unpatch_scheduler` it can be
    saved for those who have no fastdiff.

    pipe     a `DiffusionPipeline`, a `ModularPipeline`, or any object with a scheduler among its attributes
    strict   raise an error, and change nothing, if a scheduler would be kept that is not fastdiff's

    Raises InputError if `pipe` has no scheduler, and as `strict` says.
    """
    classes = {theirs: ours for ours, theirs in _originals().items()}
    return _exchange("patch_scheduler", pipe, classes, "fastdiff", strict=strict)


def unpatch_scheduler(pipe: Any, *, strict: bool = False) -> SchedulerPatch:
    """Replaces, in place, each of fastdiff's schedulers of a pipeline by diffusers' own: `patch_scheduler` undone.

    Arguments, result and errors are those of `patch_scheduler`.
    """
    return _exchange("unpatch_scheduler", pipe, _originals(), "diffusers", strict=strict)


def _originals() -> dict[type, type]:
    """diffusers' class for each of ours."""
    from fastdiff.integrations import diffusers as drop_in
    from fastdiff.integrations.diffusers.scheduler import Scheduler

    # What diffusers itself calls by that name may be ours by now.
    classes = [kind for name in drop_in.__all__ if issubclass(kind := getattr(drop_in, name), Scheduler)]
    return {kind: next(base for base in kind.__mro__[1:] if base.__name__ == kind.__name__) for kind in classes}


def _exchange(caller: str, pipe: Any, classes: Mapping[type, type], library: str, *, strict: bool) -> SchedulerPatch:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    if isinstance(pipe, type | SchedulerMixin):
        kind = "a class" if isinstance(pipe, type) else "a scheduler"
        raise InputError(
            f"{caller}: pipe is {kind}, {_name(pipe)}: expected a pipeline that has one; for a scheduler alone use "
            "fastdiff.integrations.diffusers.<its class>.from_config(scheduler.config)"
        )
    found = _schedulers(pipe, SchedulerMixin)
    if not found:
        raise InputError(
            f"{caller}: pipe has no scheduler: expected a pipeline of diffusers, or an object with one in an attribute "
            f"such as pipe.scheduler; got {_name(pipe)}"
        )
    kept: dict[str, str] = {}
    made: dict[int, Any] = {}
    for component, _, _, scheduler in found:
        reason = _refusal(scheduler, classes, library)
        if reason is None:
            made[id(scheduler)] = _converted(scheduler, classes[type(scheduler)])
        else:
            kept[component] = reason
            if strict and type(scheduler) not in classes.values():
                raise InputError(f"{caller}: pipe.{component} cannot be replaced, and strict=True: {reason}")
    replaced = {}
    for component, owner, name, scheduler in found:
        if id(scheduler) in made:
            _set(owner, name, made[id(scheduler)])
            replaced[component] = type(scheduler).__name__
    return SchedulerPatch(replaced, kept, library)


def _schedulers(pipe: Any, base: type) -> list[tuple[str, Any, str, Any]]:
    """(name from `pipe` on, owner, name there, scheduler) of each scheduler of a pipeline and of those inside it."""
    from diffusers import DiffusionPipeline

    found, owners, seen = [], [("", pipe)], {id(pipe)}
    for prefix, owner in owners:
        attributes = dict(getattr(owner, "__dict__", {}))
        attributes.setdefault("scheduler", getattr(owner, "scheduler", None))
        for name, value in attributes.items():
            if isinstance(value, base):
                found.append((prefix + name, owner, name, value))
            elif isinstance(value, DiffusionPipeline) and id(value) not in seen:
                seen.add(id(value))
                owners.append((f"{prefix}{name}.", value))
    return found


def _refusal(scheduler: Any, classes: Mapping[type, type], library: str) -> str | None:
    """Why a scheduler is kept; None if it is to be replaced."""
    kind = type(scheduler)
    if kind in classes:
        if "step" in vars(scheduler):
            return f"{kind.__name__}, because this object has a step of its own"
        return None
    if kind in classes.values():
        return f"{kind.__name__} is {library}'s already"
    known = next((base for base in kind.__mro__ if base in classes), None)
    if known is not None:
        return f"{_name(scheduler)} is a subclass of {known.__name__}, and what it changes would be lost"
    return f"{_name(scheduler)}, of which {library} has no class"


def _converted(scheduler: Any, kind: type) -> Any:
    """A scheduler of another class in the same state; lists and dictionaries are copies."""
    known = signature(kind.__init__).parameters  # type: ignore[misc]
    made: Any = kind(**{key: value for key, value in scheduler.config.items() if key in known})
    for name in _state(scheduler, made):
        value = getattr(scheduler, name)
        setattr(made, name, value.copy() if type(value) in (list, dict) else value)
    if "lower_order_nums" in vars(made):
        # The history is kept in another form: in the middle of a run the method begins with its first order again.
        made.lower_order_nums = 0
    return made


def _state(scheduler: Any, made: Any) -> list[str]:
    """The attributes that a new scheduler takes over: all but those that fastdiff's classes add for themselves."""
    held, new = vars(scheduler), vars(made)
    bases = [base for base in type(scheduler).__mro__ if base.__module__.startswith("fastdiff.")]
    ours = {name for base in bases for name in (*vars(base), *get_annotations(base)) if name.startswith("_")}
    names = [name for name in held if name in new or name not in ours]
    return names + [name for name in new if name not in held and hasattr(type(scheduler), name)]


def _set(owner: Any, name: str, scheduler: Any) -> None:
    """Puts a scheduler into a pipeline, whose configuration then names its class."""
    if name in getattr(owner, "_component_specs", ()):
        owner.update_components(**{name: scheduler})
    else:
        setattr(owner, name, scheduler)


def _name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
