"""bf16 servers with blocks of 32 and 128 tokens: the decode server's own tokens, whoever prefilled."""

from typing import Any

import pytest

pytestmark = pytest.mark.e2e

BLOCKS = {"bf16-128": 128, "bf16-128-b": 128, "bf16-32": 32}
NAMES = tuple(BLOCKS)
LENGTHS = (1, 31, 129, 512, 513, 1300)
# Of log-probabilities; seen: 0.0005.
STEP_ROUNDING = 0.02
UNEQUAL_LENGTHS_MAX = 2


@pytest.fixture(scope="module")
def running(servers: Any) -> dict[str, Any]:
    return dict(zip(NAMES, servers.up(*NAMES), strict=True))


@pytest.fixture
def three(running: dict[str, Any]) -> list[Any]:
    return [running[name] for name in NAMES]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("bf16-128", "bf16-128-b"), ("bf16-32", "bf16-128"), ("bf16-128", "bf16-32")],
)
def test_a_pair_gives_the_tokens_of_the_decode_server(
    running: Any, compare: Any, prefill: str, decode: str
) -> None:
    compare.tokens(running[prefill], running[decode])


def test_two_producers_with_unlike_blocks_feed_one_server_at_once(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any, threads: Any
) -> None:
    one, decode, other = three
    prompts = [words.prompt(length) for length in (1, 40, 129, 300, 511, 700, 900, 1300)]

    def split(index: int) -> list[int]:
        return read_tokens(hand_over.one_after_the_other((one, other)[index % 2], decode, prompts[index]))

    pulled = decode.engine.pulled_tokens
    answers = threads(split, range(len(prompts)))
    # vLLM counts none for the prompt of one token, which it computes again.
    assert decode.engine.pulled_tokens - pulled == sum(map(len, prompts[1:]))
    answers += [split(index) for index in range(len(prompts))]
    assert all(is_right(tokens, decode, prompt) for tokens, prompt in zip(answers, prompts * 2, strict=True))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("bf16-128", "bf16-128-b"), ("bf16-32", "bf16-128-b"), ("bf16-128", "bf16-32")],
)
def test_log_probabilities_are_those_of_the_prefill_server_to_the_bit(
    running: Any, hand_over: Any, words: Any, read_logprobs: Any, compare: Any, prefill: str, decode: str
) -> None:
    unequal = []
    for length in LENGTHS:
        prompt = words.prompt(length)
        split = hand_over.one_after_the_other(running[prefill], running[decode], prompt, logprobs=0)
        own = running[prefill].alone(prompt, logprobs=0)
        if read_logprobs(split) != read_logprobs(own):
            unequal.append(length)
            assert compare.apart(split, own) <= STEP_ROUNDING, length
    # The decode server attends block by block, so with other blocks it may round a step of its own otherwise.
    assert len(unequal) <= (0 if BLOCKS[prefill] == BLOCKS[decode] else UNEQUAL_LENGTHS_MAX), unequal


@pytest.mark.parametrize("is_decode_first", [False, True], ids=["prefill first", "decode first"])
def test_both_legs_may_start_at_once(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any, *, is_decode_first: bool
) -> None:
    _, decode, prefill = three
    pulled, failed = decode.engine.pulled_tokens, decode.failures()
    lengths = (1, 33, 500, 1425)
    for length in lengths:
        prompt = words.prompt(length)
        split = hand_over.both_at_once(prefill, decode, prompt, is_decode_first=is_decode_first)
        assert is_right(read_tokens(split), decode, prompt), length
    assert decode.failures() == failed
    assert decode.engine.pulled_tokens - pulled == sum(lengths[1:])


def test_only_what_the_decode_server_has_not_cached_is_moved(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any
) -> None:
    prefill, _, decode = three
    head = words.prompt(200)
    decode.complete(head, max_tokens=1)
    prompt = head + words.prompt(300)
    pulled = decode.engine.pulled_tokens
    split = hand_over.one_after_the_other(prefill, decode, prompt)
    # Six blocks of 32 tokens were there.
    assert decode.engine.pulled_tokens - pulled == 500 - 192
    assert is_right(read_tokens(split), decode, prompt)


def test_a_prefill_server_hands_over_what_it_has_cached(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any
) -> None:
    prefill, _, decode = three
    prompt = words.prompt(600)
    prefill.complete(prompt, max_tokens=1)
    split = hand_over.one_after_the_other(prefill, decode, prompt)
    assert is_right(read_tokens(split), decode, prompt)


def test_several_choices_are_served(three: Any, hand_over: Any, words: Any, is_right: Any) -> None:
    prefill, decode, _ = three
    prompt = words.prompt(300)
    ticket = hand_over.ticket(prefill, prompt)
    # With temperature 0 vLLM takes no more than one choice.
    answer = decode.complete(prompt, kv_transfer_params=ticket, n=2, temperature=1, top_k=1)
    assert len(answer["choices"]) == 2
    assert all(is_right(choice["token_ids"], decode, prompt) for choice in answer["choices"])


def test_many_at_once_leave_no_block_and_no_staging_behind(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, is_right: Any, threads: Any, wait: Any
) -> None:
    prefill, decode, other = three
    prompts = [words.prompt(100 + 60 * index) for index in range(12)]
    pairs = [(prefill, decode), (other, decode), (decode, other)]

    def split(index: int) -> list[int]:
        return read_tokens(hand_over.one_after_the_other(*pairs[index % 3], prompts[index]))

    answers = threads(split, range(len(prompts)))
    assert all(is_right(answers[i], pairs[i % 3][1], prompt) for i, prompt in enumerate(prompts))
    for server in (prefill, decode, other):
        wait(lambda server=server: server.used_blocks == 0, 60, "all blocks are free")
        server.complete("Refreshes what is told of staging.", max_tokens=1)
        wait(lambda server=server: server.staged_bytes == 0, 60, "all staging memory is free")
