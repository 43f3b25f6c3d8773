"""Which faults of KV a canary of the tiny model sees, by tolerance: a model of the engines, not the engines.

Run with the engines' interpreter and the repository in PYTHONPATH: `python tests/e2e/kv_faults.py
[--prompts 30]`. A prompt of a canary is prefilled, the KV is made wrong, and tokens are decoded from it as
a split request's are; the answer is judged beside one out of right KV, by the coordinator's own rule. It
prints the table of docs/canary.md. Nothing is split here and no block is of an engine's; what is measured is
how far wrong numbers move a small model's logprobs.
"""

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from tiny_model import make_model, make_tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from pdcoord.core.likeness import Finding, GreedyAnswer, compare
from pdcoord.feeds.canary import TOP_LOGPROBS, canary_prompt

PROMPT_BYTES = 400
OUTPUT_TOKENS = 16
TOLERANCES = (0.1, 0.25, 0.5, 1.0)
SEED = 2
BLOCK = 16

Kv = torch.Tensor
"""Of one layer: 1, KV heads, tokens, head dimension."""


def each_layer(change: Callable[[Kv], Kv]) -> Callable[[DynamicCache], None]:
    def apply(cache: DynamicCache) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return apply


def rounded_to(dtype: torch.dtype) -> Callable[[DynamicCache], None]:
    return each_layer(lambda kv: kv.to(dtype).to(kv.dtype))


def second_block_twice(kv: Kv) -> Kv:
    """Exchanged blocks would be no fault: keys hold their places, so the order of tokens does not count."""
    return torch.cat([kv[:, :, BLOCK : 2 * BLOCK], kv[:, :, BLOCK:]], dim=2)


def values_one_token_further(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.values = layer.values.roll(1, dims=2)


def without(kv: Kv, first: int, count: int) -> Kv:
    changed = kv.clone()
    changed[:, :, first : first + count] = 0.0
    return changed


def keys_paired_otherwise(cache: DynamicCache) -> None:
    """Halves where the decode engine reads pairs of neighbours."""
    for layer in cache.layers:
        layer.keys = layer.keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def one_layer_missing(cache: DynamicCache) -> None:
    cache.layers[-1].keys, cache.layers[-1].values = (
        torch.zeros_like(cache.layers[-1].keys),
        torch.zeros_like(cache.layers[-1].values),
    )


def keys_and_values_exchanged(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.values, layer.keys


FAULTS: dict[str, Callable[[DynamicCache], None]] = {
    "none: rounded to fp16": rounded_to(torch.float16),
    "none: rounded to fp8 (e4m3)": rounded_to(torch.float8_e4m3fn),
    "none: rounded to fp8 (e5m2)": rounded_to(torch.float8_e5m2),
    "KV heads in another order": each_layer(lambda kv: kv.roll(1, dims=1)),
    "keys and values exchanged": keys_and_values_exchanged,
    "keys in pairs, read as halves": keys_paired_otherwise,
    "last of 4 layers zero": one_layer_missing,
    "values one token further than keys": values_one_token_further,
    "second block of 16 in place of the first": each_layer(second_block_twice),
    "half of all tokens zero": each_layer(lambda kv: without(kv, 0, kv.shape[2] // 2)),
    "first block of 16 zero": each_layer(lambda kv: without(kv, 0, BLOCK)),
    "last 16 tokens zero": each_layer(lambda kv: without(kv, kv.shape[2] - BLOCK, BLOCK)),
    "one token in the middle zero": each_layer(lambda kv: without(kv, kv.shape[2] // 2, 1)),
}


def noisy(model: LlamaForCausalLM, share: float) -> LlamaForCausalLM:
    """Another checkpoint: each weight is off by a share of its matrix's standard deviation."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in other.parameters():
            if weights.dim() > 1:
                noise = torch.randn(weights.shape, generator=generator)
                weights.add_((share * weights.float().std() * noise).to(weights.dtype))
    return other


@torch.inference_mode()
def prefilled(model: LlamaForCausalLM, tokens: list[int]) -> DynamicCache:
    """KV of all but the last token, which the decode engine computes itself."""
    cache = DynamicCache()
    model(torch.tensor([tokens[:-1]]), past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
def decoded(model: LlamaForCausalLM, last: int, cache: DynamicCache) -> GreedyAnswer:
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    for _ in range(OUTPUT_TOKENS):
        told = model(torch.tensor([[last]]), past_key_values=cache, use_cache=True)
        likely = told.logits[0, -1].float().log_softmax(-1).topk(TOP_LOGPROBS)
        tops.append({str(int(at)): float(by) for by, at in zip(*likely, strict=True)})
        last = int(likely.indices[0])
        tokens.append(last)
        logprobs.append(float(likely.values[0]))
    return GreedyAnswer(tuple(tokens), tuple(map(str, tokens)), tuple(logprobs), tuple(tops))


def judged(alone: GreedyAnswer, split: GreedyAnswer) -> list[Finding]:
    return [compare(alone, split, tolerance) for tolerance in TOLERANCES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=30)
    count = parser.parse_args().prompts
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model = make_model(SEED, len(tokenizer), end)
    producers = {f"weights off by {share:.0%}": noisy(model, share) for share in (0.01, 0.03, 0.1)}
    producers["other weights"] = make_model(SEED + 1, len(tokenizer), end)
    rows: dict[str, list[list[Finding]]] = {name: [] for name in [*FAULTS, *producers]}
    for number in range(count):
        tokens = tokenizer.encode(canary_prompt(f"{number:016x}", PROMPT_BYTES))
        right = prefilled(model, tokens)
        alone = decoded(model, tokens[-1], copy.deepcopy(right))
        caches = {name: copy.deepcopy(right) for name in FAULTS}
        for name, cache in caches.items():
            FAULTS[name](cache)
        caches |= {name: prefilled(producer, tokens) for name, producer in producers.items()}
        for name, cache in caches.items():
            split = decoded(model, tokens[-1], cache)
            rows[name].append(judged(alone, split))
    heads = " | ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
    lines = [f"| KV | {heads} |", "|---" * (1 + len(TOLERANCES)) + "|"]
    for name, found in rows.items():
        failed = [sum(each[index].outcome.is_failure for each in found) for index in range(len(TOLERANCES))]
        lines.append(f"| {name} | {' | '.join(map(str, failed))} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
