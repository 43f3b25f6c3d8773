"""Canaries of real servers: unlike pairs whose KV is right are opened, one whose KV is not stays shut."""

import os
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.feeds.canary import canary_prompt

pytestmark = pytest.mark.e2e

DECODE = "bf16-128"
REGROUPED, CONVERTED, OTHERS = "bf16-32", "fp16-128", "bf16-32-others"
NAMES = (DECODE, REGROUPED, CONVERTED, OTHERS)
LAYOUTS = {
    DECODE: "{preset: cpu-vec, block_tokens: 128}",
    REGROUPED: "{preset: cpu-vec, block_tokens: 32}",
    CONVERTED: "{preset: cpu-vec, block_tokens: 128, dtype: float16}",
    # Nothing that is declared tells it from the other one.
    OTHERS: "{preset: cpu-vec, block_tokens: 32}",
}
VERDICTS = {REGROUPED: "regroup", CONVERTED: "convert", OTHERS: "regroup"}
JUDGED_S = 120.0
BUSY = pytest.mark.timeout(2 * JUDGED_S, func_only=True)
# What a policy has where it does not say.
TOLERANCE, CANARY_TOKENS = 0.5, 400
# Of the figures in docs/canary.md: 30.
PROMPTS = int(os.environ.get("PDCOORD_E2E_CANARY_PROMPTS", "4"))
TOKENS = 16
ASKED = {"max_tokens": TOKENS, "logprobs": 5, "return_tokens_as_token_ids": True}


@dataclass(frozen=True)
class Site:
    """A gateway over the decode server's sidecar and the prefill servers of one policy."""

    gateway: Any
    admin: Any

    def path(self, pool: str) -> dict[str, Any]:
        (row,) = [row for row in self.admin.call("/paths").json()["paths"] if row["prefill"] == f"{pool}/a"]
        found: dict[str, Any] = row
        return found

    def state(self, pool: str, state: str) -> bool:
        count: float = self.gateway.counter("pdcoord_gateway_canary_state", prefill_pool=pool, state=state)
        return count == 1.0

    def outcomes(self, pool: str, outcome: str) -> float:
        count: float = self.gateway.counter(
            "pdcoord_gateway_canaries_total", prefill_pool=pool, decode_pool="decode", outcome=outcome
        )
        return count


@pytest.fixture(scope="module")
def running(servers: Any) -> dict[str, Any]:
    return dict(zip(NAMES, servers.up(*NAMES), strict=True))


@pytest.fixture(scope="module")
def sidecar(running: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    sidecar, metrics = launcher.ports(2)
    targets = [f"{each.engine.address}/{each.kv_port}" for name, each in running.items() if name != DECODE]
    command = [
        *(Path(sys.executable).parent / "pdcoord-sidecar", "--host", "127.0.0.1", "--port"),
        *(str(sidecar.port), "--engine", running[DECODE].engine.address, "--allow", ",".join(targets)),
        *("--metrics-port", str(metrics.port)),
    ]
    launcher.serve(command, metrics, tmp_path_factory.mktemp("canary-sidecar"))
    return sidecar


def pool_text(name: str, role: str, layout: str, endpoint: str, speed: str) -> str:
    return f"""
  - name: {name}
    role: {role}
    vendor: cpu
    engine: vllm
    connector: pdcoord
    layout: {layout}
    kv_bytes_per_token: 2048
    link_gbit_per_s: 10
    endpoints: [{{name: a, {endpoint}}}]
    speed: {{{speed}}}
    limits: {{context_tokens_max: 2048}}"""


@contextmanager
def serving(
    launcher: Any, running: Any, sidecar: Any, folder: Path, prefills: dict[str, str]
) -> Iterator[Site]:
    """A gateway with these pools of one prefill server each, by the server's name; ends with the block."""
    pools = [
        pool_text(
            *(pool, "prefill", LAYOUTS[name]),
            f'address: "{running[name].engine.address}", kv_port: {running[name].kv_port}',
            "prefill_base_ms: 5, prefill_ms_per_token: 0.1",
        )
        for pool, name in prefills.items()
    ]
    speed = "prefill_base_ms: 50, prefill_ms_per_token: 5, step_base_ms: 10"
    pools.append(pool_text("decode", "decode", LAYOUTS[DECODE], f'address: "{sidecar.address}"', speed))
    policy = folder / "policy.yaml"
    policy.write_text(f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: e2e-canary}}
model: {{name: tiny, bytes_per_token: 1}}
pools: {"".join(pools)}
disaggregation: {{mode: always, uncached_tokens_min: 100, bandwidth_gbit_per_s_min: 1}}
""")
    gateway, admin = launcher.ports(2)
    process = launcher.gateway(policy, gateway, admin, folder)
    try:
        yield Site(gateway, admin)
    finally:
        process.kill()


def ask(site: Site, prompt: str) -> tuple[str, list[int]]:
    """A client's request: the decision, and its tokens."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = site.gateway.call("/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.headers["x-pdcoord-decision"], answer.json()["choices"][0]["token_ids"]


