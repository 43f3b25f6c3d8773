"""Tests of how problems are written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.policy.errors import (
    PROBLEMS_SHOWN_MAX,
    KeyPath,
    PolicyError,
    Problem,
    format_key_path,
    quote,
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((), ""),
        (("pools", 1, "layout", "block_tokens"), "pools[1].layout.block_tokens"),
        (("labels", "llm-d.ai/role"), 'labels["llm-d.ai/role"]'),
        (("match_labels", "role-name"), "match_labels.role-name"),
        (("a", ""), 'a[""]'),
        ((0, "a"), "[0].a"),
    ],
)
def test_a_key_path_reads_as_people_write_it(path: KeyPath, expected: str) -> None:
    assert format_key_path(path) == expected


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_quoted_text_is_one_printable_line(text: str) -> None:
    quoted = quote(text)
    assert quoted.isprintable()
    assert len(quoted.splitlines()) == 1


def test_quoted_text_is_cut() -> None:
    assert quote("a" * 100, 3) == '"aaa…"'
    assert quote('say "x"\n') == '"say \\"x\\"\\u000a"'


def test_a_problem_names_file_line_key_and_message() -> None:
    problem = Problem("p.yaml", 3, ("a", 0), "is 1")
    assert str(problem) == "p.yaml:3: a[0]: is 1"
    assert problem.format("warning") == "p.yaml:3: warning: a[0]: is 1"
    assert str(Problem("p.yaml", None, (), "is a directory")) == "p.yaml: is a directory"


def test_problems_are_in_the_order_of_lines_and_none_is_lost() -> None:
    error = PolicyError(Problem("p", line, (), "x") for line in (9, 2, 5))
    assert [problem.line for problem in error.problems] == [2, 5, 9]
    many = PolicyError(Problem("p", line, (), "x") for line in range(PROBLEMS_SHOWN_MAX + 5))
    assert len(many.problems) == PROBLEMS_SHOWN_MAX + 5
    assert str(many).splitlines()[-1] == "... and 5 more"
