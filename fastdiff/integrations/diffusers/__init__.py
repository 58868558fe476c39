"""Drop-in schedulers for diffusers: its classes, configurations and interfaces, with our steps.

Each class is a subclass of diffusers' own of the same name: configuration, timesteps, levels, saving and loading are
inherited, and `step` is one fused operator on a row that was computed beforehand. SchedulerMixin stands here because
diffusers looks for it in the module that a saved pipeline names.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from fastdiff.integrations.diffusers.consistency import LCMScheduler, TCDScheduler
from fastdiff.integrations.diffusers.consistency_models import CMStochasticIterativeScheduler
from fastdiff.integrations.diffusers.ddim import DDIMInverseScheduler, DDIMScheduler
from fastdiff.integrations.diffusers.ddpm import DDPMScheduler, UnCLIPScheduler
from fastdiff.integrations.diffusers.deis import DEISMultistepScheduler
from fastdiff.integrations.diffusers.dpm2 import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from fastdiff.integrations.diffusers.dpm_sde import DPMSolverSDEScheduler
from fastdiff.integrations.diffusers.dpm_singlestep import DPMSolverSinglestepScheduler
from fastdiff.integrations.diffusers.dpm_solver import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.edm_dpm import EDMDPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.edm_euler import EDMEulerScheduler
from fastdiff.integrations.diffusers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from fastdiff.integrations.diffusers.flow_match import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from fastdiff.integrations.diffusers.heun import HeunDiscreteScheduler
from fastdiff.integrations.diffusers.ipndm import IPNDMScheduler
from fastdiff.integrations.diffusers.lms import LMSDiscreteScheduler
from fastdiff.integrations.diffusers.pndm import PNDMScheduler
from fastdiff.integrations.diffusers.repaint import RePaintScheduler
from fastdiff.integrations.diffusers.sa_solver import SASolverScheduler
from fastdiff.integrations.diffusers.score_sde import ScoreSdeVeScheduler
from fastdiff.integrations.diffusers.unipc import UniPCMultistepScheduler

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "SchedulerMixin",
    "ScoreSdeVeScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]

for _name in __all__:
    if _name != "SchedulerMixin":
        # What diffusers writes into a saved pipeline, and where it looks the class up again.
        globals()[_name].__module__ = __name__
