"""Drop-in schedulers for diffusers: its classes, configurations and interfaces, with our steps.

Each class is a subclass of diffusers' own of the same name: configuration, timesteps, levels, saving and loading are
inherited, and `step` is one fused operator on a row that was computed beforehand. SchedulerMixin stands here because
diffusers looks for it in the module that a saved pipeline names.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from fastdiff.integrations.diffusers.dpm2 import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from fastdiff.integrations.diffusers.dpm_sde import DPMSolverSDEScheduler
from fastdiff.integrations.diffusers.dpm_solver import DPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.edm_euler import EDMEulerScheduler
from fastdiff.integrations.diffusers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from fastdiff.integrations.diffusers.heun import HeunDiscreteScheduler
from fastdiff.integrations.diffusers.ipndm import IPNDMScheduler
from fastdiff.integrations.diffusers.lms import LMSDiscreteScheduler
from fastdiff.integrations.diffusers.pndm import PNDMScheduler

__all__ = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SchedulerMixin",
]

for _name in __all__:
    if _name != "SchedulerMixin":
        # What diffusers writes into a saved pipeline, and where it looks the class up again.
        globals()[_name].__module__ = __name__
