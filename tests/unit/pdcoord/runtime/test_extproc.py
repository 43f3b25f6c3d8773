"""The endpoint picker's settings and the pages of its metrics listener."""

from pathlib import Path

import pytest

from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.runtime.extproc import ExtprocSettings, make_pages
from pdcoord.runtime.settings import CoordinatorSettings, SettingsError, load
from pdcoord.wire.asgi import Message

ROOT = Path(__file__).resolve().parents[4]


def test_every_setting_of_the_picker_is_documented() -> None:
    page = (ROOT / "docs" / "extproc.md").read_text()
    own = set(ExtprocSettings.model_fields) - set(CoordinatorSettings.model_fields) | {"drain_notice_s"}
    assert [name for name in sorted(own) if f"`PDCOORD_{name.upper()}`" not in page] == []


def test_bounds_are_those_of_the_settings() -> None:
    settings = ExtprocSettings(
        policy=Path("p"), body_bytes_max=2_000, bodies_bytes_max=9_000, streams_max=3, secure_serving=False
    )
    limits = settings.limits()
    assert (limits.body_bytes_max, limits.bodies_bytes_max, limits.live_max) == (2_000, 9_000, 3)
    assert settings.certificates() is None


def test_clients_certificates_need_tls_and_an_authority_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "roots"
    path.write_text("nothing of use")
    for is_secure, said in (
        (False, "needs TLS on the port for Envoy"),
        (True, "holds no certificate in PEM"),
    ):
        with pytest.raises(SettingsError) as caught:
            load(
                ExtprocSettings,
                {"policy": "p", "grpc_client_ca_file": str(path), "secure_serving": is_secure},
            ).certificates()
        assert f"PDCOORD_GRPC_CLIENT_CA_FILE is '{path}'" in str(caught.value)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "path", "is_ready", "status"),
    [
        ("GET", "/metrics", True, 200),
        ("GET", "/livez", False, 200),
        ("GET", "/readyz", True, 200),
        ("GET", "/readyz", False, 503),
        ("GET", "/", True, 404),
        ("POST", "/metrics", True, 405),
    ],
)
async def test_pages(method: str, path: str, is_ready: bool, status: int) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("no page reads a body")

    refusal = None if is_ready else Refusal(RefuseReason.DRAINING, "Soon over.")
    app = make_pages(lambda: b"metrics", lambda: refusal)
    await app({"type": "http", "method": method, "path": path}, receive, send)
    assert sent[0]["status"] == status
    assert (sent[1]["body"] == b"metrics") is (path == "/metrics" and method == "GET")
