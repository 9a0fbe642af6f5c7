"""From a run folder to the plain data of a page; trees stream through and are forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from advgame.errors import InputError
from advgame.report.series import Curves, curves_of
from advgame.report.signs import Sign, signs_of
from advgame.report.tree_stats import TreeStats
from advgame.report.tree_store import TreeStore
from advgame.run import names
from advgame.run.folder import RunFolder
from advgame.run.recorder import read_metrics, read_trees, tree_files
from advgame.run.tree_codec import RecordedTree

PACKED_LIMIT = 64 * 2**20
"""Characters of packed tree text that a page may hold, over all runs; above it, trees are thinned out evenly."""

Progress = Callable[[int], None]
"""Called with the number of tree files read."""


@dataclass(frozen=True)
class Trees:
    """How many trees a run recorded, and the index of those that the page holds."""

    recorded: int
    index: dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run as a page shows it; everything is JSON-able but `curves` and `signs`."""

    name: str
    purpose: str
    facts: list[tuple[str, str]]
    config: str
    settings: dict[str, Any]
    summary: list[tuple[str, float | None, float | None]]
    curves: Curves
    judges: list[dict[str, Any]]
    signs: list[Sign]
    seconds: dict[str, float]
    energy: dict[str, float]
    trees: Trees
    warnings: list[str]


def open_run(path: Path) -> RunFolder:
    """The run to be read. Raises InputError where it is none, before anything long begins."""
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder; give the folder that `advgame train` printed")
    folder = RunFolder.open(path)
    if not folder.metrics.is_file():
        raise InputError(f"{folder.metrics}: missing; not a complete run folder")
    return folder


def collect(
    folder: RunFolder,
    write: Callable[[int, str], None],
    *,
    name: str,
    most_trees: int,
    most_characters: int = PACKED_LIMIT,
    progress: Progress | None = None,
) -> RunData:
    """Reads a run, which the page calls `name`. `write(chunk, text)` takes the packed trees as they come, at most about
    `most_trees` of them and `most_characters` of text.

    A tree file that cannot be read to its end is named in `warnings`; what came before the damage counts. Raises
    InputError when the settings or the metrics are damaged.
    """
    settings, config = _settings(folder)
    rows = read_metrics(folder.metrics)
    warnings: list[str] = []
    stats, store = TreeStats(), TreeStore(write)
    files = tree_files(folder.trees) if folder.trees.is_dir() else []
    share = _share(files, most_trees, most_characters, warnings)
    recorded = 0
    for number, path in enumerate(files, 1):
        step = int(path.name.split(".", 1)[0])
        for one in _readable(path, warnings):
            stats.add(step, one.tree)
            if math.floor((recorded + 1) * share) > math.floor(recorded * share):
                store.add(one)
            recorded += 1
        if progress is not None:
            progress(number)
    store.flush()
    curves = curves_of(rows) | stats.curves()
    judges = stats.table()
    zero_sum = bool(settings.get("game", {}).get("self_play"))
    return RunData(
        name=name,
        purpose=_purpose(folder, settings),
        facts=_facts(folder, settings, rows),
        config=config,
        settings=_flat(settings),
        summary=_summary(folder),
        curves=curves,
        judges=judges,
        signs=signs_of(curves, judges, 2.0 if zero_sum else 10.0),
        seconds={key: sum(series.values) for key, series in curves.items() if key.startswith("seconds/")},
        energy=_energy(curves),
        trees=Trees(recorded, store.index()),
        warnings=warnings,
    )


def plain(run: RunData) -> dict[str, Any]:
    """The JSON of a run without curves and tree index, which the page holds packed."""
    kept = {key: value for key, value in vars(run).items() if key not in ("curves", "signs", "trees")}
    trees = {"recorded": run.trees.recorded, "shown": run.trees.index["count"]}
    return {**kept, "signs": [asdict(sign) for sign in run.signs], "trees": trees}


