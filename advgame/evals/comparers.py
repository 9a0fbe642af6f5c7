"""Judges that compare two answers: by five verdicts, or by the game's own scores; and the play of both orders."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from advgame.errors import InputError
from advgame.evals.formats import fill, template_text
from advgame.evals.generate import Strikes, Tick, pool
from advgame.evals.metrics import Result
from advgame.evals.models import EngineSettings, Opened, open_model
from advgame.evals.named import ModelSpec, parse_model
from advgame.evals.pairwise import GAMES, Compared, Game, Question, arena_score, length_controlled, win_rate
from advgame.evals.stats import micro
from advgame.evals.store import Store, digest
from advgame.game.judge import Judge, Key
from advgame.game.llm_judge import LLMJudge
from advgame.game.parsing import after_reasoning
from advgame.game.phrase_judge import PhraseJudge
from advgame.game.prompts import Templates
from advgame.game.tree import Rubric, Sample
from advgame.rollout.engine import Sampling
from advgame.rollout.speaker import Asks
from advgame.world.judge import RuleJudge

FAR = 4.0
"""Points (of ten) between two scores from which the better answer is far better."""

_VERDICT = re.compile(r"\[\[([AB][<>=]{1,2}[AB])\]\]")


class Failed(Exception):
    """The judge could not be asked."""


class Comparer(Protocol):
    """Compares answers A and B. None: its answer held no verdict. Raises Failed when it could not be asked."""

    async def compare(self, prompt: str, a: str, b: str, *, key: Key) -> Game | None: ...


@dataclass(frozen=True)
class ScoreComparer:
    """A judge of the game (0 to 10 for each answer, by a rubric) as a comparer; `FAR` points apart is far better."""

    judge: Judge
    rubric: Rubric = Rubric.COMPLIANCE

    async def compare(self, prompt: str, a: str, b: str, *, key: Key) -> Game | None:
        scores = await self.judge.compare(self.rubric, prompt, a, b, key=key)
        if scores is None:
            return None
        difference = scores[0] - scores[1]
        sign = (difference > 0) - (difference < 0)
        return 2 * sign if abs(difference) >= FAR else sign


@dataclass(frozen=True)
class VerdictComparer:
    """A model that ends with one of five verdicts, `[[A>>B]]` to `[[B>>A]]`; the last one in its answer counts."""

    speaker: RaisingSpeaker
    template: str

    async def compare(self, prompt: str, a: str, b: str, *, key: Key) -> Game | None:
        text = fill(self.template, {"prompt": prompt, "answer_a": a, "answer_b": b})
        _, answer = await self.speaker.ask(text, key)
        found = _VERDICT.findall(answer)
        return GAMES.get(found[-1]) if found else None


@dataclass
class RaisingSpeaker:
    """A speaker whose failures raise Failed, so that a judge of the game cannot take them for a missing verdict."""

    speaker: Asks
    counters: Counter[str]

    async def ask(
        self, user: str, key: Key, sampling: Sampling | None = None, stop: tuple[str, ...] = ()
    ) -> tuple[Sample | None, str]:
        sample, text = await self.speaker.ask(user, key, sampling, stop)
        if sample is None:
            raise Failed(getattr(self.speaker, "last_error", "") or "the judge gave no answer")
        return sample, text


JUDGES = "rule (the tiny world's, also rule?noise=2&bias=1), phrases, score@MODEL or compare@MODEL"


@dataclass
class OpenJudge:
    """A judge that is ready. `judge` is the game's own, where it scores."""

    title: str
    identity: str
    comparer: Comparer
    judge: Judge | None
    width: int = 64
    model: Opened | None = None

    async def close(self) -> None:
        if self.model is not None:
            await self.model.close()


def check_judge(text: str, field: str) -> tuple[str, ModelSpec | None, dict[str, float]]:
    """(kind, model, options) of a judge's name. Raises InputError naming `field`; loads nothing."""
    kind, at, model = text.partition("@")
    if kind in ("score", "compare") and at:
        return kind, parse_model(model, field, "judge"), {}
    name, mark, rest = text.partition("?")
    options: dict[str, float] = {}
    if name == "rule" and mark:
        for pair in rest.split("&"):
            key, _, value = pair.partition("=")
            try:
                options[key] = float(value)
            except ValueError:
                options = {"?": 0.0}
    if name not in ("rule", "phrases") or set(options) - {"noise", "bias"} or (mark and name != "rule"):
        raise InputError(f"{field}: no judge {text!r}; write {JUDGES}")
    return name, None, options


