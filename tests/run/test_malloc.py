"""What a run sets in its own process."""

import gc

from advgame.malloc import collect_rarely


def test_collections_become_rare_and_garbage_still_goes():
    before = gc.get_threshold()
    try:
        collect_rarely()
        gc.collect()
        started = gc.get_stats()[0]["collections"]
        kept = [[] for _ in range(40_000)]
        assert gc.get_stats()[0]["collections"] == started
        for _ in range(60_000):  # cycles, which counting references never frees
            own = []
            own.append(own)
        assert gc.get_stats()[0]["collections"] > started
        assert len(kept) == 40_000
    finally:
        gc.set_threshold(*before)
