"""Models are found by each of their names, and keep what is counted of them over a change of policy."""

from dataclasses import replace

import pytest

from pdcoord.core.fleet import ModelName
from pdcoord.core.model import Fallback, Model
from pdcoord.core.models import Models

MODEL = Model(ModelName("m"), (), aliases=("alias",), adapters=("adapter",))
OTHER = Model(ModelName("n"), ())


def test_models_are_found_by_name_alias_and_adapter_and_listed_once() -> None:
    models = Models()
    models.replace((MODEL, OTHER))
    assert [models.find(name) for name in ("m", "alias", "adapter", "n", "x")] == [MODEL] * 3 + [OTHER, None]
    assert models.all() == (MODEL, OTHER)
    models.validate()


def test_a_request_under_way_keeps_to_its_models_own_name() -> None:
    models = Models()
    models.replace((MODEL,))
    models.replace((replace(OTHER, aliases=("m",)),))
    models.validate()
    assert models.find("m") is not None
    assert models.get("m") is None
    assert models.find("alias") is None


def test_a_new_policy_keeps_the_share_unless_its_window_changed() -> None:
    models = Models()
    models.replace((replace(MODEL, fallback=Fallback(window=40)),))
    for _ in range(40):
        models.budgets["m"].note(is_fallback=True)
    models.replace((OTHER, replace(MODEL, fallback=Fallback(window=40, colocated_share_max=0.1))))
    assert (models.budgets["m"].share, models.budgets["n"].share) == (1.0, 0.0)
    models.replace((replace(MODEL, fallback=Fallback(window=41)),))
    assert models.budgets["m"].share == 0.0
    assert list(models.budgets) == ["m"]
    models.validate()


def test_a_model_without_a_budget_is_our_own_bug() -> None:
    models = Models()
    models.replace((MODEL,))
    del models.budgets["m"]
    with pytest.raises(AssertionError, match="budget"):
        models.validate()
