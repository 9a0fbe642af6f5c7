"""Puts a page together: one HTML file with its own style, script and data, which asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import IO, Any

from advgame import __version__
from advgame.report.collect import RunData, plain
from advgame.report.panels import panels_for
from advgame.report.series import packed, thin
from advgame.report.tree_store import FLAGS, pack
from advgame.run import names

SCRIPTS = ("dom", "packed", "axes", "charts", "stack", "path", "panels", "overview", "tree_view", "trees", "main")
"""The page's modules in `assets/`, in the order in which they use each other."""

_ASSETS = resources.files("advgame.report") / "assets"


def write_page(out: Path, runs: Sequence[RunData], chunks: IO[str], title: str) -> None:
    """Writes `out` in one step. `chunks`: a text file with the chunk elements (`chunk_element`) of all runs."""
    metrics = {metric for run in runs for metric in run.curves}
    data = {
        "title": title,
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "runs": [plain(run) for run in runs],
        "panels": [asdict(panel) for panel in panels_for(metrics)],
        "flags": FLAGS,
        "stages": [names.stage_seconds(stage) for stage in names.STAGES],
    }
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(f"{name}.js") for name in SCRIPTS) + "\n})();\n"
    style = _asset("report.css")
    curves = "".join(_data_element(f"curves-{i}", pack(_curves(run))) for i, run in enumerate(runs))
    head, body = (
        Template(_asset("page.html"))
        .substitute(
            title=_text(title),
            # Only this script and this style may run: an attack's text that slipped through escaping could not.
            policy=f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'",
            style=style,
            script=script,
            data=script_json(data),
            curves=curves,
            indexes="".join(_index_elements(i, run) for i, run in enumerate(runs)),
            chunks="\0",
        )
        .split("\0")
    )
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(head)
        chunks.seek(0)
        shutil.copyfileobj(chunks, file, 1 << 20)
        file.write(body)
    temporary.replace(out)


def chunk_element(run: int, chunk: int, text: str) -> str:
    """The element that holds one chunk of trees."""
    return _data_element(f"trees-{run}-{chunk}", text)


def script_json(data: Any) -> str:
    """JSON that may stand within `<script>`: no `<`, `>` and `&`, so that no text can end the element."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _curves(run: RunData) -> bytes:
    return json.dumps({name: packed(thin(series)) for name, series in run.curves.items()}).encode()


def _index_elements(number: int, run: RunData) -> str:
    index = run.trees.index
    facts = {
        "count": index["count"],
        "chunks": index["chunks"],
        "types": {name: column["type"] for name, column in index["columns"].items()},
    }
    columns = (_data_element(f"index-{number}-{name}", column["data"]) for name, column in index["columns"].items())
    return f'<script type="application/json" id="index-{number}">{script_json(facts)}</script>\n' + "".join(columns)


def _data_element(name: str, base64_text: str) -> str:
    return f'<script type="text/plain" id="{name}">{base64_text}</script>\n'


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
