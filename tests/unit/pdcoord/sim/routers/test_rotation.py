from dataclasses import replace
from typing import Any

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.sim.routers.rotation import Rotation

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_roles_decide_who_does_what(surroundings_of: Any) -> None:
    rotation = Rotation.of(surroundings_of([P, D, B]), [True] * 3)
    assert rotation.alone == (1, 2)
    assert rotation.prefills == (0, 2)
    assert rotation.decodes == (1, 2)
    assert rotation.prefills_of == ((), (0, 2), (0,))
    assert rotation.decodes_of == ((1, 2), (), (1,))


def test_vendors_that_cannot_hand_over_are_no_pairs(surroundings_of: Any) -> None:
    rotation = Rotation.of(surroundings_of([P, D, P, D], vendors=["a", "a", "b", "c"]), [True] * 4)
    assert rotation.prefills == (0,)
    assert rotation.decodes == (1, 3)
    assert rotation.prefills_of[3] == ()


def test_a_way_there_is_no_way_back(surroundings_of: Any) -> None:
    surroundings = replace(surroundings_of([B, B]), can_hand_over=[[False, True], [False, False]])
    rotation = Rotation.of(surroundings, [True] * 2)
    assert rotation.prefills == (0,)
    assert rotation.prefills_of == ((), (0,))
    assert rotation.decodes_of == ((1,), ())


def test_an_sglang_decode_place_needs_a_partner(surroundings_of: Any) -> None:
    surroundings = surroundings_of([P, D, D], vendors=["a", "a", "b"], engine=EngineKind.SGLANG)
    rotation = Rotation.of(surroundings, [True] * 3)
    assert rotation.alone == ()
    assert rotation.decodes == (1,)
    assert not rotation.is_empty
    assert Rotation.of(surroundings, [True] * 3, {0}).is_empty


def test_the_dead_and_the_excluded_are_out(surroundings_of: Any) -> None:
    rotation = Rotation.of(surroundings_of([P, D, B]), [True, False, True], {2})
    assert rotation.alone == rotation.prefills == rotation.decodes == ()
    assert rotation.is_empty
