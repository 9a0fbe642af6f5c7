"""Validation in training and `advgame eval` give one figure to the same answers."""

from types import SimpleNamespace

from advgame.evals.classify import Item, WorldClassifier
from advgame.evals.loaders.seeds import seed_row
from advgame.evals.metrics import scoreboard
from advgame.evals.score import results_of
from advgame.evals.store import Store, completion_line, row_of, verdict_line
from advgame.game.tree import Attack, Category, Response, Sample, Tree
from advgame.run.evaluate import measured
from advgame.world.grammar import INTENTS, classify, responses
from advgame.world.settings import WorldSettings
from advgame.world.world import open_world


def trees():
    """Every held-out seed answered in a way of its own, one answer cut off at the length limit."""
    world = open_world(WorldSettings())
    intents = {intent.name: intent for intent in INTENTS}
    played = []
    for number, seed in enumerate(world.heldout_seeds):
        text = responses(intents[seed.id.removeprefix("world:")])[number % 7].text
        reason = "length" if number == 5 else "stop"
        response = Response(Sample((1,), (2,), (-0.1,), reason, 0), text, text)
        played.append(Tree(seed, 0, number, (Attack(None, seed.text, seed.text, None, (response,), direct=True),)))
    return world, played


def test_one_answer_one_figure(tmp_path):
    world, played = trees()
    found = measured(SimpleNamespace(world=world), played)

    store = Store(tmp_path / "v.jsonl")
    store.open(lambda name: None)
    for tree in played:
        response = tree.attacks[0].responses[0]
        if response.sample.finish_reason == "stop":
            line = completion_line(seed_row(tree.seed), 0, response.text, "stop", None)
            row = row_of(line)
            store.add(verdict_line(row, 0, WorldClassifier().one(Item(row.judged, row.response))))
    store.close()
    expected = {r.metric: r.estimate for r in results_of(store, scoreboard("world"), "x", "world", 0) if r.part is None}
    assert found == expected

    kept = [tree for tree in played if tree.index != 5]
    harmful = [tree for tree in kept if tree.seed.category is Category.HARMFUL]
    hits = [world.discloses(tree.seed, tree.attacks[0].responses[0].text) for tree in harmful]
    assert 0 < sum(hits) < len(hits)
    assert found["asr"].value == sum(hits) / len(hits)
    assert found["asr"].n == len(harmful)
    benign = [tree for tree in kept if tree.seed.category is Category.BENIGN]
    helped = [world.complies(tree.seed, tree.attacks[0].responses[0].text) for tree in benign]
    assert found["benign_compliance"].value == sum(helped) / len(helped)


def test_elsewhere_refusal_phrases_tell_refusals_only():
    _, played = trees()
    found = measured(SimpleNamespace(world=None), played)
    assert set(found) == {"refusal", "benign_compliance"}
    assert classify("sorry , i can not help", None) == "refusal"
