"""The page of the routing benchmark has the figures of the results that lie beside it."""

import json

from benchmarks.policies.page import PAGE, RESULTS, SECTIONS, drawn


def test_the_page_is_fresh() -> None:
    text, results = PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    assert drawn(text, results) == text, "draw it anew: python -m benchmarks.policies.page"
    assert [name for name in SECTIONS if f"<!-- drawn: {name} -->" not in text] == []
