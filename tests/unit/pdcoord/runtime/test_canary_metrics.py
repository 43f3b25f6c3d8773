"""The metrics of canaries are in the catalog, and their labels are bounded."""

from pdcoord.runtime.canary_metrics import CANARY_METRICS
from pdcoord.runtime.catalog import METRICS
from pdcoord.runtime.metricspec import bound_of


def test_each_is_listed_and_every_label_is_bounded() -> None:
    for spec in CANARY_METRICS:
        assert spec in METRICS
        assert all(bound_of(spec.name, label) is not None for label in spec.labels)
