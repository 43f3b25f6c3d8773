from typing import Any

import pytest

from pdcoord.sim.routers.registry import RIVALS
from pdcoord.sim.study.contenders import UnknownContenderError, contender
from pdcoord.sim.study.stage import Reach, load_stage


def test_a_label_names_a_router_and_its_reach() -> None:
    assert contender("ours") == contender("pdcoord")
    assert contender("pdcoord").reach is Reach.VERDICTS
    assert contender("dynamo").reach is Reach.ONE_VENDOR
    assert contender("dynamo+cross").reach is Reach.ALL
    assert contender("dynamo+cross").label == "dynamo+cross"


@pytest.mark.parametrize("label", ["", "dynamo+", "dynamo+cross+cross", "pdcoord+cross", "nobody"])
def test_others_are_refused_with_those_there_are(label: str) -> None:
    with pytest.raises(UnknownContenderError, match="round-robin"):
        contender(label)


def test_everybody_can_be_made(files: Any) -> None:
    stage = load_stage(files.policy, files.fleet)
    for label in ("pdcoord", *RIVALS):
        each = contender(label)
        router = each.router(stage, each.surroundings(stage, key_tokens=64, seed=0))
        assert router.name == label
