"""Methods that choose their own steps from an estimate of the error: no table holds them, `fastdiff.run_adaptive` does.

What each is, for people and for the checks of its options; `fastdiff.engine.adaptive` has the mathematics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MAX_STEPS = 1000


@dataclass(frozen=True)
class AdaptiveInfo:
    """order     of the solution that is kept
    options      and their defaults
    needs        the extra of the package without which it does not run, or None
    """

    name: str
    paper: str
    order: int
    options: Mapping[str, Any]
    needs: str | None = None


ADAPTIVE: Mapping[str, AdaptiveInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            AdaptiveInfo(
                name="dpm_adaptive",
                paper="Lu et al. 2022, DPM-Solver; Crowson 2022, k-diffusion",
                order=3,
                options={
                    "order": 3,
                    "rtol": 0.05,
                    "atol": 0.0078,
                    "h_init": 0.05,
                    "pcoeff": 0.0,
                    "icoeff": 1.0,
                    "dcoeff": 0.0,
                    "accept_safety": 0.81,
                    "eta": 0.0,
                    "s_noise": 1.0,
                    "per_sample": True,
                    "max_steps": MAX_STEPS,
                },
            ),
            AdaptiveInfo(
                name="rk45",
                paper="Song et al. 2021, Score-Based Generative Modeling through SDEs; Dormand and Prince 1980",
                order=5,
                options={"rtol": 1e-5, "atol": 1e-5, "max_steps": MAX_STEPS},
                needs="adaptive",
            ),
        )
    }
)
