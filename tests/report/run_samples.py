"""Small run folders for the tests of this folder: real recorder, real files, made-up numbers and hostile text."""

import json
import random

from advgame.game.rewards import RewardRules, tree_rewards
from advgame.game.tree import Attack, Category, PairScore, Response, Sample, Seed, Tree
from advgame.run import names
from advgame.run.folder import RunFolder
from advgame.run.metrics import play_metrics
from advgame.run.recorder import Recorder

EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2> & <b>bold</b> \u2028 \U0001f600"
CONFIG = "run: {steps: 12, seed: 3}\nlearn: {objective: dpo}\njudge: {kind: rule, noise: NOISE}\n"


def sample(tokens=5, finish="stop"):
    return Sample((1, 2), tuple(range(tokens)), (-0.5,) * tokens, finish, 0)


def response(answer, finish="stop"):
    return Response(sample(len(answer) + 1, finish), answer, answer if finish == "stop" else None)


def attack(prompt, responses, verdicts, faithful=True):
    return Attack(sample(), f"<prompt>{prompt}</prompt>", prompt, faithful, tuple(responses), tuple(verdicts))


def tree(step, index, draw):
    """Two attacks of two responses each; every third seed is hostile to the page, some samples fail."""
    category = Category.HARMFUL if index % 2 == 0 else Category.BENIGN
    text = f"{EVIL} {index}" if index % 3 == 0 else f"a {category} seed, number {index}"
    attacks = []
    for number in range(2):
        answers = [response("x" * draw.randint(1, 30) + f" answer {step}") for _ in range(2)]
        if draw.random() < 0.1:
            answers[1] = response("cut off", finish="length")
            verdicts = [PairScore(0, 0, (6.0, 6.0))]
        else:
            verdicts = [PairScore(0, 1, (draw.uniform(0, 10), draw.uniform(0, 10)))]
        attacks.append(attack(f"{EVIL} attack {number} on {index} at {step}", answers, verdicts))
    if draw.random() < 0.1:
        attacks[1] = attack("something else", (), (), faithful=False)
    verdict = PairScore(0, 1, (draw.uniform(0, 10), 5.0)) if attacks[1].responses else PairScore(0, 0, None)
    seed = Seed(f"set:{index}", category, text)
    return Tree(seed, step, index, tuple(attacks), (0, 0 if attacks[1].responses else None), (verdict,))


def make_run(root, name="run", steps=12, trees=6, noise=0, ended=True):
    """A run folder with metrics, trees and a summary; returns its path."""
    draw = random.Random(steps)
    with RunFolder.create(root, name, CONFIG.replace("NOISE", str(noise)), purpose="a test of <b>pages</b>") as folder:
        with Recorder(folder) as recorder:
            for step in range(steps):
                played = [tree(step, index, draw) for index in range(trees)]
                rewards = [tree_rewards(one, RewardRules()) for one in played]
                values = play_metrics(played, rewards, version=step) | {
                    names.loss("attacker"): 0.69 - step / 100,
                    names.loss("defender"): 0.68 - step / 100,
                    names.stage_seconds("play"): 1.5,
                    names.stage_seconds("learn"): 0.5,
                    names.STEP_SECONDS: 2.0,
                    "energy/process_cpu_s": 1.0,
                    "count/judge_no_verdict": float(step // 4),
                    "count/judge_swaps": 10.0 * (step + 1),
                    "count/judge_swap_disagreements": 3.0 * (step + 1),
                }
                if step % 3 == 0:
                    values |= {
                        names.EXPLOITABILITY: 0.8 - step / 20,
                        names.OVER_REFUSAL: 0.9 - step / 20,
                        f"validation/plain/{names.ASR}": 0.3 - step / 50,
                        f"validation/plain/{names.COMPLIANCE}": 0.7 + step / 50,
                    }
                recorder.metrics(step, values)
                recorder.trees(step, played, rewards)
        if ended:
            folder.summary.write_text(json.dumps({"exploitability_before": 0.8, "exploitability_after": 0.35}))
        return folder.path
