"""`pip install .` without extras: a kernel library that needs torch alone, a command that says what it lacks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Everything of the extras is hidden: what imports then needs torch (and Triton, where it is there) alone.
HIDE = """
import sys

EXTRAS = {"transformers", "pydantic", "yaml", "rich", "jaxtyping", "safetensors", "pyarrow", "matplotlib",
          "tensorboard", "hypothesis", "pytest", "tokenizers", "huggingface_hub"}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def run(installed, code):
    bootstrap = f"{HIDE}\nsys.path.insert(0, {str(installed)!r})\n{code}"
    # -P: not the repository, whose sources would answer in the installed package's place
    return subprocess.run([sys.executable, "-P", "-c", bootstrap], capture_output=True, text=True, cwd=installed)


@pytest.mark.slow
def test_the_kernel_library_alone(installed):
    done = run(
        installed,
        "import torch, advgame_kernels as k\n"
        "out = k.preference_loss(torch.zeros(4, requires_grad=True), torch.zeros(4), kind='sigmoid', beta=0.1)\n"
        "out.loss.backward()\n"
        "print(k.__file__, float(out.loss))",
    )
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout
    assert "0.693" in done.stdout


@pytest.mark.slow
def test_the_command_without_its_extra_says_what_to_install(installed):
    done = run(installed, "from advgame.cli import main\nsys.exit(main(['train', 'x.yaml']))")
    assert done.returncode == 2
    assert "pip install 'advgame[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_templates_and_worlds_texts_are_packaged(installed):
    for folder, name in (("game", "attacker_harmful.md"), ("world", "attacker_benign.md")):
        assert (installed / "advgame" / folder / "templates" / name).is_file()


@pytest.mark.slow
def test_the_reports_assets_are_packaged(installed):
    assets = ROOT / "advgame/report/assets"
    for path in assets.iterdir():
        assert (installed / "advgame/report/assets" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="no compiler")
def test_both_extensions_are_packaged(installed):
    done = run(
        installed,
        "import advgame_kernels.native as kernels, advgame.publish.host as host\n"
        "print(kernels._native.__file__, host._host.__file__, host.missing())",
    )
    assert done.returncode == 0, done.stderr
    native, extension, missing = done.stdout.split()
    assert native.startswith(str(installed / "advgame_kernels"))
    assert extension.startswith(str(installed / "advgame/publish"))
    assert missing == "None"
