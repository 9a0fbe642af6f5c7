"""Seats a plan: opens its models and gives everybody their part on the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from advgame.evals.classify import Classifier, ModelClassifier, PhraseClassifier, WorldClassifier
from advgame.evals.formats import FORMATS, TURN, renderer
from advgame.evals.named import ModelSpec
from advgame.game.judge import Judge
from advgame.game.llm_judge import LLMJudge
from advgame.game.phrase_judge import PhraseJudge
from advgame.game.prompts import Templates
from advgame.redteam.campaign import Campaign
from advgame.redteam.judges import AttackJudge, GameJudge, LedgerSpeaker, ModelJudge
from advgame.redteam.models import Models
from advgame.redteam.plan import SAMPLING, Plan
from advgame.redteam.records import TARGET, Ledger, Voice
from advgame.redteam.strategies import Crew
from advgame.redteam.writers import AttackWriter, GameWriter, JsonWriter
from advgame.rollout.engine import Sampling
from advgame.run.check import load_templates


async def seat(
    plan: Plan, name: str, ledger: Ledger, models: Models, counters: Counter[str], on_query: Callable[[], None]
) -> Campaign:
    """Opens the plan's models and seats everybody. `name` begins the keys of the ledger."""
    attacker = await models.open(plan.attacker, "attacker")
    driver = attacker if plan.driver is None else await models.open(plan.driver, "driver")
    target = Voice(TARGET, await models.open(plan.target, "target"), plan.how("target"))
    voice = Voice("attacker", attacker, plan.how("attacker"))

    def writer_of(spec: ModelSpec, voice: Voice, game: bool) -> AttackWriter:
        if game:
            return GameWriter(ledger, voice, _templates(plan, spec), counters)
        return JsonWriter(ledger, voice, counters)

    rewriter = writer_of(plan.attacker, voice, True) if plan.strategy.startswith("attacker") else None
    if plan.search is None:
        assert rewriter is not None, "best of k is the attacker's own strategy"
        writer = rewriter
    else:
        drives = plan.driver or plan.attacker
        how = plan.how("attacker") if plan.driver is None else _driver_sampling(plan)
        role = "attacker" if plan.driver is None else "driver"
        writer = writer_of(drives, Voice(role, driver, how), plan.plays(drives))
    crew = Crew(
        name,
        ledger,
        writer,
        target,
        await _judge(plan, ledger, models, counters),
        plan.seed_queries,
        rewriter,
        on_query,
    )
    classifier = await _classifier(plan, ledger, models, counters)
    return Campaign(crew, classifier, plan.strategy, plan.k, plan.search, plan.classify_all, plan.in_flight)


def _driver_sampling(plan: Plan) -> Sampling:
    if "driver" in plan.sampling:
        return plan.sampling["driver"]
    config = None if plan.driver is None else plan.driver.config
    if config is None:
        return SAMPLING["attacker"]
    trained = config.attacker.sampling
    return Sampling(trained.temperature, trained.top_p, trained.max_tokens)


def _templates(plan: Plan, spec: ModelSpec) -> Templates:
    """The Attacker's instructions as it was trained with them; the package's own for a bare model."""
    if spec.config is None:
        return Templates.load()
    world = spec.world
    return load_templates(spec.config, None if world is None else world.templates_dir)


async def _judge(plan: Plan, ledger: Ledger, models: Models, counters: Counter[str]) -> AttackJudge:
    if isinstance(plan.judge, str):
        return GameJudge(_game_judge(plan), counters)
    model = await models.open(plan.judge, "judge")
    voice = Voice("judge", model, plan.how("judge"))
    speaker = LedgerSpeaker(ledger, Voice("faithful", model, plan.how("faithful")), counters)
    game = LLMJudge(speaker, Templates.load())
    return ModelJudge(ledger, voice, Voice("topic", model, plan.how("judge")), game, counters)


def _game_judge(plan: Plan) -> Judge:
    if plan.judge == "phrases":
        return PhraseJudge()
    assert plan.world is not None, "checked with the plan"
    return plan.world.judge()


async def _classifier(plan: Plan, ledger: Ledger, models: Models, counters: Counter[str]) -> Classifier:
    if plan.classifier == "phrases":
        return PhraseClassifier()
    if isinstance(plan.classifier, str):
        return WorldClassifier()
    kind = plan.classifier_kind
    form = FORMATS[kind]
    how = plan.sampling.get("classifier", Sampling(0.0, 1.0, form.max_tokens))
    voice = Voice("classifier", await models.open(plan.classifier, "classifier"), how)
    speaker = LedgerSpeaker(ledger, voice, counters, parts=TURN if form.conversation else None)
    return ModelClassifier(kind, speaker, renderer(kind, None, None), form.parse)
