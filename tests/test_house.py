"""The layout's promises: a cheap import, one direction of imports, the kernels mount, an installable package."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import cdistill
from cdistill._moved import MOVED
from cdistill.runtime.errors import RunError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = ("torch", "triton", "deepspeed", "transformers", "datasets", "matplotlib", "lmms_eval")

# A room may import itself, the rooms it lists, what those list, and the errors.
ALLOWED = {
    "errors": set(),
    "choices": set(),
    "files": set(),
    "manifest": set(),
    "kernels": set(),
    "ops": {"kernels", "choices"},
    "nn": {"ops"},
    "families": {"_plugins"},
    "vat": {"ops", "families"},
    "models": {"vat", "files", "manifest"},
    "_register": {"models"},
    "serving": {"models"},
    "_moved": set(),
    "_plugins": set(),
    "menu": {"choices"},
    "doctor": {"ops", "runtime"},
    "data": {"choices", "_plugins", "files"},
    "builtin": {"data"},
    "runtime": {"data", "manifest"},
    "formats": {"models", "data", "serving"},
    "train": {"models", "builtin", "runtime", "eval", "menu"},
    "plan": {"train"},
    "init": {"plan"},
    "eval": {"models", "builtin", "analysis", "runtime"},
    "analysis": set(),
    "attention": {"eval"},
    "demo": {"attention", "reproduce"},
    "reproduce": {"train", "analysis", "eval"},
    "report": {"train", "analysis"},
    "cli": {"demo", "init", "attention", "reproduce", "report", "doctor", "formats"},
    "__main__": {"cli"},
}


def reachable(room: str) -> set[str]:
    found = {room, "errors"}
    for below in ALLOWED[room]:
        found |= reachable(below)
    return found


def module_of(path: Path) -> str:
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    folders = ["cdistill", "kernels"] if folders == ["kernels"] else folders
    return ".".join(folders if name == "__init__" else [*folders, name])


def imported_names(path: Path) -> set[str]:
    """What a file imports, in functions too: modules, and of each all that is taken from it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: relative import climbs out of its room"
            here = [module_of(path.with_name("__init__.py"))] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def imported_rooms(path: Path, package: str) -> set[str]:
    parts = [name.split(".") for name in imported_names(path)]
    return {of[1] for of in parts if of[0] == package and len(of) > 1}


def sources():
    for path in sorted((ROOT / "cdistill").rglob("*.py")):
        relative = path.relative_to(ROOT / "cdistill")
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield relative.parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield "kernels", path


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(ROOT))) for r, p in sources()])
def test_imports_point_one_way(room, path):
    rooms = imported_rooms(path, "cdistill") & ALLOWED.keys()
    assert rooms <= reachable(room), f"{path.relative_to(ROOT)} imports {rooms - reachable(room)} from above"


def test_no_imports_go_in_a_circle():
    """Nor do those inside functions, where a circle would only be hidden."""
    modules = {module_of(path): path for _, path in sources()}
    imports = {name: (imported_names(path) & modules.keys()) - {name} for name, path in modules.items()}
    assert imports["cdistill.kernels.backend"] >= {"cdistill.kernels.attention_slice"}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_the_page_says_what_each_room_may_import():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert {room: set(re.findall(r"`(\w+)`", below)) for room, below in rows} == ALLOWED


@cache
def text_of_tests() -> str:
    return "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text, tests = page.read_text(), text_of_tests()
    names = re.findall(r"(?:cdistill|kernels|csrc|tests|benchmarks|examples|docs)/[\w./-]*\w", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    missing += [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
    assert not missing


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60


@pytest.mark.parametrize("folder", ["cdistill", "kernels", "csrc", "benchmarks", "examples", "tests"])
def test_files_and_functions_have_a_size_that_can_be_read(folder):
    """Kernels' functions aside, whose signatures are long."""
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".cpp", ".h")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
    for path in files if folder != "kernels" else ():
        tree = ast.parse(path.read_text()) if path.suffix == ".py" else ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                assert size <= MOST_LINES_OF_A_FUNCTION, f"{path.name}: {node.name} has {size} lines"


def test_every_dependency_has_a_version_that_make_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["lora"], *extras["quantization"], *extras["dev"]]
    names = {re.match(r"[\w-]+", each)[0].lower() for each in needed} - {"cdistill"}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned


def test_import_is_cheap():
    code = f"import cdistill, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MOVED)
def test_modules_that_have_moved_go_by_their_old_names(name):
    module = import_module(name)
    assert module is import_module(MOVED[name]) and module.__spec__.name == MOVED[name]


def test_ops_import_nothing_heavy_when_they_are_imported_or_called():
    code = """
import sys, torch, cdistill.ops as ops
q = torch.randn(1, 2, 8, 16, requires_grad=True)
at = torch.arange(4)[None]
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
both = ops.linear_distillation(hidden, head, hidden.detach(), head.detach(), at[0])
out, loss = ops.attention_with_alignment(q, q, q, torch.rand(1, 4, 4), at, at)
(ops.attention_slice(q, q, at, at).sum() + ops.attention_alignment(q, q, torch.rand(1, 4, 4), at, at).sum() + loss.sum()
    + out.sum() + both.ce + both.kd).backward()
print([m for m in ('deepspeed', 'transformers', 'matplotlib', 'sympy', 'torch._dynamo') if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_kernels_stays_a_folder_without_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("directory", [ROOT, ROOT / "tests", Path("/")])
def test_kernels_are_mounted_from_any_directory(directory):
    code = "import cdistill.kernels.attention_slice as m; print(m.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=directory)
    assert out.stdout.strip() == "cdistill.kernels.attention_slice"


def test_package_folder_called_kernels_is_not_shadowed():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "True"


def test_errors_have_one_base():
    """A ValueError of ours is an InputError, but in files that travel without the package."""
    alone = {"models/taf.py", "models/readback.py", "serving/to_openvino.py"}
    for path in [*(ROOT / "cdistill").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        if not str(path).endswith(tuple(alone)):
            assert not re.search(r"(raise|return) ValueError\(", path.read_text()), path
    assert issubclass(cdistill.InputError, ValueError) and issubclass(cdistill.InputError, cdistill.CdistillError)
    assert issubclass(RunError, RuntimeError) and issubclass(RunError, cdistill.CdistillError)
