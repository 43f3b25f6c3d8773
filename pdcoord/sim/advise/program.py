"""A linear program with names for its rows, solved by HiGHS."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

MILP_S_MAX = 30.0
"""Longest time that whole numbers are searched; the best found by then counts."""
MILP_GAP = 1e-6


class UnsolvedError(Exception):
    """The solver found no answer."""


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum.

    Attributes:
        values: of the variables, in their order.
        worth: by row, what one more on its right side would add to the objective; empty with whole numbers.
    """

    objective: float
    values: tuple[float, ...]
    worth: Mapping[Hashable, float] = field(default_factory=dict)


class Program:
    """Maximise a sum over variables that are 0 or more, under rows `sum <= bound` and `sum == bound`."""

    def __init__(self) -> None:
        self._objective: list[float] = []
        self._is_whole: list[bool] = []
        self._rows: dict[Hashable, tuple[dict[int, float], float, bool]] = {}

    def variable(self, worth: float, *, is_whole: bool = False) -> int:
        """A new variable's number; `worth` is its factor in the objective."""
        self._objective.append(worth)
        self._is_whole.append(is_whole)
        return len(self._objective) - 1

    def row(
        self, name: Hashable, terms: Mapping[int, float], bound: float, *, is_equal: bool = False
    ) -> None:
        assert name not in self._rows, f"row {name} is there already"
        self._rows[name] = (dict(terms), bound, is_equal)

    def solve(self) -> Solution:
        """The optimum; with duals where no variable is whole.

        Raises:
            UnsolvedError: if there is none.
        """
        return self._whole() if any(self._is_whole) else self._linear()

    def _matrix(self, *, is_equal: bool) -> tuple[list[Hashable], csr_array, np.ndarray]:
        names = [name for name, row in self._rows.items() if row[2] is is_equal]
        rows, columns, factors = [], [], []
        for index, name in enumerate(names):
            for column, factor in self._rows[name][0].items():
                rows.append(index)
                columns.append(column)
                factors.append(factor)
        shape = (len(names), len(self._objective))
        matrix = csr_array((factors, (rows, columns)), shape=shape, dtype=float)
        return names, matrix, np.array([self._rows[name][1] for name in names], dtype=float)

    def _linear(self) -> Solution:
        upper_names, upper, upper_bounds = self._matrix(is_equal=False)
        equal_names, equal, equal_bounds = self._matrix(is_equal=True)
        result = linprog(
            -np.array(self._objective),
            A_ub=upper if upper_names else None,
            b_ub=upper_bounds if upper_names else None,
            A_eq=equal if equal_names else None,
            b_eq=equal_bounds if equal_names else None,
            method="highs",
        )
        if result.status != 0:
            raise UnsolvedError(str(result.message))
        worth: dict[Hashable, float] = {}
        if upper_names:
            worth |= dict(zip(upper_names, (-result.ineqlin.marginals).tolist(), strict=True))
        if equal_names:
            worth |= dict(zip(equal_names, (-result.eqlin.marginals).tolist(), strict=True))
        return Solution(-float(result.fun), tuple(result.x.tolist()), worth)

    def _whole(self) -> Solution:
        constraints = []
        for is_equal in (False, True):
            names, matrix, bounds = self._matrix(is_equal=is_equal)
            if names:
                low = bounds if is_equal else np.full(len(names), -np.inf)
                constraints.append(LinearConstraint(matrix, low, bounds))
        result = milp(
            -np.array(self._objective),
            integrality=np.array(self._is_whole, dtype=int),
            bounds=Bounds(0.0, np.inf),
            constraints=constraints,
            options={"time_limit": MILP_S_MAX, "mip_rel_gap": MILP_GAP},
        )
        if result.x is None:
            raise UnsolvedError(str(result.message))
        return Solution(-float(result.fun), tuple(result.x.tolist()))
