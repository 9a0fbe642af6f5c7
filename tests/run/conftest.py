"""Fixtures of several files here."""

import pytest

from advgame.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path, "run", "a: 1\n", purpose="a test") as folder:
        yield folder
