"""Small players as a learner holds them: model, average, optimizer, a few updates old."""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from advgame.run.train_state import PlayerState

FAMILIES = [(Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]


def model_of(family=0, tied=True, seed=0, **changes):
    config, cls = FAMILIES[family]
    sizes = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(seed)
    model = cls(config(**(sizes | changes)))
    with torch.no_grad():  # norms and biases are constants at first, and would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokenizer():
    words = {f"w{i}": i for i in range(23)} | {"<eos>": 23}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="<eos>")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def player_of(seed=0, steps=3, ema=True, model=None, tensor_lr=False, **options):
    model = model_of(seed=seed) if model is None else model
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), **options)
    player = PlayerState(model, tokenizer(), {}, optimizer, steps)
    for _ in range(steps):
        train(player)
    shadow = {name: torch.randn_like(p) for name, p in model.named_parameters()} if ema else {}
    return replace(player, shadow=shadow)


def train(player, seed=1):
    ids = torch.randint(0, 24, (2, 6), generator=torch.Generator().manual_seed(seed))
    player.model(input_ids=ids, labels=ids).loss.backward()
    player.optimizer.step()
    player.optimizer.zero_grad()


def tensors_of(player):
    found = {f"model/{name}": tensor for name, tensor in player.model.state_dict().items()}
    found |= {f"ema/{name}": tensor for name, tensor in player.shadow.items()}
    if player.optimizer is not None:
        for name, parameter in player.model.named_parameters():
            state = player.optimizer.state.get(parameter, {})
            found |= {f"{entry}/{name}": value for entry, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name
