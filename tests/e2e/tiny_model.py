"""Makes a small random Llama, the same from the same seed, so that the tests need no model hub.

Run with the engines' interpreter: `python tiny_model.py DIRECTORY [--seed N] [--adapter]`.

The tokenizer is byte-level without merges: one byte of prompt is one token, and token id b stands for
byte b. Greedy tokens of a random model repeat unless its weights are wide: a standard deviation of 0.08
makes them vary from step to step, so that a wrong KV cache shows in the first few tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_TOKENS_MAX = 8192
HIDDEN, LAYERS, KV_HEADS, HEAD_DIM = 256, 4, 4, 32
WEIGHT_STD = 0.08
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_characters() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes 0..255 as (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    next_stand_in = 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_stand_in))
            next_stand_in += 1
    return characters


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT_TOKENS_MAX,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int, vocabulary_size: int, end_id: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        initializer_range=WEIGHT_STD,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write_adapter(directory: Path, seed: int) -> None:
    """A LoRA adapter in PEFT's form, wide enough that it changes the first greedy tokens."""
    torch.manual_seed(seed)
    rank, weights = 8, {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", HIDDEN), ("v_proj", KV_HEADS * HEAD_DIM)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, HIDDEN) * 0.2
            weights[f"{at}.lora_B.weight"] = torch.randn(width, rank) * 0.2
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--adapter", action="store_true", help="write an adapter of the model instead")
    arguments = parser.parse_args()
    if arguments.adapter:
        write_adapter(arguments.directory, arguments.seed)
        return
    tokenizer = make_tokenizer()
    model = make_model(arguments.seed, len(tokenizer), tokenizer.convert_tokens_to_ids(END))
    tokenizer.save_pretrained(arguments.directory)
    model.save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
