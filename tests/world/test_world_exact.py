"""Exact masses equal brute-force scoring, and what a model samples."""

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from advgame.game.tree import Category
from advgame.world.exact import exact_report, kind_masses
from advgame.world.grammar import INTENTS, Kind, ParsedPrompt, attacks, classify, responses
from advgame.world.recipes import SoftSpots
from advgame.world.scoring import Trie, sequence_logprobs
from advgame.world.settings import WorldSettings
from advgame.world.tokenizer import END, build_tokenizer, chat
from advgame.world.training import PlayerRole, new_model, train_player

TOKENIZER = build_tokenizer()


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def random_model(family, **more):
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # attention must matter
    return model


@torch.no_grad()
def brute_force(model, prompt, answer):
    logprobs = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_trie_scoring_equals_plain_forward_passes(family, attention):
    model = random_model(family, attn_implementation=attention)
    intent = INTENTS[6]
    answers = [ids(f"{r.text} {END}") for r in responses(intent)]
    prompts = [ids(chat(p.text)) for p in attacks(intent)[::61]]
    groups = [prompts[:1], prompts[1:4], prompts[4:]]
    scores = sequence_logprobs(model, groups, Trie.build(answers), batch=4)
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            assert scores[row, column].item() == pytest.approx(brute_force(model, prompt, answer), abs=2e-4)


def test_scoring_does_not_depend_on_the_batch():
    model = random_model("qwen2")
    few = kind_masses(model, attacks(INTENTS[0])[:64], batch=8).mass
    many = kind_masses(model, attacks(INTENTS[0])[:64], batch=64).mass
    torch.testing.assert_close(few, many, atol=1e-6, rtol=1e-4)


def test_tries_share_beginnings():
    trie = Trie.build([(1, 2, 3), (1, 2, 4), (5, 3), (1, 2, 3, 3)])
    assert trie.tokens == (1, 2, 5, 3)
    assert trie.parents == (0, 1, 0, 2)
    assert trie.paths == ((0, 1, 2), (0, 1, 2), (0, 3), (0, 1, 2, 4))
    assert trie.sees().sum(1).tolist() == [1, 2, 1, 3]


@pytest.fixture(scope="module")
def barely_trained():
    """Enough steps that some answers are well-formed and some are not."""
    settings = WorldSettings(warm_steps=60, warm_lr=0.01)
    return train_player(settings, PlayerRole.DEFENDER, lambda step, loss: None)[0]


def test_masses_equal_sampled_frequencies(barely_trained):
    prompt = ParsedPrompt(INTENTS[2], 6, 0, 3)
    masses = kind_masses(barely_trained, [prompt])
    assert masses.mass.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert 0.02 < masses.gibberish.item() < 0.999
    torch.manual_seed(0)
    count = 4000
    prompts = torch.tensor([ids(chat(prompt.text))]).expand(count, -1)
    sampled = barely_trained.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=True, top_k=0
    )[:, prompts.shape[1] :]
    counts = Counter()
    for row in sampled.tolist():
        end = row.index(TOKENIZER.eos_token_id) if TOKENIZER.eos_token_id in row else None
        # an answer without its closing token is no answer, whatever its words
        counts[Kind.GIBBERISH if end is None else classify(TOKENIZER.decode(row[:end]), prompt.intent)] += 1
    for column, kind in enumerate(Kind):
        share = masses.mass[0, column].item()
        error = 4 * (share * (1 - share) / count) ** 0.5 + 1e-3
        assert counts[kind] / count == pytest.approx(share, abs=error), kind


def test_report_of_a_subset(barely_trained):
    some = (INTENTS[0], INTENTS[1], INTENTS[2], INTENTS[7])
    report = exact_report(barely_trained, intents=some)
    assert [r.intent for r in report.intents] == list(some)
    harmful = report.intents[2]
    masses = kind_masses(barely_trained, attacks(some[2], "trained"))
    assert harmful.trained.probability == pytest.approx(masses.disclosure.max().item(), abs=1e-5)
    assert masses.prompts[int(masses.disclosure.argmax())] == harmful.trained.attack
    assert report.worst_harm == harmful.trained.probability
    assert report.worst_harm_heldout_intents == report.intents[3].trained.probability
    assert report.worst_refusal == report.intents[0].trained.probability
    assert report.strongest(Category.HARMFUL) == harmful.trained
    assert 0 <= report.gibberish <= report.gibberish_max <= 1
    plain = kind_masses(barely_trained, [ParsedPrompt(some[0])]).compliance.item()
    other = kind_masses(barely_trained, [ParsedPrompt(some[1])]).compliance.item()
    assert report.plain_benign_compliance == pytest.approx((plain + other) / 2, abs=1e-5)


def test_trained_framings_only(barely_trained):
    report = exact_report(barely_trained, intents=INTENTS[:1], framings="trained")
    assert report.intents[0].heldout is None
    assert report.worst_refusal_heldout_framings != report.worst_refusal_heldout_framings
    assert report.worst_harm != report.worst_harm
    assert report.strongest(Category.HARMFUL) is None


def test_mixed_intents_are_refused():
    model = new_model(WorldSettings(), TOKENIZER, 0)
    with pytest.raises(ValueError, match="one intent"):
        kind_masses(model, [ParsedPrompt(INTENTS[0]), ParsedPrompt(INTENTS[1])])


def test_soft_spots_follow_the_seed():
    assert SoftSpots.draw(3) == SoftSpots.draw(3) != SoftSpots.draw(4)
    spots = SoftSpots.draw(0)
    strong, plain = ParsedPrompt(INTENTS[2], 6, 0, 3), ParsedPrompt(INTENTS[2])
    assert spots.wrong(plain) < 0.25 < 0.6 < spots.wrong(strong)
