"""The world's tokenizer: one token a word, in Hugging Face's fast format, with a chat template.

Decoding joins words by single spaces, so texts of the world's words survive a round trip exactly. The tags
are ordinary tokens: `decode(..., skip_special_tokens=True)` keeps them, as the parser of attacks needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from advgame.world.grammar import words

PAD, UNKNOWN, END, USER, ASSISTANT = "<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"
THINK, END_THINK, PROMPT, END_PROMPT = "<think>", "</think>", "<prompt>", "</prompt>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this chat has user and assistant turns only') }}{% endif %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Token to id: special tokens, tags, then the world's words in alphabetical order (256 in all)."""
    tokens = [PAD, UNKNOWN, END, USER, ASSISTANT, THINK, END_THINK, PROMPT, END_PROMPT, *words()]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(more: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer; `eos_token` ends every turn, words outside the world become `unk_token`.

    `more` words, where the world does not know them, get the ids after the world's own.
    """
    known = vocabulary()
    for word in more:
        known.setdefault(word, len(known))
    core = Tokenizer(WordLevel(known, unk_token=UNKNOWN))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat(user: str) -> str:
    """The text that `CHAT_TEMPLATE` makes of one user turn, up to where the answer begins."""
    return f"{USER} {user} {END} {ASSISTANT}"
