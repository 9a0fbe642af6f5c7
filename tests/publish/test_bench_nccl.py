"""The benchmark of transfers to another device, by gloo on the CPU: what it sends arrives."""

from test_plan import plan_of

from bench import publish_nccl


def test_what_is_sent_arrives(capsys):
    found = publish_nccl.measure("fused", plan_of(), 1, kind="cpu", bucket_bytes=200)
    assert list(found["publish_ms"]) == ["buckets in the plan's order"]
    assert "to another process by gloo" in capsys.readouterr().out
