"""What makes one way of serving a request better than another."""

import math

from pdcoord.core.fleet import Pool, PoolName
from pdcoord.core.model import Model, Slo

SLO_EXCESS_EQUAL = 0.01
"""Predicted violations closer than this (1 % of the objective) count as equal."""

UNFIT_MAX = 2
"""Both legs on pools that are kept for other priorities, or none kept for this one is fast enough."""

_NO_SLO = Slo()
_NO_POOLS: frozenset[PoolName] = frozenset()

Rank = tuple[float, int, float, float, float, int]
"""Less is better: violation in steps of what counts as equal, legs on unfit pools, time in such steps, price,
time, turn."""


class Objective:
    """Least SLO violation, then pools of its priority, then least time, then least price, then longest idle.

    Every part of a rank grows with every figure it is made of, so what is no worse in each figure is
    no worse in rank; the short lists of pairs rest on that.

    Attributes:
        has_unfit: some pools are not for requests of this priority.
    """

    def __init__(self, model: Model, priority: int = 0) -> None:
        self._ttft_s = model.slo.ttft_s
        self._tpot_s = model.slo.tpot_s
        self._ttft_s_max = math.inf if model.slo.ttft_s is None else model.slo.ttft_s
        self._tpot_s_max = math.inf if model.slo.tpot_s is None else model.slo.tpot_s
        self._has_objectives = model.slo != _NO_SLO
        self._noise_s = model.disaggregation.saving_s_min or 1e-6
        self._unfit = _unfit_pools(model, priority)
        self.has_unfit = bool(self._unfit)
        # Without an objective a pool is preferred for as long as nobody would wait for it elsewhere.
        self._fit_ttft_s = model.slo.ttft_s if model.slo.ttft_s is not None else model.admission.queue_s_max

    def unfit(self, ttft_s: float, decode: Pool, prefill: Pool | None = None) -> int:
        """How many legs are on pools that are not for this request's priority, 0..UNFIT_MAX.

        A whole request counts as two legs. A candidate too slow for the preference counts as wholly unfit,
        whoever it is, so that time decides among those. 0 where the policy prefers no pool.
        """
        if not self.has_unfit:
            return 0
        if ttft_s > self._fit_ttft_s:
            return UNFIT_MAX
        return (decode.name in self._unfit) + ((prefill or decode).name in self._unfit)

    def excess(self, ttft_s: float, pace_s: float) -> float:
        """How far a prediction is past the objectives, as a ratio; 0.0 within them."""
        excess = 0.0
        if self._ttft_s is not None and ttft_s > self._ttft_s:
            excess += ttft_s / self._ttft_s - 1.0
        if self._tpot_s is not None and pace_s > self._tpot_s:
            excess += pace_s / self._tpot_s - 1.0
        return excess

    def rank(
        self,
        ttft_s: float,
        pace_s: float,
        others_s: float,
        cost: float,
        turn: int,
        *,
        unfit: int = 0,
        harm: float = 0.0,
    ) -> Rank:
        """Where a candidate stands.

        Args:
            others_s: what it costs others, which counts as its own time.
            turn: when its endpoints were last sent a request; the one whose turn is longest past goes first.
            unfit: as the method of that name says.
            harm: requests of others that are expected to miss their objectives for it.
        """
        excess = 0.0
        if self._has_objectives:
            is_within = ttft_s <= self._ttft_s_max and pace_s <= self._tpot_s_max
            excess = harm if is_within else self.excess(ttft_s, pace_s) + harm
        time_s = ttft_s + others_s
        return (excess // SLO_EXCESS_EQUAL, unfit, time_s // self._noise_s, cost, time_s, turn)


def _unfit_pools(model: Model, priority: int) -> frozenset[PoolName]:
    """Pools that are not for requests of this priority.

    Those kept for it, if there are any, leave out all others; else only those kept for lower ones are out.
    """
    limits = {pool.name: pool.priority_max for pool in model.pools if pool.priority_max is not None}
    if not limits:
        return _NO_POOLS
    kept = {name for name, priority_max in limits.items() if priority <= priority_max}
    if kept:
        return frozenset(pool.name for pool in model.pools) - kept
    return frozenset(limits)
