"""Packages and the optional C++ extension; everything else about the distribution stands in pyproject.toml."""

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
    """Builds the extension if a compiler is there; says why not otherwise, and lets the install go on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._explain(error)

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self._explain(error)

    def copy_extensions_to_source(self) -> None:
        try:
            super().copy_extensions_to_source()
        except Exception as error:  # an editable install after a failed build has no file to copy
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        print(f"advgame_kernels._native is not built, torch code is used instead: {error}")


def extensions() -> list:
    """The one extension, or nothing without pybind11."""
    if Pybind11Extension is None:
        print("advgame_kernels._native is not built, torch code is used instead: pybind11 is missing")
        return []
    flags = ["/O2"] if platform.system() == "Windows" else ["-O3", "-pthread", "-Wall", "-Wno-psabi"]
    return [
        Pybind11Extension(
            "advgame_kernels._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=[] if platform.system() == "Windows" else ["-pthread"],
        )
    ]


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
