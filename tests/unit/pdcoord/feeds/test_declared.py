"""Files to signals, by difference, all of it or nothing."""

from pathlib import Path

import pytest

from pdcoord.core.events import Action, Event, ModelsReplaced
from pdcoord.core.fleet import EndpointDraining, EndpointGone, EndpointSeen
from pdcoord.feeds.declared import DeclaredFeed, EndpointsFile, Reload, Source
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.registry import PolicyRegistry

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: m}
pools:
  - name: listed
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{name: a, address: "10.0.0.1:8000"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
  - name: picked
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    selector: {match_labels: {role: both}}
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
"""

ENDPOINTS = """\
apiVersion: pdcoord.io/v1alpha1
kind: Endpoints
endpoints:
  - {name: b, address: "10.0.0.2:8000", labels: {role: both}}
  - {name: c, address: "10.0.0.3:8000", labels: {role: both}}
"""


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        return []

    def take(self) -> list[str]:
        """What came since the last call, in short."""
        told = []
        for event in self.events:
            match event:
                case ModelsReplaced(models):
                    told.append(f"models {' '.join(m.name for m in models)}")
                case EndpointSeen(endpoint):
                    told.append(f"seen {endpoint.id} {endpoint.address}")
                case EndpointGone(endpoint_id):
                    told.append(f"gone {endpoint_id}")
                case EndpointDraining(endpoint_id):
                    told.append(f"draining {endpoint_id}")
                case _:
                    raise AssertionError(event)
        self.events.clear()
        return told


class Bench:
    def __init__(self, folder: Path) -> None:
        self.policy = folder / "policy.yaml"
        self.endpoints = folder / "endpoints.yaml"
        self.policy.write_text(POLICY)
        self.endpoints.write_text(ENDPOINTS)
        self.recorder = Recorder()
        self.feed = DeclaredFeed(self.recorder, PolicyRegistry(self.policy), EndpointsFile(self.endpoints))

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)

    async def settle(self) -> list[Reload]:
        """Two looks: a change counts when the second finds it too."""
        return [*await self.feed.poll(), *await self.feed.poll()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    made.feed.load_first()
    return made


def test_the_first_load_tells_models_then_endpoints(bench: Bench) -> None:
    assert bench.recorder.take() == [
        "models m",
        "seen listed/a 10.0.0.1:8000",
        "seen picked/b 10.0.0.2:8000",
        "seen picked/c 10.0.0.3:8000",
    ]


def test_a_policy_alone_needs_no_endpoints_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    feed = DeclaredFeed(bench.recorder, PolicyRegistry(bench.policy))
    feed.load_first()
    assert bench.recorder.take() == ["models m", "seen listed/a 10.0.0.1:8000"]


def test_the_first_load_fails_on_either_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.endpoints.write_text("endpoints: 3")
    with pytest.raises(PolicyError, match=r"endpoints\.yaml"):
        bench.feed.load_first()
    assert bench.recorder.take() == []


async def test_nothing_changed_is_nothing_told(bench: Bench) -> None:
    bench.recorder.take()
    assert await bench.settle() == []
    assert bench.recorder.take() == []


async def test_endpoints_come_go_move_and_drain_by_difference(bench: Bench) -> None:
    bench.recorder.take()
    bench.endpoints.write_text("""\
apiVersion: pdcoord.io/v1alpha1
kind: Endpoints
endpoints:
  - {name: b, address: "10.0.0.22:8000", labels: {role: both}}
  - {name: d, address: "10.0.0.4:8000", labels: {role: both}, is_draining: true}
""")
    assert [(r.source, r.is_accepted) for r in await bench.settle()] == [(Source.ENDPOINTS, True)]
    assert bench.recorder.take() == [
        "gone picked/c",
        "seen picked/b 10.0.0.22:8000",
        "seen picked/d 10.0.0.4:8000",
        "draining picked/d",
    ]


async def test_draining_is_told_once_and_taken_back_by_seeing_it_again(bench: Bench) -> None:
    bench.recorder.take()
    draining = ENDPOINTS.replace(
        "labels: {role: both}}\n  - {name: c", "labels: {role: both}, is_draining: true}\n  - {name: c"
    )
    bench.endpoints.write_text(draining)
    await bench.settle()
    assert bench.recorder.take() == ["draining picked/b"]
    bench.endpoints.write_text(draining + "# touched\n")
    await bench.settle()
    assert bench.recorder.take() == []
    bench.endpoints.write_text(ENDPOINTS)
    await bench.settle()
    assert bench.recorder.take() == ["seen picked/b 10.0.0.2:8000"]


async def test_a_new_policy_tells_its_models_and_the_endpoints_that_it_changes(bench: Bench) -> None:
    bench.recorder.take()
    bench.policy.write_text(POLICY.replace("10.0.0.1:8000", "10.0.0.11:8000"))
    assert [(r.source, r.is_accepted) for r in await bench.settle()] == [(Source.POLICY, True)]
    assert bench.recorder.take() == ["models m", "seen listed/a 10.0.0.11:8000"]


@pytest.mark.parametrize("name", ["policy", "endpoints"])
async def test_a_file_with_any_error_changes_nothing_and_says_why(bench: Bench, name: str) -> None:
    bench.recorder.take()
    path: Path = getattr(bench, name)
    good = {"policy": POLICY, "endpoints": ENDPOINTS}[name]
    bad = good.replace("10.0.0.", "10.0.0.1").replace("role: both", "role: sometimes", 1)
    bench.write(path, bad + "unknown: 1\n")
    (reload,) = await bench.settle()
    assert (reload.source, reload.is_accepted) == (Source(name), False)
    assert str(path) in str(reload.problems[0])
    assert bench.feed.problems == {Source(name): reload.problems}
    assert bench.recorder.take() == []
    bench.write(path, good)
    await bench.settle()
    assert bench.feed.problems == {}
    assert bench.recorder.take() == []


async def test_files_that_are_sound_alone_but_not_together_change_nothing_until_they_are(
    bench: Bench,
) -> None:
    bench.recorder.take()
    # The listed endpoint of the policy is claimed by the selector of another pool of the model.
    clash = ENDPOINTS.replace("10.0.0.2:8000", "10.0.0.1:8000")
    bench.endpoints.write_text(clash)
    (reload,) = await bench.settle()
    assert (reload.source, reload.is_accepted) == (Source.ENDPOINTS, False)
    assert bench.recorder.take() == []
    assert list(bench.feed.problems) == [Source.ENDPOINTS]
    bench.policy.write_text(POLICY.replace("10.0.0.1:8000", "10.0.0.7:8000"))
    (reload,) = await bench.settle()
    assert (reload.source, reload.is_accepted) == (Source.POLICY, True)
    assert bench.feed.problems == {}
    assert bench.recorder.take() == [
        "models m",
        "seen listed/a 10.0.0.7:8000",
        "seen picked/b 10.0.0.1:8000",
    ]


async def test_entries_that_no_selector_picks_are_warned_of(bench: Bench) -> None:
    bench.endpoints.write_text(ENDPOINTS + '  - {name: x, address: "10.0.0.9:8000", labels: {role: bot}}\n')
    (reload,) = await bench.settle()
    assert any("10.0.0.9" in str(w) or ":6:" in str(w) for w in reload.warnings)
    assert bench.feed.warnings == reload.warnings
