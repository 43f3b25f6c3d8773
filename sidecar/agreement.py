"""What the flags of the sidecar must agree on among themselves."""

from collections.abc import Mapping
from typing import Any

from sidecar.errors import SettingsError


def check_together(values: Mapping[str, Any]) -> None:
    """Check what no flag alone can be wrong about.

    Raises:
        SettingsError: for the first that does not fit the others.
    """
    if values["allow_any"] and (values["allow"] or values["allow_file"]):
        raise SettingsError(
            "--allow-any", "yes", "it makes --allow and --allow-file void; leave one of them out"
        )
    _check_control(values)
    _check_secured(values)
    if values["allow_any"] and values["kv_agent"]:
        raise SettingsError(
            "--kv-agent", values["kv_agent"], "with --allow-any no target is known to probe; give --allow"
        )
    if values["bodies_bytes_max"] < values["body_bytes_max"]:
        remedy = "one body may be longer than that; give no less than --body-bytes-max"
        raise SettingsError("--bodies-bytes-max", values["bodies_bytes_max"], remedy)
    port = values["port"]
    if port and port == values["metrics_port"] and values["host"] == values["metrics_host"]:
        raise SettingsError("--metrics-port", port, "it is --port too; give another")


def _check_control(values: Mapping[str, Any]) -> None:
    if values["allow_from_control"] and not (values["control_key_file"] or values["control_ca_file"]):
        remedy = "give --control-key-file or --control-ca-file: a coordinator has to prove itself for that"
        raise SettingsError("--allow-from-control", "yes", remedy)
    if values["allow_from_control"] and not values["control"]:
        raise SettingsError("--allow-from-control", "yes", "give --control too: nobody else names targets")
    if (values["control_cert_file"] is None) != (values["control_cert_key_file"] is None):
        name = "--control-cert-file" if values["control_cert_file"] else "--control-cert-key-file"
        remedy = "certificate and key go together; give both or neither"
        raise SettingsError(name, str(values["control_cert_file"] or values["control_cert_key_file"]), remedy)
    if values["control_cert_file"] and not values["control_ca_file"]:
        remedy = "give --control-ca-file too: a certificate is of use on an encrypted stream only"
        raise SettingsError("--control-cert-file", str(values["control_cert_file"]), remedy)


def _check_secured(values: Mapping[str, Any]) -> None:
    pairs = (("tls_cert_file", "tls_key_file"), ("upstream_cert_file", "upstream_cert_key_file"))
    needs = (
        ("tls_client_ca_file", "tls_cert_file"),
        ("upstream_cert_file", "upstream_ca_file"),
        ("upstream_tls_name", "upstream_ca_file"),
    )
    for one, other in (*pairs, *((other, one) for one, other in pairs), *needs):
        if values[one] and not values[other]:
            one_flag, other_flag = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise SettingsError(one_flag, str(values[one]), f"give {other_flag} too: it is of no use alone")