@BUSY
def test_unlike_pairs_that_are_right_are_opened_and_used(
    running: Any, sidecar: Any, launcher: Any, tmp_path: Path, words: Any, is_right: Any, wait: Any
) -> None:
    decode, pools = running[DECODE], {"regrouped": REGROUPED, "converted": CONVERTED}
    failed, pulled = decode.failures(), decode.engine.pulled_tokens
    with serving(launcher, running, sidecar, tmp_path, pools) as site:
        wait(lambda: all(site.state(pool, "passed") for pool in pools), JUDGED_S, "both pairs have passed")
        rows = {pool: site.path(pool) for pool in pools}
        assert all(site.outcomes(pool, "passed") >= 1.0 for pool in pools)
        tried = decode.engine.pulled_tokens
        prompts = [words.prompt(length) for length in (300, 700)]
        answers = [ask(site, prompt) for prompt in prompts]
        assert decode.engine.pulled_tokens - tried == sum(map(len, prompts))
    for pool, name in pools.items():
        told = rows[pool]["verdict"], rows[pool]["breaker"], rows[pool]["fault"]
        assert told == (VERDICTS[name], "closed", "")
        assert re.search(r"(a tie:|at most) [\d.e-]+ (and|apart)", rows[pool]["canary"]["detail"]), rows[pool]
    assert tried - pulled >= CANARY_TOKENS * len(pools)
    for prompt, (decision, tokens) in zip(prompts, answers, strict=True):
        assert decision == "split; split-always"
        assert is_right(tokens, decode, prompt)
    assert decode.failures() == failed


@BUSY
def test_a_pair_whose_kv_is_of_other_weights_is_shut_and_nobody_gets_a_wrong_token(
    running: Any, sidecar: Any, launcher: Any, tmp_path: Path, words: Any, is_right: Any, wait: Any
) -> None:
    """Digests and layouts are right; the numbers are not."""
    decode, prompt = running[DECODE], words.prompt(700)
    with serving(launcher, running, sidecar, tmp_path, {"others": OTHERS}) as site:
        wait(lambda: site.state("others", "failed"), JUDGED_S, "the pair has failed")
        row = site.path("others")
        assert site.outcomes("others", row["fault"]) >= 1.0
        assert site.outcomes("others", "passed") == 0.0
        answers = [ask(site, prompt) for _ in range(2)]
    assert (row["verdict"], row["breaker"]) == ("regroup", "open")
    assert row["fault"] in {"canary-tokens", "canary-logprobs"}
    assert "block_tokens=32" in row["canary"]["prefill_layout"]
    assert "block_tokens=128" in row["canary"]["decode_layout"]
    assert [decision for decision, _ in answers] == ["colocated; no-open-path"] * 2
    assert all(is_right(tokens, decode, prompt) for _, tokens in answers)


@dataclass(frozen=True)
class Apart:
    """One prompt, split and alone: the largest difference of logprobs on common tokens, and the first other.

    Attributes:
        gap: at the first differing token, the larger of how much likelier each answer holds its own than the
            other's; None where all are equal, infinite where that is not among the likeliest five.
    """

    logprobs: float
    place: int | None = None
    gap: float | None = None

    @property
    def is_within(self) -> bool:
        return self.logprobs <= TOLERANCE and (self.gap is None or self.gap <= TOLERANCE)


def apart(one: Any, other: Any) -> Apart:
    told = [answer["choices"][0]["logprobs"] for answer in (one, other)]
    largest = 0.0
    for place in range(TOKENS):
        tokens = [each["tokens"][place] for each in told]
        values = [each["token_logprobs"][place] for each in told]
        if tokens[0] == tokens[1]:
            largest = max(largest, abs(values[0] - values[1]))
            continue
        tops = [each["top_logprobs"][place] for each in told]
        crossed = [tops[0].get(tokens[1], -float("inf")), tops[1].get(tokens[0], -float("inf"))]
        return Apart(largest, place, max(values[0] - crossed[0], values[1] - crossed[1]))
    return Apart(largest)


@pytest.mark.parametrize("name", [REGROUPED, CONVERTED, OTHERS])
@pytest.mark.timeout(120 + 10 * PROMPTS, func_only=True)
def test_the_tolerance_tells_rounding_from_other_weights(
    running: Any, hand_over: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, failed, found = running[DECODE], running[DECODE].failures(), []
    for number in range(PROMPTS):
        prompt = canary_prompt(f"{name} {number:06}", CANARY_TOKENS)
        split = hand_over.one_after_the_other(running[name], decode, prompt, **ASKED)
        found.append(apart(split, decode.alone(prompt, **ASKED)))
    assert decode.failures() == failed
    with capsys.disabled():
        sys.stdout.write(f"\n{name} to {DECODE}: {told(found)} ")
    assert [each.is_within for each in found] == [name != OTHERS] * PROMPTS


def told(found: list[Apart]) -> str:
    logprobs = sorted(each.logprobs for each in found)
    differing = [each for each in found if each.place is not None]
    gaps = sorted(each.gap for each in differing if each.gap is not None)
    words = [
        f"{len(found) - len(differing)} of {len(found)} equal",
        f"logprobs apart median {statistics.median(logprobs):.4f} max {logprobs[-1]:.4f}",
        f"gaps {gaps[0]:.3f} to {gaps[-1]:.3f}" if gaps else "no gaps",
    ]
    return "; ".join(words)
