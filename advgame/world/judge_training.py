"""Makes the tiny world's language-model judge: a small Llama taught the rule judge's verdicts, in its own process.

Run as `python -m advgame.world.judge_training judge SETTINGS_JSON FOLDER`, like `training.py`. Its tokenizer is the
players' with more words: scores, tags of questions and verdicts, and the words of its templates.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from advgame.game.prompts import Templates
from advgame.game.tree import Rubric
from advgame.world.judge_recipes import Question, draw_question, score_words, verdict_text
from advgame.world.settings import WorldSettings
from advgame.world.tokenizer import END, PAD, UNKNOWN, build_tokenizer, chat
from advgame.world.training import IGNORED, fit, new_model, run_child

JUDGE_TEMPLATES = Path(__file__).parent / "judge_templates"
HIDDEN, LAYERS, LEARNING_RATE = 64, 2, 6e-3
"""Of a player's size. At equal time two layers and many small steps beat three layers or larger batches."""
LONGEST_VERDICT = 8
"""Tokens of the longest verdict, its closing token included."""


def judge_templates() -> Templates:
    """The questions in the judge's own words (the players' texts in it are the package's, and not used)."""
    return Templates.load(JUDGE_TEMPLATES)


def judge_tokenizer() -> PreTrainedTokenizerFast:
    """The players' tokenizer, ids included, and what questions and verdicts need besides."""
    blank = Question(None, "how do i kill a python process", ("",))
    templates = judge_templates()
    texts = [blank.turn(templates), verdict_text(True), verdict_text(False), *score_words()]
    for rubric in Rubric:
        texts += [templates.pair(rubric, "", "", ""), templates.point(rubric, "", "")]
    return build_tokenizer([word for text in texts for word in text.split()])


def encode_questions(
    questions: Sequence[Question], vocabulary: Mapping[str, int], templates: Templates
) -> tuple[Tensor, Tensor]:
    """Token ids and labels as `training.encode` makes them, the hints of the questions among the labels.

    A label is what the position before it predicts, so a word's hint stands one place to its right. One word is one
    token, so no tokenizer is asked: a quarter of a step's time.
    """
    unknown, rows = vocabulary[UNKNOWN], []
    for question in questions:
        turn, answer = question.turn(templates), f"{verdict_text(question.rule())} {END}".split()
        text = [*chat(turn).split(), *answer]
        # before the turn stands <|user|>, behind it <|end|> <|assistant|>
        hinted = [None, None, *question.hints(turn), None, *answer]
        ids = [vocabulary.get(word, unknown) for word in text]
        rows.append((ids, [IGNORED if hint is None else vocabulary[hint] for hint in hinted]))
    length = max(len(ids) for ids, _ in rows)
    pad = vocabulary[PAD]
    return (
        torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows]),
    )


def train_judge(
    settings: WorldSettings, report: Callable[[int, float], None]
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the judge on the CPU; `report(step, loss)` after every step (loss in nats a token of the verdicts).

    The result depends on `settings.seed`, `judge_steps` and `judge_batch` only (and on the machine's arithmetic).
    """
    tokenizer, templates = judge_tokenizer(), judge_templates()
    vocabulary = tokenizer.get_vocab()
    rng = random.Random(f"judge {settings.seed}")
    shape = settings.model_copy(update={"hidden": HIDDEN, "layers": LAYERS})
    model = new_model(shape, tokenizer, rng.randrange(1 << 31))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = [draw_question(rng, reserved=False) for _ in range(settings.judge_batch)]
            yield encode_questions(drawn, vocabulary, templates)

    fit(model, batches(), steps=settings.judge_steps, peak=LEARNING_RATE, report=report)
    return model.eval(), tokenizer


if __name__ == "__main__":
    run_child(sys.argv[1:], lambda settings, _, report: train_judge(settings, report))
