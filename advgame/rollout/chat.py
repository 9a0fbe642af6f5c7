"""A Hugging Face tokenizer as a chat format, and the checks of a model folder that need no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from advgame.errors import InputError

PROMPT_TOKENS_KEPT = 1 << 19
"""Some 20 MB."""


class ChatFormat:
    """Turns in the tokenizer's own chat template.

    A user's text cannot leave its turn: where it spells a special token (an attack that writes `<|im_end|>`), a
    space breaks the spelling, so that it is encoded as ordinary text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        spellings = {token for token in added | set(tokenizer.all_special_tokens) if len(token) > 1}
        self._special = tuple(sorted(spellings, key=lambda token: (-len(token), token)))
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._kept = 0

    def prompt_ids(self, user: str) -> tuple[int, ...]:
        """Of one user turn. They are kept for a while, since a game asks the same prompt several times."""
        found = self._prompts.get(user)
        if found is None:
            found = self.conversation_ids([("user", user)])
            self._kept += len(found)
            if self._kept > PROMPT_TOKENS_KEPT:
                self._prompts, self._kept = {}, len(found)
            self._prompts[user] = found
        return found

    def conversation_ids(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Turns as (role, text), the roles being system, user and assistant, and the opening of the next answer.

        Where the template knows no system role, that text goes to the head of the turn after it.
        """
        if turns[0][0] == "system" and not self._knows_system:
            (_, system), (role, text), *rest = turns
            turns = [(role, f"{system}\n\n{text}"), *rest]
        return self._ids(turns)

    @cached_property
    def _knows_system(self) -> bool:
        try:
            self._ids([("system", "a"), ("user", "b")])
        except Exception:  # a template is a program of its folder's, and refuses in its own way
            return False
        return True

    def _ids(self, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        messages = [{"role": role, "content": self._defused(text)} for role, text in turns]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template writes the special tokens itself
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _defused(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def text(self, token_ids: Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def load_tokenizer(folder: Path, field: str, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises InputError naming `field` and the folder if the folder, its config.json, its tokenizer or the chat
    template is missing, or if the tokenizer knows more ids than the model has rows.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{field}: {folder} has no config.json; give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except (ValueError, OSError) as error:
        raise InputError(f"{field}: {folder}/config.json does not load: {_why(error)}") from error
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"{field}: {folder} has no tokenizer; save one there with tokenizer.save_pretrained")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, trust_remote_code=remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{field}: the tokenizer in {folder} does not load: {_why(error)}") from error
    if not tokenizer.chat_template:
        raise InputError(f"{field}: the tokenizer in {folder} has no chat template; add chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field}: the tokenizer in {folder} has no eos_token, so no completion could ever end")
    try:
        ChatFormat(tokenizer).prompt_ids("hello")
    except Exception as error:  # a template is a program of its folder's; whatever it raises is its failure
        raise InputError(f"{field}: the chat template in {folder} does not render: {first_line(error)}") from error
    rows = config.get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"{field}: vocabulary mismatch in {folder}: the tokenizer has ids up to {highest}, the model "
            f"{rows} rows; use the tokenizer the model was made with"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, but a generic tokenizer.json is read as it is.

    For some model types (Qwen2 among them) AutoTokenizer puts the family's own class, its pre-tokenizer included, in
    the place of a generic one, which then encodes other tokens than the folder says.
    """
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError):
        named = None
    generic = named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file()
    return PreTrainedTokenizerFast if generic else AutoTokenizer


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's closing token and those of the folder's generation_config.json, if any."""
    ids = [cast(int, tokenizer.eos_token_id)]
    if (folder / "generation_config.json").is_file():
        extra = GenerationConfig.from_pretrained(folder).eos_token_id
        ids += [extra] if isinstance(extra, int) else list(extra or [])
    return tuple(dict.fromkeys(ids))


def _why(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own; set trust_remote_code to run that, if you have read it"
    return first_line(error)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
