"""Build of the C++ module and mapping of ``kernels/`` to ``cdistill.kernels``; the rest is in pyproject.toml."""

import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).parent


class OptionalBuildExt(build_ext):
    """Build ``cdistill._C``; without a working compiler install the package anyway and say so in one line."""

    def run(self):
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            reason = " ".join(str(error).split())
            self.warn(f"cdistill._C was not built ({reason}); CPU ops will use the torch implementation")
            self.extensions = []


openmp = ["-fopenmp"] if platform.system() == "Linux" else []
extension = Pybind11Extension(
    "cdistill._C",
    sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fvisibility=hidden", *openmp],
    extra_link_args=openmp,
)

ParallelCompile("CDISTILL_BUILD_JOBS").install()
setup(
    packages=[*find_packages(include=["cdistill", "cdistill.*"]), "cdistill.kernels"],
    package_dir={"cdistill.kernels": "kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": OptionalBuildExt},
)
