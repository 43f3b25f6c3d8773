"""Tokens of a text that begins as a known one, against those of the whole text; bounds of what is kept."""

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pdcoord.feeds.conversations import (
    CHUNK_CHARS,
    Conversations,
    Encoded,
    Encoding,
    Mark,
    encode_end,
    encode_whole,
    keys_of,
)

ALPHABET = "abcdefgh  \n\tßé世😀"


def words(rng: random.Random, count: int) -> str:
    made = ("".join(rng.choices(ALPHABET, k=rng.randint(1, 9))) for _ in range(count))
    return " ".join(made)


def trained(model: str) -> Tokenizer:
    """A small tokenizer of either kind: merges inside words, or the likeliest cut of the whole text."""
    corpus = [words(random.Random(seed), 400) for seed in range(20)]
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


TOKENIZERS = {kind: trained(kind) for kind in ("bpe", "unigram")}


def encoder(kind: str) -> "Counting":
    return Counting(TOKENIZERS[kind])


class Counting:
    """Encodes, and counts the characters that it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chars = 0

    def __call__(self, text: str) -> Encoding:
        self.chars += len(text)
        encoding: Encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.integers(3_000, 20_000), added=st.integers(0, 9_000))
def test_tokens_are_those_of_the_whole_text_wherever_it_parts(
    kind: str, seed: int, kept: int, added: int
) -> None:
    rng, encode = random.Random(seed), encoder(kind)
    old = words(rng, 4_000)
    new = old[:kept] + words(rng, 1 + added // 6)[:added]
    known = encode_whole(encode, old, keys_of(old)[1])
    keys = keys_of(new)[1]
    common = sum(one == other for one, other in zip(known.keys, keys, strict=False))
    encode.chars = 0
    found = encode_end(encode, new, keys, known, common) if common else None
    if common >= 3:
        assert found is not None
        assert encode.chars <= len(new) - (common - 2) * CHUNK_CHARS + CHUNK_CHARS
    if found is None:
        found = encode_whole(encode, new, keys)
    assert list(found.ids) == TOKENIZERS[kind].encode(new, add_special_tokens=False).ids
    # What was found this way serves the next text as well.
    longer = new + words(rng, 300)
    again = encode_end(encode, longer, keys_of(longer)[1], found, len(keys)) if len(keys) > 2 else None
    if again is not None:
        assert list(again.ids) == TOKENIZERS[kind].encode(longer, add_special_tokens=False).ids


def test_a_beginning_that_comes_out_otherwise_is_not_relied_on() -> None:
    encode = encoder("bpe")
    text = words(random.Random(1), 4_000)
    keys = keys_of(text)[1]
    known = encode_whole(encode, text, keys)
    shifted = Encoded(array("I", (each ^ 1 for each in known.ids)), known.keys, known.marks)
    assert encode_end(encode, text, keys, shifted, len(keys)) is None


def test_a_short_common_beginning_is_not_worth_it() -> None:
    encode = encoder("bpe")
    text = words(random.Random(1), 4_000)
    keys = keys_of(text)[1]
    assert encode_end(encode, text, keys, encode_whole(encode, text, keys), 1) is None


def test_keys_are_of_everything_before() -> None:
    text = "a" * (2 * CHUNK_CHARS)
    whole, keys = keys_of(text)
    other, others = keys_of("b" + text[1:])
    assert len(keys) == 2
    assert not set(keys) & set(others)
    assert whole not in {other, *keys}
    assert keys_of(text + "c")[1] == keys
    with pytest.raises(UnicodeError):
        keys_of("\ud800")


def encoded(name: int, tokens: int, chunks: int = 1) -> Encoded:
    return Encoded(array("I", range(tokens)), tuple(range(100 * name, 100 * name + chunks)), (Mark(1, 1),))


def test_the_longest_unused_goes_first() -> None:
    one, two, three = encoded(1, 100), encoded(2, 100), encoded(3, 100)
    kept = Conversations(one.size_bytes * 2)
    for key, each in ((1, one), (2, two)):
        kept.keep(key, each)
    assert kept.get(1) is one
    kept.keep(3, three)
    kept.validate()
    assert (kept.get(2), kept.get(1), kept.get(3)) == (None, one, three)
    assert kept.nearest((200,)) is None
    assert kept.nearest((100, 999)) == (one, 1)


def test_the_longest_common_beginning_is_found() -> None:
    kept = Conversations(1 << 20)
    kept.keep(1, encoded(1, 10, chunks=3))
    kept.keep(2, Encoded(array("I", [1]), (100, 101, 555), ()))
    assert kept.nearest((100, 101, 102)) == (kept.get(1), 3)
    assert kept.nearest((100, 101, 777)) == (kept.get(2), 2)
    kept.validate()


def test_what_is_too_large_is_not_kept() -> None:
    kept = Conversations(encoded(1, 100).size_bytes - 1)
    kept.keep(1, encoded(1, 100))
    assert (kept.get(1), kept.used_bytes) == (None, 0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 400), st.integers(0, 4)), max_size=60))
def test_the_bound_holds(steps: list[tuple[int, int, int]]) -> None:
    kept = Conversations(6_000)
    for name, tokens, chunks in steps:
        kept.keep(name, encoded(name % 5, tokens, chunks))
        kept.nearest(tuple(range(100 * (name % 5), 100 * (name % 5) + 4)))
        kept.validate()
