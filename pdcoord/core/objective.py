"""What makes one way of serving a request better than another."""

from pdcoord.core.model import Model, Slo

SLO_EXCESS_EQUAL = 0.01
"""Predicted violations closer than this (1 % of the objective) count as equal."""

Rank = tuple[float, float, float, float, int]
"""Less is better: violation and time in steps of what counts as equal, price, time, turn."""


class Objective:
    """Least SLO violation, then least time, then least price, then whoever waited longest.

    Every part of a rank grows with every figure it is made of, so what is no worse in each figure is
    no worse in rank; the short lists of pairs rest on that.
    """

    def __init__(self, model: Model) -> None:
        self._ttft_s = model.slo.ttft_s
        self._tpot_s = model.slo.tpot_s
        self._has_objectives = model.slo != Slo()
        self._noise_s = model.disaggregation.saving_s_min or 1e-6

    def excess(self, ttft_s: float, step_s: float) -> float:
        """How far a prediction is past the objectives, as a ratio; 0.0 within them."""
        excess = 0.0
        if self._ttft_s is not None and ttft_s > self._ttft_s:
            excess += ttft_s / self._ttft_s - 1.0
        if self._tpot_s is not None and step_s > self._tpot_s:
            excess += step_s / self._tpot_s - 1.0
        return excess

    def rank(self, ttft_s: float, step_s: float, stall_s: float, cost: float, turn: int) -> Rank:
        """Where a candidate stands.

        Args:
            stall_s: delay it causes others, which counts as its own time.
            turn: when its endpoints were last sent a request; the one whose turn is longest past goes first.
        """
        excess = self.excess(ttft_s, step_s) if self._has_objectives else 0.0
        time_s = ttft_s + stall_s
        return (excess // SLO_EXCESS_EQUAL, time_s // self._noise_s, cost, time_s, turn)
