"""A variable that no setting is named after is told of, with the one that may be meant."""

import pytest

from pdcoord.wire.misspelt import misspelt

KNOWN = frozenset({"PDCOORD_PORT", "PDCOORD_HOST", "PDCOORD_DRAIN_S"})


def look(**environment: str) -> list[str]:
    return misspelt(environment, "PDCOORD_", KNOWN, ["PDCOORD_SIDECAR_"])


def test_a_close_name_is_offered_and_no_value_is_shown() -> None:
    assert look(PDCOORD_PROT="8080") == ["PDCOORD_PROT is set, and is no setting; PDCOORD_PORT is meant?"]
    assert look(PDCOORD_QUITE_ELSE="secret") == [
        "PDCOORD_QUITE_ELSE is set, and is no setting; see the reference of settings"
    ]


@pytest.mark.parametrize(
    "environment",
    [
        {"PDCOORD_PORT": "1", "pdcoord_host": "x"},
        {"PDCOORD_GATEWAY_PORT": "tcp://10.0.0.1:8080"},
        {"PDCOORD_GATEWAY_SERVICE_HOST": "10.0.0.1", "PDCOORD_GATEWAY_SERVICE_PORT_HTTP": "8080"},
        {"PDCOORD_GATEWAY_PORT_8080_TCP_ADDR": "10.0.0.1", "PDCOORD_GATEWAY_PORT_8080_TCP_PROTO": "tcp"},
        {"PDCOORD_SIDECAR_PROT": "80"},
        {"HOME": "/"},
    ],
)
def test_others_variables_are_left_alone(environment: dict[str, str]) -> None:
    assert look(**environment) == []
