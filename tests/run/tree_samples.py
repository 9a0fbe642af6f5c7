"""Trees for the tests of this folder: made by hand, and drawn by hypothesis."""

from hypothesis import strategies as st

from advgame.game.rewards import TreeRewards
from advgame.game.tree import Attack, Category, PairScore, Response, Sample, Seed, Tree


def sample(tokens=(5, 6), logprobs=None, finish="stop", version=3):
    logprobs = (-0.5,) * len(tokens) if logprobs is None else logprobs
    return Sample((1, 2), tuple(tokens), tuple(logprobs), finish, version)


def response(text="fine", finish="stop", **kwargs):
    return Response(sample(finish=finish, **kwargs), text, text if finish == "stop" else None)


def attack(prompt="do it", responses=(), verdicts=(), faithful=True, **kwargs):
    return Attack(sample(**kwargs), f"<prompt>{prompt}</prompt>", prompt, faithful, tuple(responses), tuple(verdicts))


def tree(category="harmful", attacks=(), verdicts=(), step=0, index=0):
    seed = Seed(f"s{index}", Category(category), "a seed")
    return Tree(seed, step, index, tuple(attacks), (None,) * len(attacks), tuple(verdicts))


numbers = st.floats(allow_nan=False)  # infinities included; NaN never equals itself, so it has its own test
texts = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates included
ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)
samples = st.integers(0, 4).flatmap(
    lambda n: st.builds(
        Sample,
        prompt_ids=ids,
        token_ids=st.tuples(*[st.integers(0, 200000)] * n),
        logprobs=st.tuples(*[numbers] * n),
        finish_reason=st.sampled_from(["stop", "length"]),
        version=st.integers(0, 10**6),
    )
)
verdicts = st.lists(
    st.builds(PairScore, st.integers(0, 3), st.integers(0, 3), st.none() | st.tuples(numbers, numbers)), max_size=2
).map(tuple)
responses = st.builds(Response, st.none() | samples, texts, st.none() | texts)
attacks = st.builds(
    Attack,
    st.none() | samples,
    texts,
    st.none() | texts,
    st.none() | st.booleans(),
    st.lists(responses, max_size=2).map(tuple),
    verdicts,
    st.booleans(),
)
seeds = st.builds(Seed, texts, st.sampled_from(Category), texts, st.dictionaries(texts, texts, max_size=2))
trees = st.builds(
    Tree,
    seeds,
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.lists(attacks, max_size=2).map(tuple),
    st.lists(st.none() | st.integers(0, 3), max_size=2).map(tuple),
    verdicts,
)


@st.composite
def rewarded_trees(draw):
    played = draw(trees)
    maybe = st.none() | numbers
    rewards = TreeRewards(
        tuple(draw(maybe) for _ in played.attacks),
        tuple(tuple(draw(maybe) for _ in a.responses) for a in played.attacks),
    )
    return played, rewards
