"""vLLM servers with PdcoordConnector, started in groups, and hand-overs between any two of them.

Each server can be either side. The environment is that of the other tests with real engines.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
OUTPUT_TOKENS = 12
# vLLM prefills at most this many tokens in a step, so longer prompts are handed over in chunks.
STEP_TOKENS = 512
MODEL_TOKENS_MAX = 2048
PROMPT_TOKENS = (
    *(1, 2, 5, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256),
    *(257, 384, 511, 512, 513, 700, 1024, 1025, 1425),
)
# Of those, with no tie met.
EQUAL_PROMPTS_MIN = 20
# Far above what a hand-over takes on an idle machine, so that a busy one fails none.
TRANSFER_TIMEOUT_S = 10.0
# Batches and blocks decide in which order bf16 adds up: of two tokens nearly as likely, either may come.
TIE_LOGPROB = 0.25
TIE_TOKENS = 5
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True)
class Spec:
    """How a server differs from the others."""

    dtype: str
    block_tokens: int
    ranks: int = 1
    seed: int | None = None
    """Of other weights than all the others have."""


SPECS = {
    "bf16-128": Spec("bfloat16", 128),
    "bf16-128-b": Spec("bfloat16", 128),
    "bf16-32": Spec("bfloat16", 32),
    "bf16-32-others": Spec("bfloat16", 32, seed=3),
    "fp16-128": Spec("float16", 128),
    "fp32-32": Spec("float32", 32),
    "fp32-64": Spec("float32", 64),
    "fp32-64-tp2": Spec("float32", 64, ranks=2),
}


@dataclass
class Server:
    """A started server and where its agents listen."""

    engine: Any
    kv_port: int

    @property
    def kv_address(self) -> str:
        return f"127.0.0.1:{self.kv_port}"

    def complete(self, prompt: str, **members: Any) -> Any:
        """One greedy completion; the status must be 200."""
        body = {
            "model": "tiny",
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "max_tokens": OUTPUT_TOKENS,
        }
        answer = self.engine.call("/v1/completions", body | members)
        assert answer.status == 200, answer.body
        return answer.json()

    def alone(self, prompt: str, **members: Any) -> Any:
        """The same with nobody's help and no cache."""
        return self.complete(prompt, cache_salt=f"alone-{secrets.token_hex(8)}", **members)

    def failures(self, kind: str = "") -> float:
        labels = {"kind": kind} if kind else {}
        count: float = self.engine.counter("vllm:pdcoord_failures_total", **labels)
        return count

    @property
    def used_blocks(self) -> float:
        share: float = self.engine.counter("vllm:kv_cache_usage_perc")
        return share

    @property
    def staged_bytes(self) -> float:
        count: float = self.engine.counter("vllm:pdcoord_staging_bytes")
        return count