def _readable(path: Path, warnings: list[str]) -> Iterator[RecordedTree]:
    try:
        yield from read_trees(path)
    except InputError as error:
        warnings.append(f"not all trees could be read: {error}")


def _share(files: list[Path], most_trees: int, most_characters: int, warnings: list[str]) -> float:
    """The share of the trees that the page holds, judged by the number and the packed size of the middle file's."""
    if not most_trees or not files:
        return 0.0
    size: list[int] = []
    probe = TreeStore(lambda _, text: size.append(len(text)))
    for one in _readable(files[len(files) // 2], []):
        probe.add(one)
    probe.flush()
    expected, packed = len(probe) * len(files), sum(size) * len(files)
    share = min(1.0, most_trees / max(1, expected), most_characters / max(1, packed))
    if share < 1:
        held = round(share * expected)
        warnings.append(f"of about {expected} trees about {held}, evenly spread, are in the browser; charts count all")
    return share


def _settings(folder: RunFolder) -> tuple[dict[str, Any], str]:
    try:
        text = folder.config.read_text(encoding="utf-8")
        settings = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{folder.config}: not YAML ({error}); restore the run's resolved settings") from error
    if not isinstance(settings, dict):
        raise InputError(f"{folder.config}: must be a mapping of settings")
    return settings, text


def _purpose(folder: RunFolder, settings: Mapping[str, Any]) -> str:
    """As the notice in the folder states it: the settings leave it out in the tiny world."""
    head, tail = "Stated purpose of this run: ", "\n\n- "
    if folder.notice.is_file():
        _, found, rest = folder.notice.read_text(encoding="utf-8").partition(head)
        if found:
            return rest.partition(tail)[0].strip()
    return str((settings.get("run") or {}).get("purpose") or "none stated")


def _facts(folder: RunFolder, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    starts = json.loads(folder.environment.read_text(encoding="utf-8"))["starts"]
    first = starts[0]
    planned = (settings.get("run") or {}).get("steps")
    done = sum(names.STEP_SECONDS in row for row in rows)
    seconds = sum(row.get(names.STEP_SECONDS) or 0.0 for row in rows)
    commit = first.get("git_commit")
    facts = [
        ("steps", f"{done} of {planned}" if planned and planned != done else str(done)),
        ("time", f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"),
        ("started", str(first.get("started")).replace("T", " ").replace("+00:00", " UTC")),
        ("starts", str(len(starts)) if len(starts) > 1 else ""),
        ("objective", str((settings.get("learn") or {}).get("objective", ""))),
        ("judge", str((settings.get("judge") or {}).get("kind", ""))),
        ("seed", str((settings.get("run") or {}).get("seed", ""))),
        ("advgame", str(first.get("advgame"))),
        ("commit", f"{commit[:10]}{' with changes' if first.get('git_dirty') else ''}" if commit else ""),
    ]
    return [(key, value) for key, value in facts if value]


def _summary(folder: RunFolder) -> list[tuple[str, float | None, float | None]]:
    """(label, before, after) of `summary.json`; nothing for a run that has not ended."""
    if not folder.summary.is_file():
        return []
    try:
        values = dict(json.loads(folder.summary.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder.summary}: not JSON ({error}); remove it, or restore it") from error
    table = [(label, values.get(f"{name}_before"), values.get(f"{name}_after")) for name, label in names.LABELS.items()]
    return [row for row in table if row[1:] != (None, None)]


def _energy(curves: Curves) -> dict[str, float]:
    """What a run used in all, by label; only `(J)` is measured energy, processor seconds are always recorded."""
    labels = {"energy/joules": "energy, all (J)", "energy/co2e_g": "CO2e (g)", "energy/process_cpu_s": "processor (s)"}
    for key in curves:
        if key.startswith("energy/") and key.endswith("_joules"):
            labels[key] = f"energy, {key.removeprefix('energy/').removesuffix('_joules').replace('/', ' ')} (J)"
    return {label: sum(curves[key].values) for key, label in labels.items() if key in curves}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
