"""The exponential multistep classes of diffusers, by name, and what their tests share."""

from typing import Any

MULTISTEP = "DPMSolverMultistepScheduler"
INVERSE = "DPMSolverMultistepInverseScheduler"
SINGLESTEP = "DPMSolverSinglestepScheduler"
UNIPC = "UniPCMultistepScheduler"
DEIS = "DEISMultistepScheduler"
SA = "SASolverScheduler"
EDM = "EDMDPMSolverMultistepScheduler"
CLASSES = (MULTISTEP, INVERSE, SINGLESTEP, UNIPC, DEIS, SA, EDM)
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def orders(name: str, order: int) -> dict[str, Any]:
    """The configuration of that order."""
    return {"predictor_order": order, "corrector_order": order} if name == SA else {"solver_order": order}
