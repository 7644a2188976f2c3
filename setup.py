"""Build of the C++ module and the mapping of ``kernels/`` to ``cdistill.kernels``; everything else is in pyproject.toml."""

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent


class OptionalBuildExt(build_ext):
    """Build ``cdistill._C``; without a working compiler install the package anyway and say so in one line."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # distutils raises many unrelated types for "no compiler"
            self.warn(f"cdistill._C was not built ({error}); CPU ops will use the torch implementation")
            self.extensions = []


extension = Pybind11Extension(
    "cdistill._C",
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fvisibility=hidden"] if platform.system() == "Linux" else ["-O3"],
    extra_link_args=["-fopenmp"] if platform.system() == "Linux" else [],
)

setup(
    packages=[*find_packages(include=["cdistill", "cdistill.*"]), "cdistill.kernels"],
    package_dir={"cdistill.kernels": "kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": OptionalBuildExt},
)
