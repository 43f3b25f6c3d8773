"""The models that the policy serves: found by each of their names, with what fell back of each lately."""

from collections.abc import Iterable

from pdcoord.core.ladder import FallbackBudget, replaced_budgets
from pdcoord.core.model import Model


class Models:
    """None before the first policy.

    Attributes:
        by_name: each by its own name, in the policy's order.
        budgets: of local prefills, by the same.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Model] = {}
        self.budgets: dict[str, FallbackBudget] = {}
        self._by_any_name: dict[str, Model] = {}

    def replace(self, models: Iterable[Model]) -> None:
        """These are all of them from now on, in this order."""
        self.by_name = {model.name: model for model in models}
        self._by_any_name = {name: model for model in self.all() for name in model.names}
        self.budgets = replaced_budgets(self.budgets, self.all())

    def all(self) -> tuple[Model, ...]:
        """Every model once, in the policy's order."""
        return tuple(self.by_name.values())

    def find(self, name: str) -> Model | None:
        """The model of this name, alias or adapter."""
        return self._by_any_name.get(name)

    def get(self, name: str) -> Model | None:
        """The model of its own name, as of a request under way: an alias may lead to another by now."""
        return self.by_name.get(name)

    def validate(self) -> None:
        """Assert that every model has a budget, and that names lead to models that are served."""
        assert self.budgets.keys() == self.by_name.keys(), "a model without a budget"
        named = self._by_any_name.values()
        assert all(self.by_name.get(model.name) is model for model in named), "a name of a former model"
