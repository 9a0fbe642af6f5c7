"""The module forms and the Hugging Face patch give what the functions and whole logits give."""

from __future__ import annotations

import advgame_kernels as ak
import pytest
import torch
from advgame_kernels import modules, patch
from problems import grads_of, head_problem


def test_modules_equal_functions():
    p = head_problem([5, 3, 2, 4])
    logps, ref = p.ref_logps - 1.0, p.ref_logps
    logits = (p.hidden @ p.weight.t()).detach()
    tokens = [torch.linspace(-2, -1, 14, dtype=torch.float64)] * 3
    pairs = [
        (
            modules.PreferenceLoss(kind="ipo", beta=0.2)(logps, ref),
            ak.preference_loss(logps, ref, kind="ipo", beta=0.2),
        ),
        (
            modules.LinearPreferenceLoss(kind="ipo")(p.hidden, p.weight, p.labels, p.bounds, ref, p.bias, 3),
            ak.linear_preference_loss(
                p.hidden, p.weight, p.labels, p.bounds, ref, kind="ipo", bias=p.bias, normalizer=3
            ),
        ),
        (
            modules.SelectiveLogProbs(temperature=0.5)(logits, p.labels),
            ak.selective_logprobs(logits, p.labels, temperature=0.5),
        ),
        (
            modules.LinearLogProbs(softcap=2.0)(p.hidden, p.weight, p.labels),
            ak.linear_logprobs(p.hidden, p.weight, p.labels, softcap=2.0),
        ),
        (
            modules.PolicyLoss(clip=0.2)(*tokens, old_logps=tokens[0] - 0.1),
            ak.policy_loss(*tokens, clip=0.2, old_logps=tokens[0] - 0.1),
        ),
        (
            modules.LinearPolicyLoss(kl_beta=0.1)(p.hidden, p.weight, p.labels, *tokens[1:], ref_logps=tokens[0]),
            ak.linear_policy_loss(p.hidden, p.weight, p.labels, *tokens[1:], ref_logps=tokens[0], kl_beta=0.1),
        ),
    ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_modules_refuse_unknown_settings_at_construction():
    with pytest.raises(TypeError, match="no setting 'bta'"):
        modules.PreferenceLoss(bta=0.1)
    with pytest.raises(TypeError, match="normalizer"):
        modules.LinearPreferenceLoss(normalizer=3)
    assert "beta=0.1" in repr(modules.PreferenceLoss(beta=0.1))


def test_weight_average_saves_and_updates():
    layer = torch.nn.Linear(3, 2)
    average = modules.WeightAverage(layer.parameters(), 0.5)
    before = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        for p in layer.parameters():
            p += 1.0
    average.update_(layer.parameters())
    for s, b in zip(average.shadow, before, strict=True):
        torch.testing.assert_close(s, b + 0.5)
    again = modules.WeightAverage(layer.parameters(), 0.5)
    again.load_state_dict(average.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.shadow, average.shadow, strict=True))


