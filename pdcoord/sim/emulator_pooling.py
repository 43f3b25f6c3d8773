"""Calls without a decode: embeddings, rerank, score, render, tokenize, detokenize, in vLLM 0.32's forms."""

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

import xxhash

from pdcoord.protocol.openai import TOKEN_ID_MAX, Body, Call
from pdcoord.sim import text
from pdcoord.sim.emulator_call import bad_request, render
from pdcoord.sim.settings import EngineSettings

DIMENSIONS = 64


def pooling_prompts(call: Call) -> list[tuple[int, ...]]:
    """What the engine has to compute for a call: one prompt for each input or pair.

    Raises:
        CallError: 400.
    """
    body = call.body
    match call.api.path:
        case "/v1/embeddings":
            texts = _inputs(call)
        case "/v1/rerank":
            texts = [f"{_text(body, 'query')}\n{document}" for document in _texts(body, "documents")]
        case _:
            texts = [f"{query}\n{document}" for query, document in _pairs(body)]
    prompts = [tuple(each) if isinstance(each, list) else tuple(text.encode(each)) for each in texts]
    if not prompts or not all(prompts):
        raise bad_request("The input cannot be empty.", "input")
    return prompts


def pooling_answer(call: Call, prompts: list[tuple[int, ...]], answer_id: str, created: int) -> Body:
    """The body of the answer."""
    count = sum(map(len, prompts))
    usage: Body = {"prompt_tokens": count, "total_tokens": count}
    vectors = [_vector(prompt) for prompt in prompts]
    head: Body = {"created": created, "model": call.model}
    match call.api.path:
        case "/v1/embeddings":
            form = call.body.get("encoding_format")
            data = [
                {"object": "embedding", "index": i, "embedding": _embedding(vector, form)}
                for i, vector in enumerate(vectors)
            ]
            return {"id": f"embd-{answer_id}", "object": "list", **head, "data": data, "usage": usage}
        case "/v1/rerank":
            return {
                "id": f"rerank-{answer_id}",
                "model": call.model,
                "usage": usage,
                "results": _ranked(call.body, vectors),
            }
        case _:
            scores: list[Body] = [
                {"index": i, "object": "score", "score": _score(vector)} for i, vector in enumerate(vectors)
            ]
            return {"id": f"score-{answer_id}", "object": "list", **head, "data": scores, "usage": usage}


def tokenize(call: Call, settings: EngineSettings) -> Body:
    """The answer of /tokenize; tokens are spelled one character a byte, as byte-level vocabularies do.

    Raises:
        CallError: 400.
    """
    prompt = call.body.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise bad_request("'prompt' is not a string.", "prompt")
    ids = text.encode(render(call, is_deaf=settings.is_template_deaf) if prompt is None else prompt)
    strings = None
    if call.body.get("return_token_strs") is True:
        strings = [text.piece(each).decode("latin-1") for each in ids]
    counts = {"count": len(ids), "max_model_len": settings.context_tokens_max}
    return {**counts, "tokens": ids, "token_strs": strings}


def rendered(path: str, prompts: Sequence[Sequence[int]], request_id: str) -> Body | list[Body]:
    """The answer of /render behind a generating call's path: one request, or one for each prompt."""
    requests: list[Body] = [
        {"request_id": request_id, "token_ids": list(ids), "features": None, "sampling_params": {}}
        for ids in prompts
    ]
    return requests if path == "/v1/completions" else requests[0]


def detokenize(call: Call) -> Body:
    """The answer of /detokenize.

    Raises:
        CallError: 400.
    """
    ids = call.body.get("tokens")
    if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
        raise bad_request("'tokens' is not a list of token ids.", "tokens")
    try:
        return {"prompt": text.decode(ids)}
    except text.UnknownTokenError as error:
        raise bad_request(f"'tokens': {error}.", "tokens") from error


def _inputs(call: Call) -> list[Any]:
    if call.body.get("input") is None:
        return [render(call)]
    given = call.body["input"]
    items = given if isinstance(given, list) else [given]
    if items and isinstance(items[0], int):
        items = [items]
    for item in items:
        is_ids = isinstance(item, list) and all(
            isinstance(each, int) and 0 <= each <= TOKEN_ID_MAX for each in item
        )
        if not isinstance(item, str) and not is_ids:
            raise bad_request("'input' is not a string, token ids, or a list of either.", "input")
    return items


def _text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise bad_request(f"'{name}' is not a string.", name)
    return value


def _texts(body: Body, name: str) -> list[str]:
    value = body.get(name)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(each, str) for each in items):
        raise bad_request(f"'{name}' is not a string or a list of strings.", name)
    return items


_PAIR_NAMES = (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"))


def _pairs(body: Body) -> list[tuple[str, str]]:
    for first, second in _PAIR_NAMES:
        if body.get(first) is not None and body.get(second) is not None:
            ones, others = _texts(body, first), _texts(body, second)
            if len(ones) == 1:
                ones *= len(others)
            if len(ones) != len(others):
                raise bad_request(f"'{first}' and '{second}' have different lengths.", second)
            return list(zip(ones, others, strict=True))
    raise bad_request("'queries' and 'documents' are required for /v1/score.", "queries")


def _vector(prompt: tuple[int, ...]) -> list[float]:
    """A unit vector that depends on the prompt alone."""
    packed = struct.pack(f"<{len(prompt)}I", *prompt)
    raw = [xxhash.xxh3_64_intdigest(packed, seed=index) / 2**63 - 1.0 for index in range(DIMENSIONS)]
    length = math.sqrt(sum(each * each for each in raw)) or 1.0
    return [each / length for each in raw]


def _embedding(vector: list[float], form: Any) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector


def _score(vector: list[float]) -> float:
    return (vector[0] + 1.0) / 2.0


def _ranked(body: Body, vectors: list[list[float]]) -> list[Body]:
    documents = _texts(body, "documents")
    results: list[Body] = [
        {"index": i, "document": {"text": documents[i]}, "relevance_score": _score(vector)}
        for i, vector in enumerate(vectors)
    ]
    results.sort(key=lambda result: -float(result["relevance_score"]))
    top = body.get("top_n")
    return results[:top] if isinstance(top, int) and top > 0 else results
