"""What is written about the chart: schema, reference, defaults and the examples in docs."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "chart.md"
CATALOG = ROOT / "docs" / "metrics-gateway.md"


def test_schema_and_reference_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "deploy/charts/generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path


def known(schema: Mapping[str, Any], path: str) -> bool:
    node: Any = schema
    for step in path.split("."):
        if step in node.get("properties", {}):
            node = node["properties"][step]
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
        else:
            return "properties" not in node
    return True


def test_every_default_is_a_value_that_the_schema_knows_and_every_value_has_a_default(
    chart_folder: Path,
) -> None:
    defaults = yaml.safe_load((chart_folder / "values.yaml").read_text())
    schema = json.loads((chart_folder / "values.schema.json").read_text())
    assert [path for path in leaves(defaults) if not known(schema, path)] == []
    assert set(defaults) == set(schema["properties"])


def test_every_value_that_templates_read_is_one_of_the_schema(chart_folder: Path) -> None:
    schema = json.loads((chart_folder / "values.schema.json").read_text())
    read = set()
    for path in (chart_folder / "templates").iterdir():
        read |= set(re.findall(r"\.Values\.([A-Za-z.]*[A-Za-z])", path.read_text()))
    assert len(read) > 40
    assert sorted(path for path in read if not known(schema, path)) == []


def test_the_examples_of_the_document_render(render: Any) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    for text in examples:
        values = yaml.safe_load(text)
        assert render({**values, "pd": {"enabled": True}}).of("Deployment")


def test_the_failure_that_the_document_quotes_is_the_charts(chart_folder: Path) -> None:
    (quoted,) = re.findall(r"```text\n(.*?)\n```", DOCUMENT.read_text(), flags=re.DOTALL)
    template = (chart_folder / "templates" / "_validate.tpl").read_text()
    assert quoted.replace("models[0] (granite)", "%s (%s)").replace("models[0]", "%s") in template


def test_metrics_that_pools_scale_by_exist(release_named: Any) -> None:
    catalog = CATALOG.read_text()
    (scaler,) = release_named("hpa").of("HorizontalPodAutoscaler")
    names = {metric["external"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    for scaled in release_named("keda").of("ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            names |= set(re.findall(r"pdcoord_[a-z_]+", trigger["metadata"]["query"]))
    assert names
    for name in names:
        assert f"| `{name}` |" in catalog
