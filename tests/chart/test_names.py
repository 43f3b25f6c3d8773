"""Names: what is text in Kubernetes is text here, no two objects share one, and none is refused there."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, HelmError

LABELS_OF_MAPS = {"labels", "matchLabels", "annotations", "nodeSelector"}
NAMES = {"name", "namespace", "secretName", "claimName", "serviceAccountName"}
# Each a number, a truth or nothing to a reader of YAML.
WORDS = ["123", "true", "1e3", "null", "0x1f", "no"]
ADOPTED = {
    "adopt.enabled": True,
    "gateway.mode": "envoy",
    "monitoring.mode": "servicemonitor",
    "models.0.pools.0.existing": {"matchLabels": {"app": "1"}, "deployment": "1"},
    "models.0.pools.1.existing": {"matchLabels": {"app": "true"}, "deployment": "true"},
}
MODES: list[dict[str, Any]] = [
    {},
    {"gateway.mode": "envoy", "monitoring.mode": "servicemonitor"},
    {"gateway.mode": "attach", "gateway.attach.gateway": {"name": "1", "namespace": "2", "sectionName": "3"}},
    {"autoscaling.mode": "hpa", "models.0.pools.0.autoscaling": {"min": 1, "max": 2}},
    {"policy.source": "crd", "models.0.pools.0.size": 2, "monitoring.rules": True},
    ADOPTED,
]


def texts_wanted(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that Kubernetes wants to be text, with where it is."""
    if isinstance(node, list):
        for i, each in enumerate(node):
            yield from texts_wanted(each, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        here = f"{path}.{key}"
        is_labels = key in LABELS_OF_MAPS or (key == "selector" and "matchLabels" not in (value or {}))
        if is_labels and isinstance(value, dict):
            yield from (
                (f"{here}.{name}", each) for name, each in value.items() if not isinstance(each, dict)
            )
        elif key in NAMES and not isinstance(value, dict | list):
            yield here, value
        yield from texts_wanted(value, here)


def assert_well_named(release: Any) -> None:
    for given in release.objects:
        for path, value in texts_wanted(given):
            assert isinstance(value, str), (given["kind"], path, value)
    for patches in release.of("ConfigMap"):
        if patches["metadata"]["name"].endswith("-patches"):
            for text in patches["data"].values():
                assert all(isinstance(value, str) for _, value in texts_wanted(yaml.safe_load(text)))
    seen = Counter((given["kind"], given["metadata"]["name"]) for given in release.objects)
    assert [key for key, count in seen.items() if count > 1] == []


def test_names_are_text_and_no_two_objects_share_one(release: Any) -> None:
    assert_well_named(release)


@pytest.mark.parametrize("mode", MODES, ids=lambda given: str(given)[:40])
@pytest.mark.parametrize("word", WORDS)
def test_names_that_yaml_would_read_otherwise_stay_text(
    render: Any, changed: Any, word: str, mode: dict[str, Any]
) -> None:
    names = {
        "models.0.name": word,
        "models.0.id": word,
        "models.0.pools.0.name": word,
        "models.0.huggingFaceToken": {"secret": word, "key": word},
        "models.0.cache": {"persistentVolumeClaim": word},
        "auth.existingSecret": word,
        "auth.controlTls.secretName": word,
        "auth.keysSecret": word,
        "auth.adminKeySecret": word,
        "auth.engineKeySecret": word,
        "auth.planKeysSecret": word,
        "serviceAccount.name": word,
        "coordinator.podLabels": {"a": word},
        "monitoring.labels": {"b": word},
        "vendors": {word: VENDOR},
        "models.0.pools.1.vendor": word,
        "nameOverride": word,
        "fullnameOverride": word if word[0].isalpha() else "true",
    }
    assert_well_named(render(changed(names | mode)))


VENDOR: dict[str, Any] = {
    "image": {"repository": "vllm", "tag": "1"},
    "resource": "",
    "rdmaResource": "",
    "layout": {"preset": "amd-aiter-unified"},
    "blockTokens": 64,
    "nixlOrder": "HND",
    "bufferDevice": "cuda",
    "env": {},
    "tcpEnv": {},
    "rdmaEnv": {},
    "args": [],
    "shmSize": "1Gi",
    "supplementalGroups": [],
    "speed": {
        "prefill_base_ms": 8,
        "prefill_ms_per_token": 0.2,
        "step_base_ms": 10,
        "step_us_per_sequence": 25,
    },
    "memoryTBPerSecond": 1,
}


def reserved(chart_folder: Path) -> set[str]:
    text = (chart_folder / "templates" / "_names.tpl").read_text()
    (body,) = re.findall(r'define "pdcoord\.namesReserved" -}}\n(.*?)\n', text)
    return set(re.findall(r'"([a-z]+)"', body))


def test_names_that_the_chart_takes_are_reserved(release: Any, chart_folder: Path) -> None:
    pools = {pool["name"] for model in release.values["models"] for pool in model["pools"]}
    models = {given["metadata"]["name"] for given in release.of("PoolPolicy")}
    for given in release.objects:
        name = given["metadata"]["name"]
        rest = name.removeprefix("demo-pdcoord").removeprefix("-")
        if rest and name not in models and rest.removesuffix("-sidecars") not in pools:
            assert rest in reserved(chart_folder), name


def test_pools_do_not_take_them(render: Any, changed: Any, chart_folder: Path) -> None:
    for name in (*reserved(chart_folder), "decode-sidecars"):
        with pytest.raises(HelmError) as caught:
            render(changed({"models.0.pools.0.name": name}))
        assert f'models[0].pools[0].name is "{name}", which objects of this chart are called by: give' in str(
            caught.value
        )


@pytest.mark.parametrize(
    ("changes", "release_name", "message"),
    [
        (
            {"fullnameOverride": "Foo"},
            "demo",
            'fullnameOverride is "Foo", which no Service may be called: give',
        ),
        ({"fullnameOverride": "1a"}, "demo", 'fullnameOverride is "1a", which no Service'),
        ({"nameOverride": "X Y"}, "demo", 'nameOverride is "X Y", which no label'),
        ({}, "1abc", 'the release is called "1abc", which makes the name "1abc-pdcoord", which no Service'),
        ({}, "my.release", 'the release is called "my.release", which makes the name "my.release-pdcoord"'),
    ],
)
def test_names_of_all_objects_are_judged(
    changed: Any, chart_folder: Path, changes: dict[str, Any], release_name: str, message: str
) -> None:
    chart = Chart.load(chart_folder)
    with pytest.raises(HelmError) as caught:
        chart.render(changed(changes), name=release_name, namespace="llm")
    assert message in str(caught.value)


def test_a_release_whose_name_no_service_may_have_takes_another_full_name(
    changed: Any, chart_folder: Path
) -> None:
    values = changed({"fullnameOverride": "pdcoord"})
    assert Chart.load(chart_folder).render(values, name="1.a", namespace="llm")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"serviceAccount.name": "BAD NAME"}, "/serviceAccount/name"),
        ({"auth.existingSecret": "Bad Name"}, "/auth/existingSecret"),
        ({"auth.controlTls.secretName": "a_b"}, "/auth/controlTls/secretName"),
        ({"auth.keysSecret": "a_b"}, "/auth/keysSecret"),
        ({"auth.planKeysSecret": "a_b"}, "/auth/planKeysSecret"),
        ({"gateway.tls.secretName": "a_b"}, "/gateway/tls/secretName"),
        ({"models.0.huggingFaceToken": {"secret": "Bad Secret"}}, "/models/0/huggingFaceToken/secret"),
        ({"models.0.cache": {"persistentVolumeClaim": "bad name"}}, "/models/0/cache/persistentVolumeClaim"),
        (
            {**ADOPTED, "models.0.pools.0.existing.deployment": "Bad Dep"},
            "/models/0/pools/0/existing/deployment",
        ),
        (
            {**ADOPTED, "models.0.pools.0.existing.matchLabels": {"app": "bad value!"}},
            "/models/0/pools/0/existing/matchLabels/app",
        ),
        ({"coordinator.podLabels": {"a": "x" * 64}}, "/coordinator/podLabels/a"),
        ({"models.0.pools.0.nodeSelector": {"a": True}}, "/models/0/pools/0/nodeSelector/a"),
        ({"monitoring.labels": {"a b": "c"}}, "/monitoring/labels"),
        ({"coordinator.image.tag": "a b"}, "/coordinator/image/tag"),
        ({"coordinator.image.tag": "sha256:abc"}, "/coordinator/image/tag"),
        ({"models.0.pools.0.image": {"tag": "v 1"}}, "/models/0/pools/0/image/tag"),
        ({"global.imageRegistry": "http://foo/"}, "/global/imageRegistry"),
        ({"global.engineImageRegistry": "foo//bar"}, "/global/engineImageRegistry"),
        (
            {"models.0.policy": {"fallback": {"ladder": ["colocated", "colocated"]}}},
            "/models/0/policy/fallback/ladder",
        ),
    ],
    ids=lambda given: str(given)[:50],
)
def test_what_kubernetes_refuses_is_refused_here(
    render: Any, changed: Any, changes: dict[str, Any], path: str
) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"coordinator.image.tag": f"sha256:{'0a' * 32}"},
        {"global.imageRegistry": "registry.example:5000/team/x"},
        {"global.imageRegistry": "team/"},
    ],
    ids=str,
)
def test_images_that_are_named_otherwise_are_taken(
    render: Any, changed: Any, changes: dict[str, Any]
) -> None:
    assert render(changed(changes)).of("Deployment")
