"""Documents: they build strictly, the settings' page is current, what they name exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from advgame import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"])


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; make test installs it")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("script", ["settings-reference.py", "measured-tables.py"])
def test_what_scripts_write_into_pages_is_current(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_message_in_troubleshooting_is_one_we_print():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "advgame").rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    phrases = [row.split("|")[1].strip() for row in page.splitlines() if row.startswith("| `")]
    assert phrases
    for phrase in phrases:
        assert phrase.strip("`") in source, phrase


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page):
    """Links, and paths in backticks that begin with one of our folders."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:advgame|bench|configs|csrc|docs|examples|kernels|scripts|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def blocks(text: str) -> list[str]:
    """What stands in code blocks without a language; those with one (YAML, scripts) are other tests'."""
    found = re.findall(r"^ *```(.*?)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in found if not language]


def commands() -> list[tuple[str, str]]:
    """Every `advgame ...` line in a code block, continuation lines joined, variables before it left out."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"(?:^|\s)#", line)[0].strip().removeprefix(".venv/bin/")
                line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
                if line.startswith("advgame "):
                    found.append((page.name, " ".join(line.split())))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page, line):
    """The command exists and takes these options; a config that a command names exists and takes its overrides."""
    words = shlex.split(line)[1:]
    arguments, overrides = cli.build_parser().parse_known_args(words)
    config = getattr(arguments, "config", None)
    if config is not None:
        from advgame.config import load_config
        from advgame.entry import placed

        if "cluster" in arguments:
            overrides = placed(arguments, overrides)
        load_config(ROOT / config, overrides)
    else:
        assert not overrides


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"advgame \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert importlib.util.find_spec("advgame") is not None