def tiny_model(**settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def batch():
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    labels[3, 5:] = -100
    return ids, labels


def whole_logprobs(model, ids, labels):
    logits = model(input_ids=ids).logits[:, :-1]
    mask = labels[:, 1:] != -100
    picked = torch.log_softmax(logits, -1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.where(mask, picked, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_patched_model_gives_the_logprobs_of_whole_logits(tied):
    model = tiny_model(tie_word_embeddings=tied)
    ids, labels = batch()
    want = whole_logprobs(model, ids, labels)
    logits = model(input_ids=ids).logits
    assert patch.patch_model(patch.patch_model(model)) is model
    got = model(input_ids=ids, labels=labels, fused="logprobs")
    torch.testing.assert_close(got.logps, want)
    same = model(input_ids=ids, labels=labels, fused="logprobs", lengths=[6, 3, 6, 2])
    assert all(torch.equal(a, b) for a, b in zip(same, got, strict=True))
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.isfinite(model(input_ids=ids, labels=labels).loss)
    params = list(model.parameters())
    for a, b in zip(
        grads_of(got.logps.sum(), *params), grads_of(whole_logprobs(model, ids, labels).sum(), *params), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_patched_model_gives_the_preference_loss():
    model = tiny_model()
    ids, labels = batch()
    sums = whole_logprobs(model, ids, labels).sum(dim=1)
    ref = (sums + torch.tensor([1.0, -1.0, 0.5, 0.2])).detach()
    want = ak.preference_loss(sums, ref, kind="ipo")
    patch.patch_model(model)
    got = model(input_ids=ids, labels=labels, fused="preference", ref_logps=ref, kind="ipo")
    torch.testing.assert_close(got.loss, want.loss)
    head = model.lm_head.weight
    torch.testing.assert_close(grads_of(got.loss, head)[0], grads_of(want.loss, head)[0], rtol=1e-4, atol=1e-5)
    same = model(input_ids=ids, labels=labels, fused="preference", ref_logps=ref, kind="ipo", lengths=[6, 3, 6, 2])
    assert torch.equal(same.loss, got.loss)
    with pytest.raises(ValueError, match="lengths"):
        model(input_ids=ids, labels=labels, fused="preference", ref_logps=ref, lengths=[6, 3, 5, 3])
    with pytest.raises(ValueError, match="lengths: expected one number a sequence"):
        model(input_ids=ids, labels=labels, fused="logprobs", lengths=[6, 3, 6])
    for wrong in (labels[:, :-1], labels[:-1], labels.int(), labels.to("meta")):
        with pytest.raises(ValueError, match=r"labels: expected int64 labels of shape \(4, 9\)"):
            model(input_ids=ids, labels=wrong, fused="logprobs")
    with pytest.raises(ValueError, match="cu_seqlens: expected 2P"):
        model(input_ids=ids[:3], labels=labels[:3], fused="preference", ref_logps=ref)


def test_patched_model_follows_autocast():
    model = patch.patch_model(tiny_model())
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(input_ids=ids, labels=labels, fused="logprobs").logps
        want = whole_logprobs(model, ids, labels).float()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert not torch.equal(got, model(input_ids=ids, labels=labels, fused="logprobs").logps)
    assert grads_of(got.sum(), model.lm_head.weight)[0].dtype == torch.float32


def test_adapters_on_the_head_and_unknown_forms_are_refused():
    model = patch.patch_model(tiny_model())
    ids, labels = batch()
    with pytest.raises(ValueError, match="fused"):
        model(input_ids=ids, labels=labels, fused="nll")
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=ids, fused="logprobs")
    model.lm_head.base_layer = torch.nn.Identity()  # as PEFT's LoRA layers carry it
    with pytest.raises(ValueError, match="adapter"):
        model(input_ids=ids, labels=labels, fused="logprobs")


def test_a_real_lora_adapter_on_the_head_is_refused_and_one_elsewhere_counts():
    peft = pytest.importorskip("peft")
    ids, labels = batch()
    for target, message in (("lm_head", "adapter"), ("q_proj", None)):
        model = patch.patch_model(tiny_model())
        plain = model(input_ids=ids, labels=labels, fused="logprobs").logps
        config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config).eval()
        if message is not None:
            with pytest.raises(ValueError, match=message):
                wrapped(input_ids=ids, labels=labels, fused="logprobs")
            continue
        got = wrapped(input_ids=ids, labels=labels, fused="logprobs").logps
        torch.testing.assert_close(got, whole_logprobs(wrapped, ids, labels))
        assert not torch.allclose(got, plain)


def test_a_batch_with_nothing_scored():
    model = patch.patch_model(tiny_model())
    ids, labels = batch()[0], torch.full((4, 9), -100)
    out = model(input_ids=ids, labels=labels, fused="preference", ref_logps=torch.zeros(4), kind="ipo", beta=0.5)
    assert out.loss.item() == 1.0  # (0 − 1/(2β))²
    assert not any(g.any() for g in grads_of(out.loss, *model.parameters()) if g is not None)
    assert not model(input_ids=ids, labels=labels, fused="logprobs").logps.any()


def test_head_settings_from_configurations():
    class Text:
        model_type = "granite"
        logits_scaling = 8.0

    assert patch.head_settings(Text()).keywords(1.0) == {"softcap": 0.0, "temperature": 8.0}
    Text.logits_scaling, Text.logit_scale = None, 0.25
    assert patch.head_settings(Text()).keywords(0.5) == {"softcap": 0.0, "temperature": 2.0}
    Text.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="soft cap"):
        patch.head_settings(Text()).keywords(1.0)
    Text.logit_scale = None
    assert patch.head_settings(Text()).keywords(1.0) == {"softcap": 30.0, "temperature": 1.0}
