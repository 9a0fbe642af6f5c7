"""How far a language-model judge agrees with the tiny world's rule: when examined, and in the game as it is played."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence

from advgame.game.judge import Key
from advgame.game.llm_judge import LLMJudge
from advgame.game.play import PlayRules
from advgame.game.tree import PairScore, Rubric, Tree, attacker_rubric, defender_rubric
from advgame.world.judge_recipes import Question, draw_question

Verdict = tuple[float, ...] | bool | None


async def examine(judge: LLMJudge, key: Key, count: int = 800) -> dict[str, float]:
    """`agreement` on `count` questions whose queries the world's judge was never taught on; always the same ones."""
    rng = random.Random("examination")
    questions = [draw_question(rng, reserved=True) for _ in range(count)]
    verdicts = await asyncio.gather(*(question.ask(judge, (*key, i)) for i, question in enumerate(questions)))
    return agreement(questions, verdicts)


def agreement(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The rule's verdicts against others on the same questions; what no verdict tells of is absent.

    exact: share of scores that are the rule's. order: share of comparisons with the rule's order (a tie is one).
    difference: mean distance of scores, in points. faithful: share of right answers on faithfulness. no_verdict:
    share of questions without one, which the other figures leave out.
    """
    exact: list[float] = []
    order: list[float] = []
    distance: list[float] = []
    faithful: list[float] = []
    for question, verdict in zip(questions, verdicts, strict=True):
        rule = question.rule()
        if isinstance(rule, bool):
            faithful += [] if verdict is None else [float(verdict is rule)]
        elif isinstance(verdict, tuple):
            exact += [float(abs(x - y) < 1e-6) for x, y in zip(rule, verdict, strict=True)]
            distance += [abs(x - y) for x, y in zip(rule, verdict, strict=True)]
            if len(rule) == 2:
                order.append(float(_order(rule) == _order(verdict)))
    missing = [float(verdict is None) for verdict in verdicts]
    named = {"exact": exact, "order": order, "difference": distance, "faithful": faithful, "no_verdict": missing}
    return {name: sum(values) / len(values) for name, values in named.items() if values}


def agreement_in_play(trees: Iterable[Tree], rules: PlayRules) -> dict[str, float]:
    """`agreement` on every verdict of these trees, which were played by `rules`."""
    asked: list[tuple[Question, Verdict]] = []
    for tree in trees:
        seed = tree.seed
        for attack in tree.attacks:
            if attack.prompt is None:
                continue
            if rules.faithfulness and not attack.direct:
                asked.append((Question(None, seed.text, (attack.prompt,)), attack.faithful))
            query = seed.text if rules.judge_sees_seed else attack.prompt
            answers = [response.answer for response in attack.responses]
            asked += [_judged(defender_rubric(seed.category), query, answers, score) for score in attack.verdicts]
        shown = [
            None if d is None else attack.responses[d].answer
            for attack, d in zip(tree.attacks, tree.representatives, strict=True)
        ]
        asked += [_judged(attacker_rubric(seed.category), seed.text, shown, score) for score in tree.verdicts]
    return agreement([question for question, _ in asked], [verdict for _, verdict in asked])


def _judged(rubric: Rubric, query: str, answers: Sequence[str | None], score: PairScore) -> tuple[Question, Verdict]:
    first, second = answers[score.first], answers[score.second]
    assert first is not None, "only answers are judged"
    assert second is not None, "only answers are judged"
    if score.first != score.second:
        return Question(rubric, query, (first, second)), score.scores
    # one answer alone, or beside itself
    return Question(rubric, query, (first,)), None if score.scores is None else (sum(score.scores) / 2,)


def _order(scores: Sequence[float]) -> int:
    return (scores[0] > scores[1]) - (scores[0] < scores[1])
