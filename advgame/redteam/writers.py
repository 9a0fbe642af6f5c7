"""Who writes attacks: a language model in PAIR's JSON chat, or a player of the game in the game's own format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from advgame.game.parsing import parse_attack
from advgame.game.prompts import Templates
from advgame.game.tree import Seed
from advgame.redteam.prompts import fill, parse_proposal, proposal_message, system_prompt
from advgame.redteam.records import Ledger, Voice

Exchange = tuple[str, str]
"""What the attacker was told in a turn, and the assistant message that it answered with."""


@dataclass(frozen=True)
class Draft:
    """One attack: the prompt for the target, and what the attacker says it changed."""

    prompt: str
    improvement: str = ""


class AttackWriter(Protocol):
    """Writes the next attack of a stream. The strategies know nothing else of who attacks."""

    def opening(self, seed: Seed) -> str:
        """What the attacker is told in its first turn."""

    def feedback(self, seed: Seed, response: str, score: int) -> str:
        """What it is told after the target's answer and its rating."""

    def message(self, draft: Draft) -> str:
        """The assistant message that stands for a draft (anybody's) in the conversation."""

    async def write(
        self, seed: Seed, stream: int, turns: Sequence[Exchange], told: str, key: str, tries: int
    ) -> Draft | None:
        """An attack after the turns so far; None when none of `tries` attempts can be read. Raises Halt."""


class JsonWriter:
    """PAIR's and TAP's attacker: a chat with a system prompt by stream, answers as JSON {improvement, prompt}."""

    def __init__(self, ledger: Ledger, voice: Voice, counters: Counter[str]):
        self._ledger, self._voice, self._counters = ledger, voice, counters

    def opening(self, seed: Seed) -> str:
        return fill("opening", {"objective": seed.text})

    def feedback(self, seed: Seed, response: str, score: int) -> str:
        return fill("feedback", {"objective": seed.text, "response": response, "score": str(score)})

    def message(self, draft: Draft) -> str:
        return proposal_message(draft.improvement, draft.prompt)

    async def write(
        self, seed: Seed, stream: int, turns: Sequence[Exchange], told: str, key: str, tries: int
    ) -> Draft | None:
        chat = [("system", system_prompt(stream, seed.text))]
        for user, assistant in turns:
            chat += [("user", user), ("assistant", assistant)]
        chat.append(("user", told))
        for attempt in range(tries):
            answer = await self._ledger.ask(self._voice, f"{key}/try{attempt}", chat)
            if answer is None:
                return None  # the conversation is too long or filtered: another try would be so too
            proposal = parse_proposal(answer.text)
            if proposal is not None:
                return Draft(proposal.prompt, proposal.improvement)
            self._counters["attacks_unparsable"] += 1
        return None


class GameWriter:
    """A player of the game, trained or not: `<think>…</think><prompt>…</prompt>` from the seed alone.

    It has never seen a conversation, so every turn of PAIR or TAP is a fresh sample; what is left of the method is
    its search (streams, branches, pruning, stopping).
    """

    def __init__(self, ledger: Ledger, voice: Voice, templates: Templates, counters: Counter[str]):
        self._ledger, self._voice, self._templates, self._counters = ledger, voice, templates, counters

    def opening(self, seed: Seed) -> str:
        return ""

    def feedback(self, seed: Seed, response: str, score: int) -> str:
        return ""

    def message(self, draft: Draft) -> str:
        return draft.prompt

    async def write(
        self, seed: Seed, stream: int, turns: Sequence[Exchange], told: str, key: str, tries: int
    ) -> Draft | None:
        chat = [("user", self._templates.attacker(seed))]
        for attempt in range(tries):
            answer = await self._ledger.ask(self._voice, f"{key}/try{attempt}", chat)
            if answer is None:
                return None
            if answer.finish_reason == "stop":
                prompt = parse_attack(answer.text, reasoning=self._templates.reasoning)
                if prompt is not None:
                    return Draft(prompt)
            self._counters["attacks_unparsable"] += 1
        return None
