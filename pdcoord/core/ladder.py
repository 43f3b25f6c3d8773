"""The fallback ladder of a plan and the budget that keeps a prefill outage from becoming a decode outage."""

from collections import deque
from collections.abc import Iterable, Mapping

from pdcoord.core.fleet import Endpoint, EndpointState
from pdcoord.core.model import Fallback, Model
from pdcoord.core.plan import Rung
from pdcoord.protocol.plans import RungKind

BUDGET_SAMPLE_MIN = 20
"""Requests before a share means anything: below it the first fallback would already be 100 %. A window
that is shorter is taken at its word."""


class FallbackBudget:
    """Share of a model's recent requests that fell back to a local prefill.

    Attributes:
        refused_count: requests that found no prefill and were not let fall back, since the start.
    """

    def __init__(self, window: int) -> None:
        self.refused_count = 0
        self._recent: deque[bool] = deque(maxlen=window)
        self._fallback_count = 0
        self._count_min = min(window, BUDGET_SAMPLE_MIN)

    @property
    def window(self) -> int | None:
        return self._recent.maxlen

    def note(self, *, is_fallback: bool) -> None:
        """One more request was served, with or without falling back."""
        if len(self._recent) == self._recent.maxlen:
            self._fallback_count -= self._recent[0]
        self._recent.append(is_fallback)
        self._fallback_count += is_fallback

    @property
    def share(self) -> float:
        """0..1; 0.0 until there are enough requests to speak of a share."""
        count = len(self._recent)
        return self._fallback_count / count if count >= self._count_min else 0.0

    def allows(self, rules: Fallback, decode: EndpointState) -> bool:
        """Whether the ladder has one more local prefill, and the share and the decode pod room for it."""
        if RungKind.COLOCATED not in rules.rungs:
            return False
        usage = decode.sample.kv_usage if decode.sample is not None else 0.0
        return usage <= rules.decode_kv_usage_max and (
            rules.colocated_share_max >= 1.0 or self.share < rules.colocated_share_max
        )


def replaced_budgets(
    before: Mapping[str, FallbackBudget], models: Iterable[Model]
) -> dict[str, FallbackBudget]:
    """A budget for each model by its name; that of before goes on where its window is as it was."""
    budgets: dict[str, FallbackBudget] = {}
    for model in models:
        budget, window = before.get(model.name), model.fallback.window
        is_same = budget is not None and budget.window == window
        budgets[model.name] = budget if budget is not None and is_same else FallbackBudget(window)
    return budgets


def may_try_other(model: Model, attempt: int) -> bool:
    """Whether the policy lets a request be sent to so many other decode endpoints than its first."""
    return RungKind.OTHER_DECODE in model.fallback.rungs and attempt <= model.fallback.other_decode_max


def rungs(
    model: Model, decode: EndpointState, other_prefills: tuple[Endpoint, ...], budget: FallbackBudget
) -> tuple[Rung, ...]:
    """The steps a sidecar may take for a split plan, in the policy's order; other-decode is not its own."""
    steps: list[Rung] = []
    for kind in model.fallback.rungs:
        match kind:
            case RungKind.OTHER_PREFILL:
                steps += [Rung(kind, prefill) for prefill in other_prefills]
            case RungKind.COLOCATED:
                can_serve = decode.endpoint.pool.can_serve_alone
                if can_serve and budget.allows(model.fallback, decode):
                    steps.append(Rung(kind))
            case RungKind.OTHER_DECODE | RungKind.RESUME | RungKind.REFUSE:
                pass
    return tuple(steps)
