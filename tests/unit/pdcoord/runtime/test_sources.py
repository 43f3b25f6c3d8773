"""What a process has its policies and endpoints from, and why it may not start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.feeds.declared import EndpointsFile, Source
from pdcoord.feeds.kubernetes import PodsSource
from pdcoord.feeds.kubewatch import Failed, PageListed, Started, WatchTrouble
from pdcoord.feeds.policies import KubePolicies
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.registry import PolicyRegistry
from pdcoord.runtime.observe import Metrics
from pdcoord.runtime.settings import load_settings
from pdcoord.runtime.sources import Sources

Make = Callable[..., Sources]


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, lines: LogCapture) -> Make:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    log = structlog.wrap_logger(None, processors=[lines])

    def made(metrics: Metrics | None = None, **given: Any) -> Sources:
        return Sources(load_settings(**given), metrics or Metrics(), log)

    return made


async def test_files_need_nothing_that_runs(make: Make) -> None:
    sources = make(policy=Path("p"), endpoints=Path("e"))
    assert isinstance(sources.policies, PolicyRegistry)
    assert isinstance(sources.endpoints, EndpointsFile)
    assert sources.followers == []
    await sources.run()


def test_without_an_api_server_there_is_no_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyError, match="no API server is known: KUBECONFIG is not set, nor KUBERNETES"):
        make(policy=Path("p"), kubernetes_pods=True)
    monkeypatch.setenv("KUBECONFIG", "missing.yaml")
    with pytest.raises(PolicyError, match=r"KUBECONFIG names missing\.yaml, which is no file"):
        make(policy=Path("p"), kubernetes_pods=True)


def test_a_namespace_is_needed_and_may_be_the_contexts(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "config"
    path.write_text(
        "{current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], users: [],"
        " clusters: [{name: c, cluster: {server: s}}]}"
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(PolicyError, match="set PDCOORD_KUBERNETES_NAMESPACE"):
        make(policy=Path("p"), kubernetes_pods=True)
    path.write_text(path.read_text().replace("user: u", "user: u, namespace: mine"))
    (follower,) = make(policy=Path("p"), kubernetes_pods=True).followers
    assert follower.collection.path == "/api/v1/namespaces/mine/pods"
    assert follower.collection.labels == "llm-d.ai/inference-serving=true"
    for text in ("no: config", "- 3", "{", ""):
        path.write_text(text)
        with pytest.raises(PolicyError, match=f"KUBECONFIG names {path}, which is no kubeconfig"):
            make(policy=Path("p"), kubernetes_pods=True)


def test_everything_can_come_from_the_api_server(
    make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogCapture
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    metrics = Metrics()
    sources = make(
        metrics, kubernetes_policies=True, kubernetes_pods=True, inference_pool="p", kubernetes_namespace="n"
    )
    assert isinstance(sources.policies, KubePolicies)
    assert isinstance(sources.endpoints, PodsSource)
    followers = {follower.collection.plural: follower for follower in sources.followers}
    assert set(followers) == {"poolpolicies", "pods", "inferencepools"}
    assert followers["inferencepools"].collection.fields == "metadata.name=p"
    pods = followers["pods"]
    pods._take(Started())
    pods._take(PageListed((), "1"))
    assert sources.pushed.is_set()
    assert sources.take_changed() == {Source.ENDPOINTS}
    assert not sources.pushed.is_set()
    assert sources.take_changed() == frozenset()
    pods._take(Failed(WatchTrouble.DENIED), why="told 403")
    (line,) = lines.entries
    assert (line["event"], line["resource"], line["why"], line["detail"]) == (
        "kubernetes.trouble",
        "pods",
        WatchTrouble.DENIED,
        "told 403",
    )
    assert line["silent_s"] >= 0.0
    shown = metrics.render().decode()
    assert 'pdcoord_gateway_kubernetes_lists_total{resource="pods"} 1.0' in shown
    assert 'pdcoord_gateway_kubernetes_troubles_total{resource="pods",why="denied"} 1.0' in shown
    assert 'pdcoord_gateway_pods_left_out{reason="unpicked"} 0.0' in shown
    # Nothing was ever heard of these: silent since the start, not without a series.
    sources._began_s -= 400.0
    silent = dict(
        line.split() for line in metrics.render().decode().splitlines() if "silent_seconds{" in line
    )
    name = "pdcoord_gateway_kubernetes_silent_seconds"
    assert float(silent[f'{name}{{resource="poolpolicies"}}']) >= 400.0
    assert float(silent[f'{name}{{resource="pods"}}']) < 400.0
