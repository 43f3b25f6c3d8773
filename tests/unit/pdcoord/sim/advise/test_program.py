"""The program's optimum and its duals on cases small enough for a head."""

import pytest

from pdcoord.sim.advise.program import Program, UnsolvedError


def test_an_optimum_and_what_its_bounds_are_worth() -> None:
    program = Program()
    x, y = program.variable(3.0), program.variable(2.0)
    program.row("sum", {x: 1.0, y: 1.0}, 4.0)
    program.row("x", {x: 1.0}, 1.0)
    solution = program.solve()
    assert solution.objective == pytest.approx(9.0)
    assert solution.values == pytest.approx((1.0, 3.0))
    assert solution.worth == pytest.approx({"sum": 2.0, "x": 1.0})


def test_whole_numbers_are_whole() -> None:
    program = Program()
    x = program.variable(1.0, is_whole=True)
    program.row("bound", {x: 2.0}, 5.0)
    assert program.solve().values == pytest.approx((2.0,))


def test_equal_rows_hold() -> None:
    program = Program()
    x, y = program.variable(1.0), program.variable(0.0)
    program.row("tie", {x: 1.0, y: -2.0}, 0.0, is_equal=True)
    program.row("y", {y: 1.0}, 3.0)
    assert program.solve().objective == pytest.approx(6.0)


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_has_no_answer_says_so(*, is_whole: bool) -> None:
    program = Program()
    x = program.variable(1.0, is_whole=is_whole)
    program.row("less", {x: 1.0}, -1.0)
    with pytest.raises(UnsolvedError):
        program.solve()
