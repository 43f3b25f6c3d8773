from typing import Any

import pytest

from pdcoord.policy.errors import PolicyError
from pdcoord.sim.study.stage import Reach, believed_stage, hand_over, load_stage


def test_endpoints_find_their_engines_by_label_address_and_name(files: Any) -> None:
    stage = load_stage(files.policy, files.fleet)
    found = [
        (place.endpoint.id, settings.name)
        for place, settings in zip(stage.scene.places, stage.scene.settings, strict=True)
    ]
    assert found == [
        ("fast/gaudi-0", "gaudi-0"),
        ("fast/gaudi-1", "gaudi-1"),
        ("wide/by-address", "mi-0"),
        ("wide/mi-1", "mi-1"),
    ]
    assert [place.index for place in stage.scene.places] == [0, 1, 2, 3]
    assert stage.unused == ("mi-2",)
    assert stage.model.slo.ttft_s == 2.0
    # What is believed and what is are two things.
    assert stage.scene.settings[0].speed != stage.scene.places[0].endpoint.pool.speed


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("vendor: gaudi}}", "vendor: none}}", "fast"),
        ("18300", "18399", "by-address"),
        ("name: mi-1", "name: mi-0", "mi-0"),
        ("aliases: [tiny]", "aliases: [other]", "tiny"),
    ],
)
def test_what_does_not_match_is_named(files: Any, old: str, new: str, named: str) -> None:
    text = files.policy.read_text()
    assert old in text
    files.policy.write_text(text.replace(old, new))
    with pytest.raises(PolicyError, match=named):
        load_stage(files.policy, files.fleet)


def test_a_fleet_may_serve_a_model_by_any_of_its_names(files: Any) -> None:
    text = files.policy.read_text()
    files.policy.write_text(text.replace("aliases: [tiny]", "adapters: [tiny]"))
    assert load_stage(files.policy, files.fleet).model.adapters == ("tiny",)
    files.policy.write_text(text.replace("aliases: [tiny]", "aliases: [other], adapters: [sql]"))
    with pytest.raises(PolicyError, match=r"it has .*other, sql"):
        load_stage(files.policy, files.fleet)


def test_reaches(files: Any) -> None:
    places = load_stage(files.policy, files.fleet).scene.places
    pairs = {
        reach: {(p, d) for p, row in enumerate(hand_over(places, reach)) for d, can in enumerate(row) if can}
        for reach in Reach
    }
    assert pairs[Reach.ONE_VENDOR] == {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert len(pairs[Reach.ALL]) == 12
    assert pairs[Reach.VERDICTS] == pairs[Reach.ALL], "our connector exchanges both layouts"


def test_a_fleet_may_be_what_the_policy_believes(files: Any) -> None:
    stage = load_stage(files.policy, files.fleet)
    believed = believed_stage(stage.model, [place.endpoint for place in stage.scene.places])
    for place, settings in zip(believed.scene.places, believed.scene.settings, strict=True):
        assert settings.speed == place.endpoint.pool.speed
        assert settings.layout == place.endpoint.pool.side.layout
