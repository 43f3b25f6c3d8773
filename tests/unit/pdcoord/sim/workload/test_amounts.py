"""Amounts: draws lie within the bounds and have the mean that was asked for; bad ones are refused."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdcoord.sim.workload.amounts import (
    Amount,
    AmountFileError,
    AmountSpec,
    SecondsSpec,
    TokensOrNoneSpec,
    TokensSpec,
)
from pdcoord.sim.workload.draws import unit

HERE = Path()


def drawn(amount: Amount, count: int = 5_000) -> list[int]:
    return [amount.tokens(unit(3, number)) for number in range(count)]


@pytest.mark.parametrize(
    ("spec", "mean"),
    [
        (TokensSpec(type="fixed", value=256), 256),
        (TokensSpec(type="uniform", min=10, max=20), 15),
        (TokensSpec(type="normal", mean=500, std_dev=50), 500),
        (TokensSpec(type="lognormal", mean=500, std_dev=400), 500),
        (TokensSpec(type="exponential", mean=300), 300),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_the_mean_is_what_was_asked_for(spec: TokensSpec, mean: float) -> None:
    assert fmean(drawn(spec.compiled(HERE))) == pytest.approx(mean, rel=0.05)


@given(
    st.sampled_from(["uniform", "normal", "lognormal", "exponential"]),
    st.integers(1, 1_000),
    st.integers(0, 1_000),
    st.floats(1, 2_000),
    st.floats(0, 5_000),
    st.integers(0, 1 << 62),
)
def test_draws_lie_within_the_bounds(
    kind: Any, low: int, width: int, mean: float, spread: float, seed: int
) -> None:
    written: dict[str, Any] = {"type": kind, "min": low, "max": low + width}
    if kind != "uniform":
        written["mean"] = mean
    if kind in {"normal", "lognormal"}:
        written["std_dev"] = spread
    amount = TokensSpec.model_validate(written).compiled(HERE)
    assert low <= amount.tokens(unit(seed, 1)) <= low + width


def test_both_ends_of_whole_uniform_amounts_are_as_likely_as_the_rest() -> None:
    values = drawn(TokensSpec(type="uniform", min=1, max=4).compiled(HERE), 8_000)
    counts = [values.count(value) for value in (1, 2, 3, 4)]
    assert sum(counts) == 8_000
    assert all(1_850 < count < 2_150 for count in counts)


def test_a_number_alone_is_fixed() -> None:
    assert TokensSpec.model_validate_json("7").compiled(HERE).tokens(0.3) == 7
    assert SecondsSpec.model_validate_json("0.25").compiled(HERE).at(0.9) == 0.25
    assert TokensOrNoneSpec.model_validate_json("0").compiled(HERE).tokens(0.5) == 0


def test_a_distribution_without_a_type_is_normal_as_with_inference_perf() -> None:
    amount = TokensSpec.model_validate_json('{"mean": 50, "std_dev": 0, "min": 10, "max": 90}')
    assert amount.compiled(HERE).tokens(0.1) == 50


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"type": "uniform", "min": 5}', "is missing, which type uniform needs"),
        ('{"type": "uniform", "min": 5, "max": 4}', r"is 4, expected at least min \(5\)"),
        ('{"type": "fixed", "value": 5, "mean": 4}', "is not for type fixed; its keys are value"),
        ("0", "is 0, expected at least 1"),
        ("2.5", "is 2.5, expected a whole number"),
        ('{"type": "empirical"}', "is missing, which type empirical needs"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokensSpec.model_validate_json(written)


@pytest.mark.parametrize("written", ["true", '"7"', "[1]", "-1", "1e9"])
def test_what_is_no_amount_is_refused(written: str) -> None:
    with pytest.raises(ValidationError):
        AmountSpec.model_validate_json(written)


def test_empirical_amounts_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("10\n\nnonsense\n-4\nnan\n30\n20\n")
    (tmp_path / "lengths.csv").write_text("when,tokens\na,5\nb,6\nc\nd,x\n")
    plain = TokensSpec(type="empirical", file="lengths.txt").compiled(tmp_path)
    assert set(drawn(plain, 200)) == {10, 20, 30}
    column = TokensSpec(type="empirical", file="lengths.csv", column="tokens").compiled(tmp_path)
    assert set(drawn(column, 200)) == {5, 6}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokensSpec(type="empirical", file="none.txt"), "cannot be read: No such file"),
        (TokensSpec(type="empirical", file="words.txt"), "holds no number"),
        (
            TokensSpec(type="empirical", file="words.txt", column="c"),
            'has no column "c"; it has "some words"',
        ),
    ],
)
def test_a_file_without_amounts_is_refused(tmp_path: Path, spec: TokensSpec, message: str) -> None:
    (tmp_path / "words.txt").write_text("some words\n")
    with pytest.raises(AmountFileError, match=message):
        spec.compiled(tmp_path)
