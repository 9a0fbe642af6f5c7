"""A run whose judge has two replicas on real vLLM, of which one is killed, one hangs, and one answers garbage."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from defender_runs import rows_of

from advgame import cli
from advgame.rollout.vllm_engine import VllmEngine
from advgame.run.recorder import read_trees, tree_files

TINY = Path(__file__).parents[2] / "configs" / "tiny-judge.yaml"


async def nothing(session, step):
    return {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_judges_that_die_hang_and_answer_garbage(tmp_path, monkeypatch):
    """Steps 0 to 2, one fault each: no tree is lost, every verdict is given by another or by the same once restarted;
    garbage is no verdict, counted and left out."""
    pytest.importorskip("vllm")
    monkeypatch.setattr("advgame.run.loop.examine_judge", lambda session: nothing(session, 0))
    monkeypatch.setattr("advgame.run.loop.measure", nothing)
    monkeypatch.setenv("ADVGAME_CACHE", str(tmp_path / "cache"))
    generate, asked, done = VllmEngine.generate, Counter(), []

    async def faulty(self, request):
        # a verdict's key begins with its step
        step = request.key[0]
        asked[step] += 1
        if step not in done and asked[step] >= 4 and self.serving:
            done.append(step)
            if step == 2:
                await self._process.collective_rpc("advgame_zero")
            else:
                for pid in self.process_ids:
                    os.kill(pid, (signal.SIGKILL, signal.SIGSTOP)[step])
        return await generate(self, request)

    monkeypatch.setattr(VllmEngine, "generate", faulty)
    few = ["--world.warm_steps", "150", "--world.judge_steps", "150", "--data.harmful", "6", "--data.benign", "6"]
    few += ["--game.faithfulness", "false", "--run.validate_every", "0", "--run.tensorboard", "false"]
    judges = ["--judge.engine", "vllm", "--rollout.vllm.replicas", "{judge: 2}"]
    # long enough for a busy machine, and one of them is enough
    judges += ["--rollout.vllm.request_timeout_s", "8", "--rollout.vllm.breaker", "1"]
    placed = ["--run.root", str(tmp_path), "--run.name", "a", "--run.steps", "3"]
    assert cli.main(["train", str(TINY), "--quiet", *few, *judges, *placed]) == 0
    run = tmp_path / "a"
    rows = rows_of(run)
    assert done == [0, 1, 2]
    found = [one.tree for file in tree_files(run / "trees") for one in read_trees(file)]
    assert sorted((tree.step, tree.index) for tree in found) == [(step, i) for step in range(3) for i in range(12)]
    first, second, third = rows[:3]
    assert first["count/judge_moved"] > 0
    assert (first.get("count/judge_breaker", 0), second["count/judge_breaker"]) == (0, 1)
    assert second["count/judge_failures"] > 0
    assert third["count/judge_restarts"] == 2
    assert not {"count/judge_given_up", "count/judge_lost"} & third.keys()
    assert third["count/judge_no_verdict"] > second.get("count/judge_no_verdict", 0)