async def open_judge(
    text: str,
    field: str,
    engine: EngineSettings,
    *,
    seed: int,
    counters: Counter[str],
    max_tokens: int = 1024,
    temperature: float = 0.0,
    rubric: Rubric = Rubric.COMPLIANCE,
) -> OpenJudge:
    """Opens a judge by name; see `JUDGES`. Raises InputError or EngineError with one line."""
    kind, spec, options = check_judge(text, field)
    if spec is None:
        rule = RuleJudge(options.get("noise", 0.0), options.get("bias", 0.0), seed)
        judge: Judge = rule if kind == "rule" else PhraseJudge()
        return OpenJudge(text, text, ScoreComparer(judge, rubric), judge)
    sampling = Sampling(temperature, 1.0, max_tokens)
    opened = await open_model(spec, sampling, engine, name="judge", seed=seed, counters=counters)
    title, identity = f"{kind}@{spec.name}", str(digest(kind, spec.identity(), sampling, seed, rubric))
    speaker = RaisingSpeaker(opened.speaker, counters)
    if kind == "score":
        scorer = LLMJudge(speaker, Templates.load())
        return OpenJudge(title, identity, ScoreComparer(scorer, rubric), scorer, opened.width, opened)
    template = template_text("compare", None, ("prompt", "answer_a", "answer_b"))
    return OpenJudge(title, identity, VerdictComparer(speaker, template), None, opened.width, opened)


async def both_orders(
    comparer: Comparer, prompt: str, baseline: str, answer: str, key: Key
) -> tuple[Game | None, Game | None]:
    """The games of an answer against the baseline's: (baseline first, answer first), from the answer's side."""
    first, second = await asyncio.gather(
        comparer.compare(prompt, baseline, answer, key=(*key, 0)),
        comparer.compare(prompt, answer, baseline, key=(*key, 1)),
    )
    return None if first is None else -first, second


async def play_games(
    questions: Callable[[], Iterator[Question]],
    answers: Store,
    games: Store,
    judge: OpenJudge,
    tick: Tick,
    strikes: Strikes | None = None,
) -> Counter[str]:
    """Fills `games` for every question whose answer is stored. Raises EngineError when the judge's server is down."""
    texts = {line["id"]: line for line in answers.lines()}
    said = {name: after_reasoning(line["response"] or "") for name, line in texts.items()}
    listed = [question for question in questions() if question.row.id in texts]

    def request(question: Question) -> int:
        return digest(question.row.prompt, question.baseline, said[question.row.id], judge.identity)

    requests = {question.row.id: request(question) for question in listed}
    done, dropped = games.open(requests.get)
    counts = Counter({"rows": len(listed), "kept": len(done), "dropped": dropped})
    guard = strikes or Strikes(None, "comparisons")

    async def one(question: Question) -> None:
        name, asked = question.row.id, question.row.prompt
        error: str | None = None
        pair: tuple[Game | None, Game | None] = (None, None)
        answer = texts[name]
        if answer.get("error") is not None:
            error = f"completion failed: {answer['error']}"
        else:
            try:
                key = (digest(name),)
                pair = await both_orders(judge.comparer, asked, question.baseline, said[name], key)
            except Failed as failure:
                error = str(failure)
            guard.hit(error)
        line = {"id": name, "request": requests[name], "games": list(pair), "length": len(said[name])}
        difficulty = {} if question.difficulty != question.difficulty else {"difficulty": question.difficulty}
        games.add(line | {"baseline_length": len(question.baseline), "error": error} | difficulty)
        counts["failed" if error else "made"] += 1
        tick(len(done) + counts["failed"] + counts["made"], len(listed))

    try:
        await pool((q for q in listed if digest(q.row.id) not in done), one, judge.width)
    finally:
        games.close()
    return counts


def game_results(games: Store, kind: str, name: str, judge: str, seed: int) -> list[Result]:
    """Win rates of the stored games, in the set's convention."""
    failed, compared = 0, []
    for line in games.lines():
        if line["error"] is not None:
            failed += 1
            continue
        first, second = line["games"]
        difficulty = line.get("difficulty", float("nan"))
        compared.append(Compared((first, second), line["length"], line["baseline_length"], difficulty))
    unparsed = sum(one.games.count(None) for one in compared)
    swaps = [float(one.swapped) for one in compared if one.swapped is not None]

    def result(metric: str, says: str, policy: str, estimate: object, better: str = "higher") -> Result:
        return Result(
            name, metric, "utility", better, says, policy, judge, estimate, failed, unparsed,  # type: ignore[arg-type]
        )  # fmt: skip

    left = "game without a verdict: left out"
    if kind == "arena-hard":
        rate = result(
            "win_rate", "Arena-Hard: two games, >> counts 3, interval 5/95 of 100 bootstraps",
            "a question with a game missing is left out", arena_score(compared, seed),
        )  # fmt: skip
        listed = [rate]
    else:
        says = "logistic regression on tanh of the length difference, at difference 0 (see docs/evaluation.md)"
        listed = [
            result(
                "win_rate", "AlpacaEval: mean preference over both orders, ties 1/2", left, win_rate(compared, seed)
            ),
            result("length_controlled", says, left, length_controlled(compared, seed)),
        ]
    swap = result("swap_disagreement", "share of questions whose orders name different winners", left, micro(swaps),
                  "lower")  # fmt: skip
    return [*listed, swap]
