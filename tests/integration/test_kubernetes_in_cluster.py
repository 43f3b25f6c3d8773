"""From a pod to its API server: TLS with the cluster's own authority, and a token that is replaced."""

import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kubernetes.aio.config import incluster_config

from pdcoord.feeds import kubeapi
from pdcoord.feeds.kubeapi import Collection, KubeApi, KubeError, own_namespace
from pdcoord.feeds.kubewatch import WatchTrouble

PODS = Collection("", "v1", "pods", "ns")


def write_certificate(folder: Path) -> None:
    """A certificate for 127.0.0.1 that vouches for itself: ca.crt and key.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "api")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


@asynccontextmanager
async def serving(folder: Path, tokens: list[str]) -> AsyncIterator[int]:
    """An API server that has no pods, and takes note of tokens."""

    async def answer(request: web.Request) -> web.Response:
        tokens.append(request.headers.get("Authorization", ""))
        return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})

    application = web.Application()
    application.router.add_get("/api/v1/namespaces/ns/pods", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's service account."""
    write_certificate(tmp_path)
    (tmp_path / "token").write_text("first")
    (tmp_path / "namespace").write_text("ns\n")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(kubeapi, "NAMESPACE_FILE", tmp_path / "namespace")
    return tmp_path


async def test_a_pod_reaches_its_api_server(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[str] = []
    async with serving(account, tokens) as port:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        assert own_namespace() == "ns"
        async with KubeApi() as api:
            assert (await api.list_page(PODS, size=5))["items"] == []
        (account / "token").write_text("second")
        async with KubeApi() as api:
            await api.list_page(PODS, size=5)
    assert tokens == ["bearer first", "bearer second"]


async def test_a_server_that_another_authority_vouches_for_is_not_spoken_to(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str] = []
    async with serving(account, tokens) as port:
        write_certificate(account)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
        async with KubeApi() as api:
            with pytest.raises(KubeError) as caught:
                await api.list_page(PODS, size=5)
    assert caught.value.trouble is WatchTrouble.UNREACHABLE
    assert tokens == []


async def test_an_account_that_is_gone_is_named(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    (account / "token").unlink()
    async with KubeApi() as api:
        with pytest.raises(KubeError, match=r"no way to an API server: .*token file does not") as caught:
            await api.list_page(PODS, size=5)
    assert caught.value.trouble is WatchTrouble.DENIED
    (account / "namespace").unlink()
    assert own_namespace() is None
