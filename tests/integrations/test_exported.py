"""The classes that are there: every other test of them reads the list when it runs."""

import diffusers
import pytest

import fastdiff.integrations.diffusers as drop_in

SCHEDULERS = (
    *("DDPM", "DDIM", "DDIMInverse", "PNDM", "IPNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"),
    *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSinglestep", "DPMSolverMultistep"),
    *("DPMSolverMultistepInverse", "DPMSolverSDE", "UniPCMultistep", "DEISMultistep", "SASolver", "LCM", "TCD"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "EDMEuler", "EDMDPMSolverMultistep", "ScoreSdeVe"),
    *("RePaint", "UnCLIP", "CMStochasticIterative"),
)


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in SCHEDULERS])
def test_a_class_of_diffusers_has_ours(name):
    ours = getattr(drop_in, name)
    assert name in drop_in.__all__
    assert (ours.__name__, ours.__module__) == (name, drop_in.__name__)
    assert issubclass(ours, getattr(diffusers, name))
    assert ours is not getattr(diffusers, name)
