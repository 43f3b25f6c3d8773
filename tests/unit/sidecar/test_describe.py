"""The drawn sections of the docs are those that the code would draw now."""

from pathlib import Path

import pytest

from sidecar.describe import SECTIONS, redraw, section
from sidecar.handoff import TRANSITIONS
from sidecar.observe import METRICS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("name", ["sidecar.md", "metrics-sidecar.md"])
def test_the_docs_are_fresh(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert "<!-- drawn: " in text
    assert redraw(text) == text, f"draw it anew: python -m sidecar.describe docs/{name}"


def test_every_section_is_in_the_docs() -> None:
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("sidecar.md", "metrics-sidecar.md"))
    assert [name for name in SECTIONS if f"<!-- drawn: {name} -->" not in text] == []


def test_a_section_is_replaced_and_the_rest_is_kept() -> None:
    text = "before\n<!-- drawn: states -->\nold\n<!-- end -->\nafter\n"
    assert redraw(text) == f"before\n<!-- drawn: states -->\n{section('states')}<!-- end -->\nafter\n"


def test_every_transition_and_metric_has_its_line() -> None:
    assert len(section("transitions").splitlines()) == len(TRANSITIONS) + 2
    assert len(section("metrics").splitlines()) == len(METRICS) + 2
    for line in section("transitions").splitlines():
        assert line.count("|") == 5
