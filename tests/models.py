"""Randomly initialised tiny models with a word-level tokenizer and a chat template, in Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

WORDS = ["how", "do", "i", "kill", "a", "python", "process", "old", "neighbor", "sorry", "use", "the", "tool", "now"]
TAGS = ["<think>", "</think>", "<prompt>", "</prompt>"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ("qwen2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text")


def tokenizer() -> PreTrainedTokenizerBase:
    special = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *TAGS, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    fast.chat_template = CHAT
    return fast


def model(
    family: str = "qwen2", *, tied: bool = True, seed: int = 0, hidden: int = 32, vocab: int = 32
) -> PreTrainedModel:
    sizes = dict(  # noqa: C408
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    if family in ("qwen3", "gemma2", "gemma3_text"):
        sizes["head_dim"] = hidden // 4
    if family == "gpt_oss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": hidden // 4}
    if family == "qwen3_next":  # every other layer has linear attention
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 32, "head_dim": hidden // 4,
                  "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    if family in ("mistral", "gemma2", "gemma3_text"):
        sizes["sliding_window"] = 6  # shorter than the test's sequences
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # the library's own 0.02 makes attention invisible
    return made


def folder(path: Path, family: str = "qwen2", **kwargs: object) -> Path:
    model(family, **kwargs).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def bpe_folder(path: Path, family: str, *, vocab: int = 400, hidden: int = 32) -> Path:
    """A random model whose byte-level tokenizer reads any text, in a ChatML-like format."""
    raw = Tokenizer(BPE(unk_token=None))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    special = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>"]
    trainer = BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([" ".join(WORDS + TAGS)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model(family, vocab=vocab, hidden=hidden).save_pretrained(path)
    fast.save_pretrained(path)
    return path
