"""Players that learn at the same time learn the same; when they may is decided by measured memory."""

import threading

import models
import pytest
import torch
from test_learner import learner, pairs

from advgame.learn.streams import SideBySide, enough

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("players")
    return [models.folder(made / str(seed), seed=seed) for seed in range(2)]


def learned(folders, run):
    """Metrics and weights of two players after two updates each."""
    players = [learner(folder, reference="recompute", micro_tokens=20) for folder in folders]
    data = pairs()  # made here: it draws from the one stream of all threads

    def task(player):
        return lambda: [player.update_pairs(data, 0.0) for _ in range(2)]

    values = run([task(player) for player in players])
    return values, [p.detach() for player in players for p in player.parameters.values()]


def test_together_is_what_turns_are(folders):
    values, weights = learned(folders, SideBySide(CPU, allowed=True).together)
    expected, theirs = learned(folders, lambda tasks: [task() for task in tasks])
    assert values == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_they_are_really_together():
    both = threading.Barrier(2, timeout=10)  # broken, and an error, unless both wait
    assert sorted(SideBySide(CPU, allowed=True).together([both.wait, both.wait])) == [0, 1]


def test_an_error_of_one_is_raised_when_the_other_has_ended():
    ended = threading.Event()

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SideBySide(CPU, allowed=True).together([fails, ended.set])
    assert ended.is_set()


def test_a_cpu_takes_turns():
    order = []
    made = SideBySide(CPU, allowed=True).run([lambda i=i: order.append(threading.get_ident()) or i for i in range(2)])
    assert made == [0, 1]
    assert set(order) == {threading.get_ident()}


class Measured(SideBySide):
    """A GPU's decisions without one."""

    def __init__(self, needs, free):
        super().__init__(CPU, allowed=True)
        self.allowed, self.free, self.how, self.given = True, free, [], needs

    def fits(self):
        return enough(list(self._needs.values()), self.free)

    def together(self, tasks):
        self.how.append("together")
        return [task() for task in tasks]

    def _measuring(self, number, task):
        self.how.append(number)
        self._needs[number] = self.given[number]
        return task()


@pytest.mark.parametrize(("free", "later"), [(900, ["together"]), (899, [0, 1])])
def test_memory_decides_after_two_steps(free, later):
    made = Measured((400, 200), free)
    for _ in range(3):
        assert made.run([lambda: "a", lambda: "b"]) == ["a", "b"]
    assert made.how == [0, 1, 0, 1, *later]
    assert made.run([lambda: "alone"]) == ["alone"]  # sequential rounds: one player's turn


def test_players_on_ranks_of_their_own_never_take_turns():
    both = threading.Barrier(2, timeout=30)  # no task ends before the other one has begun
    assert sorted(SideBySide(CPU, allowed=False, apart=True).run([both.wait, both.wait])) == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_of_a_gpu(folders):
    device = torch.device("cuda")
    made = SideBySide(device, allowed=True)
    weights = [torch.randn(512, 512, device=device) for _ in range(2)]
    products = made.run([lambda w=w: (w @ w).sum().item() for w in weights])
    assert made.together([lambda w=w: (w @ w).sum().item() for w in weights]) == pytest.approx(products)
