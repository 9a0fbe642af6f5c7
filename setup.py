"""Packages and the optional C++ extensions; everything else about the distribution stands in pyproject.toml."""

from __future__ import annotations

import platform
from glob import glob

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # a build without isolation where pybind11 is missing: the package works without the extension
    Pybind11Extension = None


class OptionalBuildExt(build_ext):
    """Builds the extensions if a compiler is there; says why not otherwise, and lets the install go on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._explain(error)

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self._explain(error, ext.name)

    def copy_extensions_to_source(self) -> None:
        try:
            super().copy_extensions_to_source()
        except Exception as error:  # an editable install after a failed build has no file to copy
            self._explain(error)

    def _explain(self, error: Exception, name: str = "every extension") -> None:
        print(f"not built: {name} ({error}); {WITHOUT}")


WITHOUT = "without them CPU kernels are torch code, and vLLM engines take weights through vLLM's loader"


def extensions() -> list:
    """CPU kernels and the host side of publishing, or nothing without pybind11."""
    if Pybind11Extension is None:
        print(f"not built: every extension (pybind11 is missing); {WITHOUT}")
        return []
    windows = platform.system() == "Windows"
    flags = ["/O2"] if windows else ["-O3", "-pthread", "-Wall", "-Wno-psabi"]

    def extension(name: str, folder: str, *more: str):
        return Pybind11Extension(
            name,
            sorted(glob(f"{folder}/*.cpp")),
            depends=sorted(glob(f"{folder}/*.h") + glob(f"{folder}/*.inl")) + list(more),
            include_dirs=[folder],
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=[] if windows else ["-pthread", *(["-ldl"] if platform.system() == "Linux" else [])],
        )

    kernels = extension("advgame_kernels._native", "csrc")
    if platform.system() != "Linux":  # memfd, /proc
        return [kernels]
    return [kernels, extension("advgame.publish._host", "csrc/host", "csrc/parallel.h")]


# Folders of templates are packages to setuptools, though not to Python.
packages = find_namespace_packages(".", include=["advgame", "advgame.*"], exclude=["*.__pycache__"])
packages += find_packages("kernels", include=["advgame_kernels", "advgame_kernels.*"])

setup(
    packages=packages,
    package_dir={"advgame": "advgame", "advgame_kernels": "kernels/advgame_kernels"},
    package_data={"": ["*.md", "*.yaml", "*.html", "*.css", "*.js"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
