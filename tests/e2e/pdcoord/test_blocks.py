"""bf16 servers with blocks of 32 and 128 tokens: the decode server's own tokens, whoever prefilled."""

from typing import Any

import pytest

pytestmark = pytest.mark.e2e

NAMES = ("bf16-128", "bf16-128-b", "bf16-32")
SURE_TOKENS = 4


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
    three: Any, hand_over: Any, words: Any, read_tokens: Any, threads: Any
) -> None:
    one, decode, other = three
    prompts = [words.prompt(length) for length in (1, 40, 129, 300, 511, 700, 900, 1300)]

    def split(index: int) -> list[int]:
        return read_tokens(hand_over.one_after_the_other((one, other)[index % 2], decode, prompts[index]))

    pulled = decode.engine.pulled_tokens
    answers = threads(split, range(len(prompts)))
    # vLLM counts none for the prompt of one token, which it computes again.
    assert decode.engine.pulled_tokens - pulled == sum(map(len, prompts[1:]))
    # The batch that a request happens to be in decides how bf16 rounds, and late tokens can differ by it.
    alone = [read_tokens(decode.alone(prompt)) for prompt in prompts]
    assert [answer[:SURE_TOKENS] for answer in answers] == [tokens[:SURE_TOKENS] for tokens in alone]
    assert [split(index) for index in range(len(prompts))] == alone


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("bf16-128", "bf16-128-b"), ("bf16-32", "bf16-128-b"), ("bf16-128", "bf16-32")],
)
def test_log_probabilities_are_those_of_the_prefill_server_to_the_bit(
    running: Any, hand_over: Any, words: Any, read_logprobs: Any, prefill: str, decode: str
) -> None:
    for length in (1, 31, 129, 512, 513, 1300):
        prompt = words.prompt(length)
        split = hand_over.one_after_the_other(running[prefill], running[decode], prompt, logprobs=0)
        assert read_logprobs(split) == read_logprobs(running[prefill].alone(prompt, logprobs=0)), length


@pytest.mark.parametrize("is_decode_first", [False, True], ids=["prefill first", "decode first"])
def test_both_legs_may_start_at_once(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, *, is_decode_first: bool
) -> None:
    _, decode, prefill = three
    pulled, failed = decode.engine.pulled_tokens, decode.failures()
    lengths = (1, 33, 500, 1425)
    for length in lengths:
        prompt = words.prompt(length)
        split = hand_over.both_at_once(prefill, decode, prompt, is_decode_first=is_decode_first)
        assert read_tokens(split) == read_tokens(decode.alone(prompt)), length
    assert decode.failures() == failed
    assert decode.engine.pulled_tokens - pulled == sum(lengths[1:])


def test_only_what_the_decode_server_has_not_cached_is_moved(
    three: Any, hand_over: Any, words: Any, read_tokens: Any
) -> None:
    prefill, _, decode = three
    head = words.prompt(200)
    decode.complete(head, max_tokens=1)
    prompt = head + words.prompt(300)
    pulled = decode.engine.pulled_tokens
    split = hand_over.one_after_the_other(prefill, decode, prompt)
    # Six blocks of 32 tokens were there.
    assert decode.engine.pulled_tokens - pulled == 500 - 192
    assert read_tokens(split) == read_tokens(decode.alone(prompt))


def test_a_prefill_server_hands_over_what_it_has_cached(
    three: Any, hand_over: Any, words: Any, read_tokens: Any
) -> None:
    prefill, _, decode = three
    prompt = words.prompt(600)
    prefill.complete(prompt, max_tokens=1)
    split = hand_over.one_after_the_other(prefill, decode, prompt)
    assert read_tokens(split) == read_tokens(decode.alone(prompt))


def test_several_choices_are_served(three: Any, hand_over: Any, words: Any, read_tokens: Any) -> None:
    prefill, decode, _ = three
    prompt = words.prompt(300)
    ticket = hand_over.ticket(prefill, prompt)
    # With temperature 0 vLLM takes no more than one choice.
    answer = decode.complete(prompt, kv_transfer_params=ticket, n=2, temperature=1, top_k=1)
    own = read_tokens(decode.alone(prompt))
    assert [choice["token_ids"] for choice in answer["choices"]] == [own, own]


def test_many_at_once_leave_no_block_and_no_staging_behind(
    three: Any, hand_over: Any, words: Any, read_tokens: Any, threads: Any, wait: Any
) -> None:
    prefill, decode, other = three
    prompts = [words.prompt(100 + 60 * index) for index in range(12)]
    pairs = [(prefill, decode), (other, decode), (decode, other)]

    def split(index: int) -> list[int]:
        return read_tokens(hand_over.one_after_the_other(*pairs[index % 3], prompts[index]))

    answers = threads(split, range(len(prompts)))
    assert answers == [read_tokens(pairs[i % 3][1].alone(prompt)) for i, prompt in enumerate(prompts)]
    for server in (prefill, decode, other):
        wait(lambda server=server: server.used_blocks == 0, 10, "all blocks are free")
        server.complete("Refreshes what is told of staging.", max_tokens=1)
        wait(lambda server=server: server.staged_bytes == 0, 10, "all staging memory is free")
