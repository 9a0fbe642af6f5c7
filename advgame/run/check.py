"""What is checked before anything heavy loads: templates, seed files, tokenizers, engines, a cluster's room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedTokenizerBase

from advgame.config import Config
from advgame.errors import InputError
from advgame.game.prompts import Templates
from advgame.game.seeds import SeedFile, SeedPool
from advgame.game.stream import SeedStream
from advgame.game.tree import Category, Seed
from advgame.learn.zero_config import check_backend
from advgame.rollout.chat import load_tokenizer
from advgame.run.engines import check_engines

if TYPE_CHECKING:
    from advgame.cluster.ray_cluster import Cluster


@dataclass(frozen=True)
class Plan:
    """What was checked before anything heavy loads. cluster: what is reserved of one, until `close`."""

    config: Config
    templates: Templates
    seeds: SeedStream | None
    validation: dict[str, list[Seed]]
    tokenizers: dict[Path, PreTrainedTokenizerBase]
    cluster: Cluster | None = None

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.close()


def check(config: Config) -> Plan:
    """Reads templates, seed files and tokenizers; loads no weights. Raises InputError at the first problem."""
    game = config.game
    check_backend(config)
    templates = load_templates(config, None)  # a world's own take their place once it is open
    stream = None
    if config.data.train is not None:
        train = [SeedFile(config.data.train, config.data.columns, config.data.category)]
        stream = SeedStream(
            SeedPool(train, Category.HARMFUL),
            SeedPool(train, Category.BENIGN),
            config.run.seed,
            config.data.harmful,
            config.data.benign,
        )
    stems = [path.stem for path in config.data.validation]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"data.validation: two files are called {twice[0]!r}; metrics go by that name, rename one")
    validation = {
        path.stem: _head(SeedFile(path, config.data.columns, config.data.category), config.data.validation_limit)
        for path in config.data.validation
    }
    fields = {
        "attacker.model": None if game.skip_attacker or game.self_play else config.attacker.model,
        "defender.model": config.defender.model,
        "judge.model": config.judge.model if config.judge.kind == "llm" else None,
    }
    tokenizers = {
        folder: load_tokenizer(folder, name, remote_code=config.trust_remote_code)
        for name, folder in fields.items()
        if folder is not None
    }
    for name, folder in fields.items():
        if folder is not None:
            check_length(config, folder, name.split(".")[0])
    cluster = check_engines(config, {name: folder for name, folder in fields.items() if folder is not None})
    return Plan(config, templates, stream, validation, tokenizers, cluster)


def check_length(config: Config, folder: Path, player: str) -> None:
    """Raises InputError when completions alone would fill all of a model's positions."""
    max_tokens = getattr(config, player).sampling.max_tokens
    model = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens >= positions:
        raise InputError(
            f"{player}.sampling.max_tokens: {max_tokens} leaves no room for a prompt in the {positions} positions of "
            f"{folder}; lower it"
        )


def load_templates(config: Config, world_templates: Path | None) -> Templates:
    game = config.game
    return Templates.load(
        game.templates or world_templates,
        reasoning=game.reasoning,
        defender_reasoning=game.defender_reasoning,
        style=config.judge.style,
    )


def _head(file: SeedFile, limit: int) -> list[Seed]:
    """An even spread of at most `limit` seeds of a file."""
    stride = max(1, len(file) / limit)
    return [file[int(i * stride)] for i in range(min(limit, len(file)))]
