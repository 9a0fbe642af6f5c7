"""The command line in this process, for tests of what it refuses."""

from advgame import cli


def fails(capsys, *words):
    """The one line that `advgame WORDS` ends with when its input is bad."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("advgame: ")
    assert err.count("\n") == 1
    return err
