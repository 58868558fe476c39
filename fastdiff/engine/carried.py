"""What a state takes along on its way through a table: history and anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.samplers.table import StepTable

__all__ = ["Carried"]


@dataclass
class Carried:
    """history: newest first, as many as a row of the table reads."""

    table: StepTable
    history: tuple[Tensor, ...] = ()
    anchor: Tensor | None = None

    def inputs(self, row: int) -> dict[str, Any]:
        """What `ops.sampler_step` is given of this for a row, and asked for in return."""
        use = self.table.uses[row]
        return {
            "anchor": self.anchor if use.anchor else None,
            "history": self.history[: use.history],
            "new_history": use.new_history,
            "new_anchor": use.new_anchor,
        }

    def keep(self, history: Tensor | None, anchor: Tensor | None) -> None:
        """Takes up what a row gave, or None."""
        if history is not None:
            depth = self.table.depth
            self.history = (history, *self.history[: depth - 1]) if depth > 1 else (history,)
        if anchor is not None:
            self.anchor = anchor
