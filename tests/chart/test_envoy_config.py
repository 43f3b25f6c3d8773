"""The configuration of the chart's own Envoy, as Envoy itself reads it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVOY = str(Path(sys.executable).with_name("envoy"))


@pytest.mark.parametrize("name", ["envoy", "adopted-envoy"])
def test_envoy_takes_it(release_named: Any, name: str, tmp_path: Path) -> None:
    text = release_named(name).one("ConfigMap", "demo-pdcoord-envoy")["data"]["envoy.yaml"]
    path = tmp_path / "envoy.yaml"
    path.write_text(text)
    command = [ENVOY, "--mode", "validate", "-c", str(path), "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_envoy_takes_the_example_of_tls_to_the_picker(chart_folder: Path, tmp_path: Path) -> None:
    text = (chart_folder.parents[1] / "envoy" / "envoy.yaml").read_text()
    before, mark, after = text.partition("      # transport_socket:\n")
    example, end, rest = after.partition("      # Several replicas")
    assert mark
    assert end
    path = tmp_path / "envoy.yaml"
    path.write_text(before + (mark + example).replace("      # ", "      ") + end + rest)
    picker = yaml.safe_load(path.read_text())["static_resources"]["clusters"][0]
    (health,) = picker["health_checks"]
    assert picker["transport_socket_matches"][0]["match"] == health["transport_socket_match_criteria"]
    command = [ENVOY, "--mode", "validate", "-c", str(path), "--log-level", "error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_the_one_of_deploy_envoy_with_this_places_addresses(
    release_named: Any, chart_folder: Path
) -> None:
    ours = yaml.safe_load(release_named("envoy").one("ConfigMap", "demo-pdcoord-envoy")["data"]["envoy.yaml"])
    theirs = yaml.safe_load((chart_folder.parents[1] / "envoy" / "envoy.yaml").read_text())
    hosts = {}
    for config in (ours, theirs):
        for cluster in config["static_resources"]["clusters"]:
            places = cluster["load_assignment"].pop("endpoints")
            if config is ours:
                hosts[cluster["name"]] = [
                    tuple(each["endpoint"]["address"]["socket_address"].values())
                    for each in places[0]["lb_endpoints"]
                ]
    assert ours == theirs
    assert hosts == {
        "picker": [("demo-pdcoord-epp.llm.svc", 9002)],
        "model_servers": [("demo-pdcoord-engines.llm.svc", 8000)],
    }


def test_adopted_servers_are_reached_at_their_own_ports(release_named: Any) -> None:
    text = release_named("adopted-envoy").one("ConfigMap", "demo-pdcoord-envoy")["data"]["envoy.yaml"]
    (servers,) = [
        cluster
        for cluster in yaml.safe_load(text)["static_resources"]["clusters"]
        if cluster["name"] == "model_servers"
    ]
    addresses = [
        each["endpoint"]["address"]["socket_address"]
        for each in servers["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    assert addresses == [{"address": "demo-pdcoord-old.llm.svc", "port_value": 9000}]
