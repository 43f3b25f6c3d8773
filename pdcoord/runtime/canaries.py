"""What is shown of canaries: counts and gauges, and a log line for each that ended."""

from collections import Counter
from collections.abc import Callable, Iterable

from structlog.typing import FilteringBoundLogger

from pdcoord.core.canary import Canaries, CanaryView
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.pathview import layout_words
from pdcoord.core.trials import CanaryOrder, PairState
from pdcoord.runtime import canary_metrics as catalog
from pdcoord.runtime.metricspec import MetricSpec

_Sample = tuple[tuple[str, ...], float]
_Labels = tuple[str, str, str]


class CanaryRecord:
    """Hears of each canary that ended, and tells the state of all pairs when it is asked for.

    Counts of pairs that a new policy no longer has are dropped, so that there are never more than pairs.
    """

    def __init__(self, canaries: Canaries, clock: Callable[[], float], log: FilteringBoundLogger) -> None:
        self._canaries = canaries
        self._clock = clock
        self._log = log
        self._counts: Counter[tuple[_Labels, CanaryOutcome]] = Counter()

    def told(self, order: CanaryOrder, finding: Finding) -> None:
        """One canary ended."""
        labels = (str(order.model), str(order.prefill.pool.name), str(order.decode.pool.name))
        self._counts[labels, finding.outcome] += 1
        tell = self._log.info
        if finding.outcome.is_failure:
            tell = self._log.error
        elif finding.outcome is not CanaryOutcome.PASSED:
            tell = self._log.warning
        tell(
            "canary.judged",
            model=order.model,
            prefill=order.prefill.id,
            decode=order.decode.id,
            outcome=finding.outcome,
            detail=finding.detail,
            position=finding.position,
            prefill_layout=layout_words(order.prefill.pool),
            decode_layout=layout_words(order.decode.pool),
        )

    def samples(self) -> Iterable[tuple[MetricSpec, Iterable[_Sample]]]:
        """For /metrics."""
        views = {_labels(view): view for view in self._canaries.views(self._clock())}
        self._counts = Counter({key: count for key, count in self._counts.items() if key[0] in views})
        outcomes = [(labels, outcome) for labels in views for outcome in CanaryOutcome]
        yield catalog.CANARIES, [((*labels, o), float(self._counts[labels, o])) for labels, o in outcomes]
        states = [(labels, state) for labels in views for state in PairState]
        yield catalog.STATE, [((*labels, s), float(views[labels].state is s)) for labels, s in states]
        yield catalog.SUSPECTS, [(labels, float(view.suspects)) for labels, view in views.items()]
        ages = [(labels, view.age_s) for labels, view in views.items()]
        yield catalog.AGE, [(labels, age_s) for labels, age_s in ages if age_s is not None]


def _labels(view: CanaryView) -> _Labels:
    return str(view.model), str(view.prefill.name), str(view.decode.name)
