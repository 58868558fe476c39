"""fastdiff: the fastest honest way to sample from a diffusion model."""

from fastdiff import engine, models, ops, samplers, schedules, training
from fastdiff.config import use_backend
from fastdiff.engine.adaptive import AdaptiveResult, run_adaptive
from fastdiff.engine.guidance import Guidance
from fastdiff.engine.run import run
from fastdiff.engine.sample import sample
from fastdiff.errors import BackendError, CheckpointError, InputError
from fastdiff.integrations.accelerate import accelerate, restore
from fastdiff.integrations.patch import SchedulerPatch, patch_scheduler, unpatch_scheduler
from fastdiff.models.loading import load_model
from fastdiff.ops import explain, report

__version__ = "0.1.0"

__all__ = [
    "AdaptiveResult",
    "BackendError",
    "CheckpointError",
    "Guidance",
    "InputError",
    "SchedulerPatch",
    "accelerate",
    "engine",
    "explain",
    "load_model",
    "models",
    "ops",
    "patch_scheduler",
    "report",
    "restore",
    "run",
    "run_adaptive",
    "sample",
    "samplers",
    "schedules",
    "training",
    "unpatch_scheduler",
    "use_backend",
]
