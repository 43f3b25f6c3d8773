"""Tests of the fallback section: every rule's golden line, and defaults that are the core's own."""

import pytest

from pdcoord.core.model import Fallback
from pdcoord.policy.compile import compile_policy
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.fallbackschema import FallbackSpec
from pdcoord.policy.load import parse_policies

LADDER = "ladder: [other-prefill, colocated]"


def problems_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text.encode(), "p")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("hedge: {share_max: 5}", "p:31: fallback.hedge.share_max: is 5, expected a number from 0 to 1"),
        (
            "hedge: {after_ms_min: -1}",
            "p:31: fallback.hedge.after_ms_min: is -1, expected a number from 0 to 3600000",
        ),
        (
            "quarantine: {share_max: -0.5}",
            "p:31: fallback.quarantine.share_max: is -0.5, expected a number from 0 to 1",
        ),
        (
            "resume: {tries_max: 0}",
            "p:31: fallback.resume.tries_max: is 0, expected a whole number from 1 to 8",
        ),
        (
            "resume: {stall_ms_min: 5}",
            "p:31: fallback.resume.stall_ms_min: is 5, expected a number from 100 to 600000",
        ),
        (
            "ladder: [colocated, colocated]",
            "p:31: fallback.ladder[1]: is colocated a second time; list it once",
        ),
    ],
)
def test_each_rule_names_the_field_the_value_and_the_remedy(good: str, new: str, expected: str) -> None:
    assert problems_of(good.replace(LADDER, new)) == [expected]


def test_second_attempts_and_quarantine_are_compiled_to_the_cores_units(good: str) -> None:
    text = good.replace(LADDER, "hedge: {share_max: 0.25, after_ms_min: 1500}, quarantine: {share_max: 0.75}")
    (model,) = compile_policy(parse_policies(text.encode(), "p")).models
    rules = model.fallback
    assert (rules.hedge_share_max, rules.hedge_after_s_min, rules.quarantine_share_max) == (0.25, 1.5, 0.75)


def test_bounds_on_continuations_are_compiled_to_the_cores_units(good: str) -> None:
    text = good.replace(LADDER, "ladder: [resume], resume: {tries_max: 5, age_s_max: 60, stall_ms_min: 2500}")
    (model,) = compile_policy(parse_policies(text.encode(), "p")).models
    rules = model.fallback
    assert (rules.resume_tries_max, rules.resume_age_s_max, rules.resume_stall_s_min) == (5, 60.0, 2.5)


def test_defaults_are_the_cores_own() -> None:
    written, rules = FallbackSpec(), Fallback()
    assert written.hedge.share_max == rules.hedge_share_max
    assert written.hedge.after_ms_min / 1e3 == rules.hedge_after_s_min
    assert written.quarantine.share_max == rules.quarantine_share_max
    assert written.resume.tries_max == rules.resume_tries_max
    assert written.resume.age_s_max == rules.resume_age_s_max
    assert written.resume.stall_ms_min / 1e3 == rules.resume_stall_s_min
