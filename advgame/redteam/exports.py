"""What a run leaves for other tools: JailbreakBench's attack artifact, HarmBench's test cases and completions.

Both formats are written as their readers expect them; what is ours to add (notice, purpose) goes where they have
room for it. The classifier's labels are ours: another classifier can label the same completions anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advgame.game.tree import Seed
from advgame.redteam.measures import figures, first_success, submitted, succeeded
from advgame.redteam.records import NOTICE
from advgame.redteam.strategies import Attempt
from advgame.run.folder import write_text_atomically


@dataclass(frozen=True)
class About:
    """What the exports say of a run. `parameters` are strings and numbers."""

    purpose: str
    strategy: str
    attacker: str
    target: str
    classifier: str
    parameters: Mapping[str, str | int | float]


def jailbreakbench(about: About, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The artifact of JailbreakBench's `AttackArtifact`: parameters, and one entry a goal with its submitted attack.

    number_of_queries counts the target's answers; queries_to_jailbreak is null without a success. Token totals are of
    the target alone.
    """
    found = figures(attempts)
    answered = [c for a in attempts for c in a.candidates if c.response is not None]
    parameters = {
        "method": about.strategy,
        "model": about.target,
        "attack_type": "black_box",
        "defense": None,
        "attack_success_rate": found.asr.value if found.asr else 0.0,
        "total_number_of_jailbreaks": found.successes,
        "number_of_submitted_prompts": sum(submitted(a) is not None for a in attempts),
        "total_number_of_queries": found.queries,
        "total_prompt_tokens": _sum([c.prompt_tokens for c in answered]),
        "total_response_tokens": _sum([c.response_tokens for c in answered]),
        "evaluation_date": datetime.now(UTC).date().isoformat(),
        "evaluation_llm_provider": about.classifier,
        "method_parameters": {
            **about.parameters,
            "attacker": about.attacker,
            "notice": NOTICE,
            "purpose": about.purpose,
        },
    }
    return {"parameters": parameters, "jailbreaks": [_jailbreak(i, a) for i, a in enumerate(attempts)]}


def _jailbreak(place: int, attempt: Attempt) -> dict[str, Any]:
    best, meta = submitted(attempt), attempt.seed.meta
    answered = [c for c in attempt.candidates if c.response is not None]
    index = str(meta.get("Index", ""))
    return {
        "index": int(index) if index.isdigit() else place,
        "goal": attempt.seed.text,
        "behavior": behaviour_id(attempt.seed),
        "category": meta.get("Category") or meta.get("SemanticCategory") or meta.get("category") or "harmful",
        "prompt": None if best is None else best.prompt,
        "response": None if best is None else best.response,
        "number_of_queries": attempt.queries,
        "queries_to_jailbreak": first_success(attempt),
        "prompt_tokens": _sum([c.prompt_tokens for c in answered]),
        "response_tokens": _sum([c.response_tokens for c in answered]),
        "jailbroken": succeeded(attempt),
    }


def harmbench_test_cases(attempts: Sequence[Attempt]) -> dict[str, list[str]]:
    """`{BehaviorID: [test case]}`: the submitted attack of every behaviour that has one."""
    return {name: [case["test_case"] for case in cases] for name, cases in harmbench_completions(attempts).items()}


def harmbench_completions(attempts: Sequence[Attempt]) -> dict[str, list[dict[str, Any]]]:
    """`{BehaviorID: [{test_case, generation, label}]}`; label is 1, 0, or -1 where no verdict was given."""
    made: dict[str, list[dict[str, Any]]] = {}
    for attempt in attempts:
        best = submitted(attempt)
        if best is not None:
            label = -1 if best.label is None else int(best.label)
            case = {"test_case": best.prompt, "generation": best.response, "label": label}
            made.setdefault(behaviour_id(attempt.seed), []).append(case)  # two rows may share a behaviour
    return made


def behaviour_id(seed: Seed) -> str:
    """HarmBench's BehaviorID, JailbreakBench's Behavior, or the seed's own id."""
    return str(seed.meta.get("BehaviorID") or seed.meta.get("Behavior") or seed.id)


def write_exports(folder: Path, about: About, attempts: Sequence[Attempt]) -> list[Path]:
    """Writes the three files, each in one step; returns their paths."""
    made = {
        "jailbreakbench.json": jailbreakbench(about, attempts),
        "harmbench_test_cases.json": harmbench_test_cases(attempts),
        "harmbench_completions.json": harmbench_completions(attempts),
    }
    for name, content in made.items():
        write_text_atomically(folder / name, json.dumps(content, indent=1, ensure_ascii=True) + "\n")
    return [folder / name for name in made]


def _sum(values: Sequence[int | None]) -> int | None:
    """The sum, or None where some value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
