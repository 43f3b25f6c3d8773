"""The demo's canary: one prompt served by a pair of unlike vendors and by the decode engine alone."""

import asyncio
from dataclasses import dataclass

import msgspec

from pdcoord.core.gates import UNTRIED
from pdcoord.protocol.headers import PLAN, HostPort
from pdcoord.protocol.plans import DialectName, PlanHeader, PrefillTarget, encode_plan
from pdcoord.runtime.adminclient import get
from pdcoord.sim.demo.deployment import Canary
from pdcoord.sim.demo.processes import DemoError
from pdcoord.sim.emulator_call import REAL_KV
from pdcoord.sim.emulator_generate import KV
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

ANSWER_S_MAX = 30.0
SETTLE_S_MAX = 60.0
PROMPT_TOKENS = 1_500
OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of it.

    Attributes:
        kv: the decode engine's word on the KV that came, by digest.
        fault: empty if tokens and KV are right.
    """

    kv: str
    fault: str

    @property
    def is_right(self) -> bool:
        return not self.fault

    def __str__(self) -> str:
        return f"{self.fault} {self.kv}".strip() if self.fault else f"tokens equal, KV {self.kv}"


class _Path(msgspec.Struct):
    fault: str


class _Paths(msgspec.Struct):
    paths: list[_Path]


async def settled(client: Client, admin: HostPort) -> None:
    """Wait until the gateway's own canaries have said what they have to say of every pair.

    Raises:
        DemoError: if they have not within SETTLE_S_MAX.
    """
    try:
        async with asyncio.timeout(SETTLE_S_MAX):
            while True:
                if await _is_settled(client, admin):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise DemoError(f"a pair of pools had no canary within {SETTLE_S_MAX:g} s: see GET /paths") from error


async def _is_settled(client: Client, admin: HostPort) -> bool:
    raw = await get(client, admin, "/paths")
    page = msgspec.json.decode(raw or b'{"paths": []}', type=_Paths)
    return bool(page.paths) and all(path.fault != UNTRIED for path in page.paths)


class _Choice(msgspec.Struct):
    token_ids: list[int]


class _Answer(msgspec.Struct):
    choices: list[_Choice]


async def prove(client: Client, model: str, canary: Canary) -> Proof:
    """Ask the sidecar for the same prompt split, both legs at once, and colocated."""
    target = PrefillTarget(address=canary.prefill, kv_port=canary.kv_port)
    split = PlanHeader(prefills=(target,), dialect=DialectName.PDCOORD, is_colocated_allowed=False)
    try:
        tokens, kv = await _ask(client, model, canary, split)
        alone, _ = await _ask(client, model, canary, PlanHeader())
    except (WireError, ValueError) as error:
        return Proof("", f"not served: {error}")
    if not kv.startswith("right "):
        return Proof(kv or "none came", "the KV is not what the decode engine computes alone:")
    return Proof(kv, "" if tokens == alone else "the tokens are not what the decode engine gives alone:")


async def _ask(client: Client, model: str, canary: Canary, plan: PlanHeader) -> tuple[list[int], str]:
    body = {
        "model": model,
        "prompt": [1_000 + 7 * place % 9_000 for place in range(PROMPT_TOKENS)],
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        REAL_KV: True,
        # Nothing that was cached before may answer for the pair.
        "cache_salt": f"canary-{canary.prefill_name}-{plan.dialect}-{len(plan.prefills)}",
    }
    async with await client.request(
        "POST",
        canary.sidecar,
        "/v1/completions",
        headers=[(b"content-type", b"application/json"), (PLAN, encode_plan(plan))],
        body=msgspec.json.encode(body),
        head_timeout_s=ANSWER_S_MAX,
    ) as response:
        raw = await response.read_all(timeout_s=ANSWER_S_MAX)
        if response.status != 200:
            raise ValueError(f"HTTP {response.status} {raw[:300]!r}")
        answer = msgspec.json.decode(raw, type=_Answer)
        return answer.choices[0].token_ids, (response.header(KV) or b"").decode("ascii", "replace")