@dataclass
class Servers:
    """Starts what a test asks for, all at once, and stops what it does not."""

    launcher: Any
    folder: Path
    running: dict[str, Server] = field(default_factory=dict)

    def up(self, *names: str) -> list[Server]:
        for name in set(self.running) - set(names):
            self.running.pop(name).engine.process.kill()
        self.start([name for name in names if name not in self.running])
        return [self.running[name] for name in names]

    def start(self, names: Sequence[str], kv_ports: dict[str, int] | None = None) -> None:
        """Start servers that do not run, at the given side channel ports or free ones."""
        for name in names:
            port = (kv_ports or {}).get(name) or self.launcher.ports(1)[0].port
            self.running[name] = self._launch(name, SPECS[name], port)
        self.launcher.wait(*(self.running[name].engine for name in names))

    def _launch(self, name: str, spec: Spec, kv_port: int) -> Server:
        transfer = {
            "kv_connector": "PdcoordConnector",
            "kv_connector_module_path": "transfer.engines.vllm.connector",
            "kv_role": "kv_both",
            # The ranks of a server with several take free ports.
            "kv_port": kv_port if spec.ranks == 1 else 0,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "listen_host": "127.0.0.1",
                "advertise_host": "127.0.0.1",
                "staging_bytes": 64 << 20,
                "backends": os.environ.get("PDCOORD_E2E_BACKENDS", "nixl,tcp").split(","),
                "transfer_timeout_s": TRANSFER_TIMEOUT_S,
                "lease_s": 2 * TRANSFER_TIMEOUT_S,
            },
        }
        flags = [
            *("--dtype", spec.dtype, "--block-size", str(spec.block_tokens)),
            *("--max-model-len", str(MODEL_TOKENS_MAX), "--max-num-batched-tokens", str(STEP_TOKENS)),
            *("--tensor-parallel-size", str(spec.ranks), "--kv-transfer-config", json.dumps(transfer)),
            # 16384 tokens are enough.
            *("--num-gpu-blocks-override", str(16_384 // spec.block_tokens)),
        ]
        if spec.seed is not None:
            flags += ["--model", str(self.launcher.make_model(self.folder / name, spec.seed))]
        return Server(self.launcher.begin(name, flags, {"PYTHONPATH": str(ROOT)}, self.folder), kv_port)


@pytest.fixture(scope="session")
def servers(launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(launcher, tmp_path_factory.mktemp("pdcoord-engines"))
    yield servers
    servers.up()


@dataclass(frozen=True)
class HandOver:
    """Moves one prompt's KV from a server to another, by the JSON that engines exchange."""

    pool: ThreadPoolExecutor

    def ticket(self, prefill: Server, prompt: str, **members: Any) -> dict[str, Any]:
        """A prefill leg's ticket."""
        asked = prefill.complete(prompt, max_tokens=1, kv_transfer_params=ASK, **members)
        ticket: dict[str, Any] = asked["kv_transfer_params"]
        return ticket

    def one_after_the_other(self, prefill: Server, decode: Server, prompt: str, **members: Any) -> Any:
        ticket = self.ticket(prefill, prompt)
        return decode.complete(prompt, kv_transfer_params=ticket, **members)

    def both_at_once(
        self, prefill: Server, decode: Server, prompt: str, *, is_decode_first: bool = False
    ) -> Any:
        """Both legs under a transfer that is minted here, as a sidecar does it."""
        ours = {"version": 1, "transfer": secrets.token_hex(16), "nonce": secrets.token_hex(16)}
        host, _, port = prefill.kv_address.partition(":")
        ticket = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_host": host,
            "remote_port": int(port),
            "pdcoord": ours | {"address": prefill.kv_address},
        }

        def prefill_leg() -> Any:
            return prefill.complete(prompt, max_tokens=1, kv_transfer_params=ASK | {"pdcoord": ours})

        def decode_leg() -> Any:
            return decode.complete(prompt, kv_transfer_params=ticket)

        legs = [decode_leg, prefill_leg] if is_decode_first else [prefill_leg, decode_leg]
        answers = [leg.result(60) for leg in [self.pool.submit(leg) for leg in legs]]
        return answers[0 if is_decode_first else 1]


@pytest.fixture(scope="session")
def hand_over() -> Iterator[HandOver]:
    with ThreadPoolExecutor(2) as pool:
        yield HandOver(pool)


def tokens_of(answer: Any) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def logprobs_of(answer: Any) -> list[float]:
    found: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
    return found


def agree(tokens: Sequence[int], decode: Server, prompt: str) -> bool:
    """Whether these are the tokens of the decode server alone, up to where two are nearly as likely.

    What follows such a tie continues another text, so it is not compared.
    """
    own = decode.alone(prompt, logprobs=TIE_TOKENS, return_tokens_as_token_ids=True)
    likely = own["choices"][0]["logprobs"]["top_logprobs"]
    for token, expected, places in zip(tokens, tokens_of(own), likely, strict=True):
        if token != expected:
            return places.get(f"token_id:{token}", -math.inf) >= max(places.values()) - TIE_LOGPROB
    return True


@dataclass(frozen=True)
class Compare:
    """Answers compared, over prompts from one token to past the bound of a prefill step."""

    hand_over: HandOver
    words: Any

    def tokens(self, prefill: Server, decode: Server, lengths: Sequence[int] = PROMPT_TOKENS) -> None:
        """Split answers have the tokens of the decode server alone, and the KV has come from elsewhere.

        All of them up to a tie, and at least EQUAL_PROMPTS_MIN to the end.
        """
        pulled = decode.engine.pulled_tokens
        failed = decode.failures()
        wrong = []
        equal = 0
        for length in lengths:
            prompt = self.words.prompt(length)
            split = tokens_of(self.hand_over.one_after_the_other(prefill, decode, prompt))
            equal += split == tokens_of(decode.alone(prompt))
            if not agree(split, decode, prompt):
                wrong.append(length)
        assert wrong == []
        assert equal >= EQUAL_PROMPTS_MIN
        assert decode.failures() == failed
        # vLLM counts none for the prompt of one token, which it computes again.
        assert decode.engine.pulled_tokens - pulled == sum(length for length in lengths if length > 1)

    def logprobs(self, prefill: Server, decode: Server, lengths: Sequence[int]) -> tuple[float, float]:
        """Largest differences of log-probabilities on the tokens that answers have in common from the start.

        Returns that of the split answers to the decode server's own, and that of the two servers' own.
        """
        split_apart = own_apart = 0.0
        for length in lengths:
            prompt = self.words.prompt(length)
            pulled = decode.engine.pulled_tokens
            split = self.hand_over.one_after_the_other(prefill, decode, prompt, logprobs=0)
            assert decode.engine.pulled_tokens - pulled == (length if length > 1 else 0)
            own = decode.alone(prompt, logprobs=0)
            other = prefill.alone(prompt, logprobs=0)
            split_apart = max(split_apart, self.apart(split, own))
            own_apart = max(own_apart, self.apart(other, own))
        return split_apart, own_apart

    @staticmethod
    def apart(one: Any, other: Any) -> float:
        pairs = zip(tokens_of(one), logprobs_of(one), tokens_of(other), logprobs_of(other), strict=True)
        largest = 0.0
        for token, logprob, other_token, other_logprob in pairs:
            if token != other_token:
                break
            largest = max(largest, abs(logprob - other_logprob))
        assert math.isfinite(largest)
        return largest


@pytest.fixture(scope="session")
def compare(hand_over: HandOver, words: Any) -> Compare:
    return Compare(hand_over, words)


@pytest.fixture(scope="session")
def read_tokens() -> Callable[[Any], list[int]]:
    return tokens_of


@pytest.fixture(scope="session")
def is_right() -> Callable[[Sequence[int], Server, str], bool]:
    return agree


@pytest.fixture(scope="session")
def read_logprobs() -> Callable[[Any], list[float]]:
    return logprobs_of


@pytest.fixture(scope="session")
def threads() -> Callable[[Callable[[int], Any], Sequence[int]], list[Any]]:
    """Calls a function for each item at the same time."""

    def call(function: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(function, items))

    return call
