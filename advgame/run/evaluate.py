"""What a run measures beside its training trees: validation, the current Attacker's success, the exact worst case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from advgame.combinations import world_judges
from advgame.evals.classify import Item, PhraseClassifier, WorldClassifier
from advgame.evals.loaders.seeds import seed_row
from advgame.evals.metrics import scoreboard
from advgame.evals.stats import Estimate
from advgame.game.llm_judge import LLMJudge
from advgame.game.play import play_batch
from advgame.game.rewards import tree_rewards
from advgame.game.tree import Outcome, Seed, Tree
from advgame.learn.load import load_model
from advgame.rollout.replicas import Served
from advgame.rollout.transformers_engine import TransformersEngine
from advgame.run import names
from advgame.run.metrics import judged_rates, play_metrics
from advgame.run.session import Session, Side
from advgame.world.agreement import agreement_in_play, examine

EVAL_STEP = 1 << 30
"""Added to a step in the keys of evaluation, so that it never draws from the streams of training."""

SAMPLED_TREES = 128
"""Trees of each category behind the sampled attack success in the tiny world; elsewhere data.validation_limit."""


async def validate(session: Session, step: int) -> dict[str, float]:
    """Held-out seeds straight to the Defender: `validation/<set>/<metric>`, by the judge's scores and by `measured`."""
    values: dict[str, float] = {}
    for number, (name, seeds) in enumerate(session.validation.items()):
        trees = await _play(session, seeds, (number + 1) * EVAL_STEP + step, direct=True)
        played = play_metrics(trees, [tree_rewards(t, session.rewards) for t in trees], version=step)
        kept = {k: v for k, v in played.items() if k in (names.ASR, names.COMPLIANCE) or k.endswith("/reward")}
        for metric, estimate in measured(session, trees).items():
            key = metric if session.world is not None else f"{metric}_phrases"
            kept |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
        values |= {f"validation/{name}/{key}": value for key, value in kept.items()}
    return values


async def sampled_success(session: Session, step: int) -> dict[str, float]:
    """The current Attacker against the current Defender on a fixed spread of training seeds.

    In the tiny world `eval/asr` is the share of disclosures, read from whole texts, among responses to valid
    attacks on harmful seeds; elsewhere it is the judge's (`metrics.judged_rates`). So is benign compliance.
    """
    limit = SAMPLED_TREES if session.world is not None else session.config.data.validation_limit
    seeds = session.seeds.spread(limit)
    trees = await _play(session, seeds, 9 * EVAL_STEP + step, direct=session.config.game.skip_attacker)
    if session.world is None:
        rates = judged_rates(trees)
        renamed = {names.EVAL_ASR: names.ASR, names.EVAL_COMPLIANCE: names.COMPLIANCE}
        return {new: rates[old] for new, old in renamed.items() if old in rates}
    found = measured(session, trees)
    renamed = {names.EVAL_ASR: "asr", "eval/sampled_compliance": "benign_compliance"}
    return {new: found[old].value for new, old in renamed.items() if old in found}


def exact(session: Session) -> dict[str, float]:
    """The Defender's exact worst case by enumeration (tiny world only; {} elsewhere)."""
    if session.world is None:
        return {}
    report = session.world.exact(served_model(session.sides[-1]))
    return {
        names.EXPLOITABILITY: report.worst_harm,
        names.HELDOUT_EXPLOITABILITY: report.worst_harm_heldout_framings,
        names.OVER_REFUSAL: report.worst_refusal,
        names.EXPLOITABILITY_BOUND: report.worst_harm_bound,
        "eval/worst_over_refusal_bound": report.worst_refusal_bound,
        "eval/heldout_over_refusal": report.worst_refusal_heldout_framings,
        "eval/heldout_intents_exploitability": report.worst_harm_heldout_intents,
        names.EVAL_COMPLIANCE: report.mean_benign_compliance,
        "eval/plain_benign_compliance": report.plain_benign_compliance,
        "eval/mean_harm": report.mean_harm,
        names.GIBBERISH: report.gibberish,
        "eval/gibberish_max": report.gibberish_max,
    }


def served_model(side: Side) -> PreTrainedModel:
    """A model of this process with the weights that the side's engine serves: the engine's own, or a copy."""
    if isinstance(side.engine, TransformersEngine):
        return side.engine.model
    assert isinstance(side.engine, Served), "players are sampled by these two"
    model = load_model(side.engine.folder, f"{side.name}.model").eval()
    if side.learner is not None:
        side.learner.serve_into(dict(model.named_parameters()))
    return model


async def examine_judge(session: Session) -> dict[str, float]:
    """How far the world's own language-model judge agrees with the rule on held-out material; {} for other judges."""
    judge = session.table.judge
    if not isinstance(judge, LLMJudge) or not world_judges(session.config):
        return {}
    return {
        f"{names.JUDGE_AGREEMENT}{what}": value for what, value in (await examine(judge, (10 * EVAL_STEP,))).items()
    }


def judge_metrics(session: Session, trees: Sequence[Tree], before: Mapping[str, int]) -> dict[str, float]:
    """What an LLM judge did in one step's play; `before`: the session's counters when it began.

    `play/judge_tokens`: tokens of a completion, on average. `play/judge_cached_share`: share of its prompts' tokens
    found in the engine's prefix cache (vLLM only, and servers that tell). `play/judge_agreement_*`: with the world's
    rule, on this step's own material (`world/agreement.py`).
    """
    if not isinstance(session.table.judge, LLMJudge):
        return {}

    def counted(what: str) -> int:
        return session.counters[f"judge_{what}"] - before.get(f"judge_{what}", 0)

    values = {}
    if requests := counted("requests"):
        values["play/judge_tokens"] = counted("tokens") / requests
    if prompts := counted("prompt_tokens"):
        values["play/judge_cached_share"] = counted("cached_tokens") / prompts
    if session.world is not None:
        agreed = agreement_in_play(trees, session.table.rules)
        values |= {f"play/judge_agreement_{what}": value for what, value in agreed.items()}
    return values


async def _play(session: Session, seeds: Sequence[Seed], step: int, *, direct: bool) -> list[Tree]:
    table = session.direct_table if direct else session.table
    return await play_batch(table, seeds, step, in_flight=session.config.rollout.in_flight)


def measured(session: Session, trees: Iterable[Tree]) -> dict[str, Estimate]:
    """The figures that `advgame eval` gives to the same answers (`evals/metrics.py`), by metric.

    By the tiny world's exact judge, judged against the seed; elsewhere by refusal phrases, which tell refusals and
    nothing of harm. Over valid responses (outcome `ok`).
    """
    world = session.world is not None
    classifier = WorldClassifier() if world else PhraseClassifier(refusal_is_safety=False)
    board = scoreboard("world" if world else "seeds")
    for tree in trees:
        row = seed_row(tree.seed)
        for attack in tree.attacks:
            for response in attack.responses:
                if response.outcome is Outcome.OK and response.answer is not None:
                    board.add(row, classifier.one(Item(row.judged, response.answer)))
    results = board.results("validation", classifier.name)
    return {r.metric: r.estimate for r in results if r.part is None and r.estimate is not None}
