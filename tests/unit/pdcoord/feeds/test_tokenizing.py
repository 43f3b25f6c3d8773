"""A tokenizer.json in threads: its tokens, what is wrong with a file, what is queued."""

import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pdcoord.feeds.conversations import Ids
from pdcoord.feeds.tokenizing import TextTokenizer, TokenizerFileError, Workers


def save(folder: Path, *, special: str = "", truncates: bool = False) -> Path:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "Two", "words", "more"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=special, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if truncates:
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=8)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("special", "head", "tail"), [("", [], []), ("<s> $A", [1], []), ("<s> $A </s>", [1], [2])]
)
def test_special_tokens_are_put_around(
    tmp_path: Path, special: str, head: list[int], tail: list[int]
) -> None:
    tokenizer = TextTokenizer(save(tmp_path, special=special), 1 << 20)
    for _ in range(2):  # The second comes from what was kept.
        assert list(tokenizer.encode("more words", has_specials=True)) == [*head, 5, 4, *tail]
        assert list(tokenizer.encode("more words", has_specials=False)) == [5, 4]
    assert tokenizer.cache_bytes > 0


def test_the_file_neither_cuts_nor_fills_a_prompt(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(save(tmp_path, truncates=True), 1 << 20)
    assert list(tokenizer.encode("Two more words", has_specials=True)) == [3, 5, 4]


def test_a_template_that_takes_the_text_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerFileError, match="ask the engine"):
        TextTokenizer(save(tmp_path, special="$A <s> $A"), 1 << 20)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Other"}}'])
def test_what_is_no_tokenizer_is_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerFileError, match=r"no tokenizer\.json") as raised:
        TextTokenizer(path, 1 << 20)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerFileError, match="No such file"):
        TextTokenizer(tmp_path / "none.json", 1 << 20)


def test_half_a_surrogate_pair_is_a_unicode_error(tmp_path: Path) -> None:
    with pytest.raises(UnicodeError):
        TextTokenizer(save(tmp_path), 1 << 20).encode("\ud800", has_specials=True)


class Held:
    """Stands for a tokenizer that takes as long as the test says."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def encode(self, text: str, *, has_specials: bool) -> Ids:
        assert self.go.wait(30.0)
        return Ids("I", [len(text)])


def test_what_waits_is_bounded() -> None:
    workers, held = Workers(threads=1, queued_max=2), Held()
    first, second = (workers.submit(held, "x" * n, has_specials=True) for n in (1, 2))  # type: ignore[arg-type]
    assert workers.submit(held, "x", has_specials=True) is None  # type: ignore[arg-type]
    held.go.set()
    assert first is not None
    assert second is not None
    assert (list(first.result(30.0)), list(second.result(30.0))) == ([1], [2])
    third = workers.submit(held, "xxx", has_specials=True)  # type: ignore[arg-type]
    assert third is not None
    assert list(third.result(30.0)) == [3]
    workers.close()
