"""What a coordinator process looks at before it starts: addresses, files and settings that were not meant."""

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from pdcoord.feeds.declared import DeclaredFeed
from pdcoord.runtime.settings import ENV_PREFIX, CoordinatorSettings, GatewaySettings
from pdcoord.wire.misspelt import misspelt
from pdcoord.wire.pem import PemError, check_pem
from pdcoord.wire.places import Place, PlaceError, check_places
from transfer.errors import SettingError
from transfer.settings import read_key_file

_PORTS = {
    "port": "host",
    "grpc_port": "host",
    "grpc_health_port": "host",
    "metrics_port": "host",
    "admin_port": "admin_host",
    "control_port": "control_host",
}
"""Settings that name a port, each with the one of its host."""
PICKER_ONLY = (
    "grpc_port",
    "grpc_health_port",
    "metrics_port",
    "secure_serving",
    "cert_path",
    "grpc_client_ca_file",
    "fallbacks_max",
    "conformance",
    "pass_paths",
    "streams_max",
)
"""Settings of the endpoint picker alone: its module needs an extra, and its variables may be in a gateway's
environment too."""
_ELSEWHERE = tuple(ENV_PREFIX + name for name in ("SIDECAR_", "KV_", "EMULATED_", "E2E_"))
_OF_COMMANDS = frozenset({f"{ENV_PREFIX}ADMIN_URL", f"{ENV_PREFIX}ADMIN_CA_FILE"})


class StartError(ValueError):
    """A process cannot start as it is told to; the message names the setting and the remedy."""


def check_start(settings: CoordinatorSettings) -> None:
    """Try what the settings name.

    Raises:
        StartError: for the first that cannot be used.
    """
    if settings.control_port is not None:
        _check_control(settings)
    is_admin_open = settings.admin_key_file is None and settings.admin_tls_client_ca_file is None
    if is_admin_open and not _is_loopback(settings.admin_host):
        raise StartError(
            f"PDCOORD_ADMIN_HOST (--admin-host) is {settings.admin_host!r}, where anybody may ask the admin "
            "listener: set PDCOORD_ADMIN_KEY_FILE, or PDCOORD_ADMIN_TLS_CLIENT_CA_FILE with a certificate, "
            "or leave it on 127.0.0.1"
        )
    try:
        check_places(_places(settings))
    except PlaceError as error:
        raise StartError(str(error)) from error


def doubts(
    settings: CoordinatorSettings, files: DeclaredFeed, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """What may not have been meant, in one line each; nothing of it stops the process."""
    fields = {*type(settings).model_fields, *GatewaySettings.model_fields, *PICKER_ONLY}
    known = {ENV_PREFIX + field.upper() for field in fields} | _OF_COMMANDS
    found = misspelt(environment, ENV_PREFIX, known, _ELSEWHERE)
    if settings.endpoints is None and not settings.kubernetes_pods and files.policy is not None:
        pools = [each.pool.name for each in files.policy.bindings if each.match_labels is not None]
        if pools:
            found.append(
                f"pools {', '.join(pools)} have a selector, and nothing tells of endpoints: set "
                "PDCOORD_ENDPOINTS (--endpoints) or PDCOORD_KUBERNETES_PODS=true"
            )
    is_open = settings.control_key_file is None and settings.control_ca_file is None
    if settings.control_port is not None and is_open and not _is_loopback(settings.control_host):
        found.append(
            f"PDCOORD_CONTROL_HOST is {settings.control_host!r}, where anybody may report requests: set "
            "PDCOORD_CONTROL_KEY_FILE, or PDCOORD_CONTROL_CA_FILE with a certificate"
        )
    host = settings.host if isinstance(settings, GatewaySettings) else None
    if host is not None and settings.keys_file is None and not _is_loopback(host):
        found.append(f"PDCOORD_HOST is {host!r}, where anybody may use every model: set PDCOORD_KEYS_FILE")
    return tuple(found)


def _check_control(settings: CoordinatorSettings) -> None:
    try:
        if settings.control_key_file is not None:
            read_key_file(str(settings.control_key_file))
        check_pem(settings.control_cert_file, settings.control_cert_key_file, settings.control_ca_file)
    except SettingError as error:
        raise _bad_file("KEY", settings.control_key_file, error.remedy) from error
    except PemError as error:
        raise _bad_file(error.part.upper(), error.path, error.remedy) from error


def _bad_file(which: str, path: Path | None, remedy: str) -> StartError:
    return StartError(f"{ENV_PREFIX}CONTROL_{which}_FILE is {str(path)!r}: {remedy}")


def _places(settings: CoordinatorSettings) -> list[Place]:
    told = settings.model_dump(include={*_PORTS, *_PORTS.values()})
    return [
        Place(told[host], told[port], _written(host), _written(port))
        for port, host in _PORTS.items()
        if told.get(port) is not None
    ]


def _written(field: str) -> str:
    """A setting as it is given; the control stream's have no flags."""
    variable = ENV_PREFIX + field.upper()
    return variable if field.startswith("control_") else f"{variable} (--{field.replace('_', '-')})"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
