"""A small builder of mixed-integer linear programs for HiGHS (through `scipy.optimize.milp`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_matrix

Term = tuple[int, float]
OPTIMAL, TIME_LIMIT, INFEASIBLE = 0, 1, 2  # statuses of scipy.optimize.milp
LARGEST_COST = 1000.0
SECOND_LOOK = 100  # nodes of the search tree


@dataclass(frozen=True)
class Solution:
    """Values of all variables. `bound` is a proven lower bound of the objective; `gap` the relative distance to it."""

    values: np.ndarray
    objective: float
    bound: float
    gap: float
    status: str


class OutOfTime(Exception):
    """The time limit came before any solution: nothing is known about whether there is one."""


class LinearProgram:
    """Minimize a sum of costs over variables between 0 and `upper`, under linear constraints."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.upper: list[float] = []
        self.integer: list[int] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._entries: list[float] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variable(self, cost: float = 0.0, *, binary: bool = False, integer: bool = False, upper: float = np.inf) -> int:
        """A new variable; a binary one is 0 or 1, an integer one a whole number up to `upper`."""
        self.costs.append(cost)
        self.upper.append(1.0 if binary else upper)
        self.integer.append(int(binary or integer))
        return len(self.costs) - 1

    def copy(self) -> LinearProgram:
        """The same program, to be extended in another way."""
        other = LinearProgram()
        for name, content in vars(self).items():
            setattr(other, name, list(content))
        return other

    def constrain(self, terms: Iterable[Term], low: float = -np.inf, high: float = np.inf) -> None:
        """low <= sum of coefficient * variable <= high; a variable may occur more than once."""
        row = len(self._low)
        for column, entry in terms:
            self._rows.append(row)
            self._columns.append(column)
            self._entries.append(entry)
        self._low.append(low)
        self._high.append(high)

    def solve(self, *, relaxed: bool, time_limit: float, gap: float = 1e-4) -> Solution | None:
        """The optimum (of the LP relaxation when `relaxed`), or None when nothing fits the constraints.

        Costs are scaled so that the largest is `LARGEST_COST`: the solver's absolute tolerances (1e-6 of the objective, 1e-7 of a
        reduced cost) would otherwise hide whole microseconds.
        """
        costs = np.array(self.costs)
        scale = LARGEST_COST / max(float(np.max(np.abs(costs), initial=0.0)), 1e-30)
        matrix = csr_matrix((self._entries, (self._rows, self._columns)), shape=(len(self._low), len(self.costs)))

        def run(**options: float) -> OptimizeResult:
            return milp(
                costs * scale,
                integrality=np.zeros(len(self.costs)) if relaxed else np.array(self.integer),
                bounds=Bounds(0.0, np.array(self.upper)),
                constraints=LinearConstraint(matrix, np.array(self._low), np.array(self._high)),
                options={"time_limit": time_limit, "mip_rel_gap": gap, **options},
            )

        result = run()
        if result.status == INFEASIBLE and not relaxed:  # presolve may err where only a ten-thousandth of the memory is left
            second = run(presolve=False, node_limit=SECOND_LOOK)
            result = second if second.x is not None else result
        if result.x is None and result.status == TIME_LIMIT:
            raise OutOfTime
        if result.x is None:
            return None
        objective = float(result.fun) / scale
        dual = getattr(result, "mip_dual_bound", None)
        bound = objective if dual is None else float(dual) / scale
        relative = abs(objective - bound) / max(abs(objective), 1e-12)
        return Solution(result.x, objective, bound, relative, "optimal" if result.status == OPTIMAL else "time limit")

    def integral(self, solution: Solution) -> bool:
        """Whether every whole number of a (relaxed) solution is one."""
        whole = solution.values[np.array(self.integer, dtype=bool)]
        return bool(np.all(np.abs(whole - np.round(whole)) < 1e-6))
