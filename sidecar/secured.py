"""What encrypts the sidecar's connections and proves who asks: made of files, and followed as they change."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from pdcoord.wire.followed import Followed, follow
from pdcoord.wire.pem import PemError, read_validity
from pdcoord.wire.plankeys import KeysFileError, PlanKeysFile
from pdcoord.wire.tls import ClientTls, ServerTls
from pdcoord.wire.validity import Validity
from sidecar.errors import SettingsError
from sidecar.observe import Metrics
from sidecar.settings import Settings

_log = structlog.get_logger()
_LISTENER_FLAGS = {"cert": "--tls-cert-file", "cert_key": "--tls-key-file", "ca": "--tls-client-ca-file"}


class Secured:
    """What the settings ask for.

    Attributes:
        listener: for requests; None for a listener in clear.
        metrics: the same certificate, without asking for the client's: probes and scrapers have none.
        upstream: for prefill pods and other sidecars; None for connections in clear.
        plan_keys: None where plans need no signature.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads the files.

        Raises:
            SettingsError: for the first that cannot be used.
        """
        self.listener = _server_tls(settings, "listener")
        self.metrics = _server_tls(settings, "metrics")
        self.upstream = _client_tls(settings)
        self.plan_keys = _plan_keys(settings)
        self._validities: dict[str, Callable[[], Validity | None]] = {}
        for tls in (self.listener, self.upstream):
            if tls is not None and tls.validity is not None:
                self._validities[tls.name] = partial(_in_force, tls)
        control = settings.control_cert_file
        if settings.control and control is not None:
            self._validities["control"] = lambda: _validity_on_disk(control)

    def show(self, metrics: Metrics) -> None:
        """Have the metrics tell how long each certificate is good."""
        for use, read in self._validities.items():
            for name, date in (("begins", "begins_s"), ("expires", "ends_s")):
                value = partial(_date, read, date)
                metrics.read(f"certificate_{name}_timestamp_seconds", value, use)

    async def run(self, metrics: Metrics) -> None:
        """Follow the files until cancelled."""

        def tell(name: str, why: str | None) -> None:
            metrics.count("secret_reloads", name, "accepted" if why is None else "refused")
            if why is None:
                _log.info("secret.accepted", files=name)
            else:
                _log.error("secret.refused", files=name, why=why)

        for tls in (self.listener, self.upstream):
            if tls is not None and tls.doubt is not None:
                _log.warning("secret.doubtful", files=tls.name, why=tls.doubt)
        parts: tuple[Followed | None, ...] = (self.listener, self.metrics, self.upstream, self.plan_keys)
        await follow((part for part in parts if part is not None), tell)


def _in_force(tls: ServerTls | ClientTls) -> Validity | None:
    return tls.validity


def _date(read: Callable[[], Validity | None], name: str) -> float:
    validity = read()
    return math.nan if validity is None else float(getattr(validity, name))


def _validity_on_disk(cert: Path) -> Validity | None:
    """Of what the next control stream shows: each reads its files anew."""
    try:
        return read_validity(cert)
    except PemError:
        return None


def _server_tls(settings: Settings, name: str) -> ServerTls | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    client_ca = settings.tls_client_ca_file if name == "listener" else None
    try:
        return ServerTls(name, settings.tls_cert_file, settings.tls_key_file, client_ca)
    except PemError as error:
        raise SettingsError(_LISTENER_FLAGS[error.part], str(error.path), error.remedy) from error


def _client_tls(settings: Settings) -> ClientTls | None:
    if settings.upstream_ca_file is None:
        return None
    try:
        return ClientTls(
            "upstream",
            settings.upstream_ca_file,
            cert=settings.upstream_cert_file,
            key=settings.upstream_cert_key_file,
            peer_name=settings.upstream_tls_name or None,
        )
    except PemError as error:
        flag = f"--upstream-{error.part.replace('_', '-')}-file"
        raise SettingsError(flag, str(error.path), error.remedy) from error


def _plan_keys(settings: Settings) -> PlanKeysFile | None:
    path = settings.plan_keys_file
    try:
        return None if path is None else PlanKeysFile(path)
    except KeysFileError as error:
        raise SettingsError("--plan-keys-file", str(path), error.remedy) from error
