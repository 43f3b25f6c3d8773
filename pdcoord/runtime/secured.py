"""What encrypts a coordinator process's connections and signs its plans: settings, files, reloads."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from structlog.typing import FilteringBoundLogger

from pdcoord.runtime.metricspec import MetricSpec, MetricType
from pdcoord.runtime.process_metrics import certificate_samples
from pdcoord.wire.followed import Followed, follow
from pdcoord.wire.pem import PemError
from pdcoord.wire.plankeys import KeysFileError, PlanKeysFile
from pdcoord.wire.tls import ClientTls, ServerTls
from pdcoord.wire.validity import Validity

ENV_PREFIX = "PDCOORD_"
HOST_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
FILES = ("listener", "admin", "upstream", "plan-keys")
RELOADS = MetricSpec(
    "pdcoord_gateway_secret_reloads_total",
    MetricType.COUNTER,
    ("files", "outcome"),
    "Changes of certificates (of the listener, of the admin listener, for connections upstream) and of plan "
    "keys, accepted or refused.",
    "refused: the last good ones are in force until they expire; the log line secret.refused says why. "
    "Nothing accepted where a certificate should have been renewed: the files are not written.",
)


class SecuredSettings(BaseSettings):
    """Certificates and keys of a coordinator process; each file is looked at again when it changes.

    Attributes:
        tls_cert_file, tls_key_file: with them the gateway's listener, or the picker's pages, speak TLS only.
        tls_client_ca_file: with it clients there need a certificate that it has signed.
        admin_tls_cert_file, admin_tls_key_file, admin_tls_client_ca_file: the same for the admin listener.
        upstream_ca_file: with it every connection to sidecars and engines is TLS, verified with it.
        upstream_cert_file, upstream_cert_key_file: shown to those that ask for a certificate.
        upstream_tls_name: the name that all their certificates bear, in place of the dialled host.
        plan_keys_file: with it plans are signed; see docs/tls.md.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    admin_tls_cert_file: Path | None = None
    admin_tls_key_file: Path | None = None
    admin_tls_client_ca_file: Path | None = None
    upstream_ca_file: Path | None = None
    upstream_cert_file: Path | None = None
    upstream_cert_key_file: Path | None = None
    upstream_tls_name: Annotated[str, Field(pattern=HOST_NAME, max_length=253)] | None = None
    plan_keys_file: Path | None = None

    @model_validator(mode="after")
    def _certificates_agree(self) -> Self:
        """A certificate has its key, and an authority or a name has something to be used on."""
        pairs = (
            ("tls_cert_file", "tls_key_file"),
            ("admin_tls_cert_file", "admin_tls_key_file"),
            ("upstream_cert_file", "upstream_cert_key_file"),
        )
        needs = (
            ("tls_client_ca_file", "tls_cert_file"),
            ("admin_tls_client_ca_file", "admin_tls_cert_file"),
            ("upstream_cert_file", "upstream_ca_file"),
            ("upstream_tls_name", "upstream_ca_file"),
        )
        for one, other in (*pairs, *((other, one) for one, other in pairs), *needs):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(
                    f"{written(one)} is {str(getattr(self, one))!r}, which needs {written(other)}: "
                    "set that too"
                )
        return self


class SecretError(ValueError):
    """A file of a certificate or a key cannot be used; the message names the setting and the remedy."""


class Secured:
    """What the settings ask for, and its reloads.

    Attributes:
        listener, admin: None for a listener in clear.
        upstream: None where nothing upstream is TLS.
        plan_keys: None where plans are not signed.
    """

    def __init__(self, settings: SecuredSettings, log: FilteringBoundLogger) -> None:
        """Reads the files.

        Raises:
            SecretError: for the first that cannot be used.
        """
        self._log = log
        self._reloads: Counter[tuple[str, str]] = Counter()
        self.listener = _server_tls(settings, "listener", "tls")
        self.admin = _server_tls(settings, "admin", "admin_tls")
        self.upstream = _client_tls(settings)
        self.plan_keys = _plan_keys(settings.plan_keys_file)
        self._validities: dict[str, Callable[[], Validity | None]] = {}
        for tls in (self.listener, self.admin, self.upstream):
            if tls is not None:
                self.watch(tls.name, partial(_in_force, tls))

    def watch(self, use: str, validity: Callable[[], Validity | None]) -> None:
        """Show the dates of a certificate that is followed elsewhere; None while there is none."""
        self._validities[use] = validity

    async def run(self) -> None:
        """Follow the files until cancelled."""
        for tls in (self.listener, self.admin, self.upstream):
            if tls is not None and tls.doubt is not None:
                self._log.warning("secret.doubtful", files=tls.name, why=tls.doubt)
        parts: tuple[Followed | None, ...] = (self.listener, self.admin, self.upstream, self.plan_keys)
        await follow((part for part in parts if part is not None), self._tell)

    def samples(self) -> Iterable[tuple[MetricSpec, Iterable[tuple[tuple[str, ...], float]]]]:
        """For /metrics."""
        kinds = ((files, outcome) for files in FILES for outcome in ("accepted", "refused"))
        yield RELOADS, [(kind, float(self._reloads[kind])) for kind in kinds]
        yield from certificate_samples(self._validities)

    def _tell(self, name: str, why: str | None) -> None:
        self._reloads[name, "accepted" if why is None else "refused"] += 1
        if why is None:
            self._log.info("secret.accepted", files=name)
        else:
            self._log.error("secret.refused", files=name, why=why)


def written(field: str) -> str:
    """A setting as an operator gives it."""
    return ENV_PREFIX + field.upper()


def _in_force(tls: ServerTls | ClientTls) -> Validity | None:
    return tls.validity


def _server_tls(settings: SecuredSettings, name: str, prefix: str) -> ServerTls | None:
    cert: Path | None = getattr(settings, f"{prefix}_cert_file")
    key: Path | None = getattr(settings, f"{prefix}_key_file")
    if cert is None or key is None:
        return None
    try:
        return ServerTls(name, cert, key, getattr(settings, f"{prefix}_client_ca_file"))
    except PemError as error:
        field = {"cert": "cert_file", "cert_key": "key_file", "ca": "client_ca_file"}[error.part]
        raise _bad_file(f"{prefix}_{field}", error.path, error.remedy) from error


def _client_tls(settings: SecuredSettings) -> ClientTls | None:
    if settings.upstream_ca_file is None:
        return None
    try:
        return ClientTls(
            "upstream",
            settings.upstream_ca_file,
            cert=settings.upstream_cert_file,
            key=settings.upstream_cert_key_file,
            peer_name=settings.upstream_tls_name,
        )
    except PemError as error:
        raise _bad_file(f"upstream_{error.part}_file", error.path, error.remedy) from error


def _plan_keys(path: Path | None) -> PlanKeysFile | None:
    try:
        return None if path is None else PlanKeysFile(path)
    except KeysFileError as error:
        assert path is not None
        raise _bad_file("plan_keys_file", path, error.remedy) from error


def _bad_file(field: str, path: Path, remedy: str) -> SecretError:
    return SecretError(f"{written(field)} is {str(path)!r}: {remedy}")
