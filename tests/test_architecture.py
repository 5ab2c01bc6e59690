"""The wall between library and experiments, and the order in which modules import each other."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import spectreg

SOURCE = Path(spectreg.__file__).parents[1]
LIBRARY = [
    ("alarms", "checkpoints", "linalg", "penalties", "schedules"),
    ("maps",),
    ("weights",),
    ("products",),
    ("measures",),
    ("lipschitz", "baselines"),
    ("power_iteration",),
    ("optimizers", "summary"),
    ("following",),
    ("caps", "regularizer"),
    ("integrations",),
]
LAB = [
    ("settings",),
    ("storage",),
    ("data",),
    ("models",),
    ("methods",),
    ("measures",),
    ("training",),
    ("studies", "spectra"),
    ("exhibits",),
    ("statistics",),
    ("figures",),
    ("tables",),
    ("page",),
    ("cli",),
    ("__main__",),
]
LEVEL = {
    package: {name: level for level, names in enumerate(order) for name in names}
    for package, order in {"spectreg": LIBRARY, "spectreg_lab": LAB}.items()
}
# What only reads a model never reaches for the vectors of a regularizer.
APART = {"measures", "lipschitz", "baselines"}


def imports(path: Path) -> list[str]:
    """Every module that a file names in an import, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def modules() -> list[tuple[str, str, Path]]:
    """Package, room and path of every file but the packages' own first ones."""
    paths = [(package, path) for package in LEVEL for path in sorted((SOURCE / package).rglob("*.py"))]
    rooms = [
        (package, path.relative_to(SOURCE / package).parts[0].removesuffix(".py"), path) for package, path in paths
    ]
    return [(package, room, path) for package, room, path in rooms if room != "__init__"]


def fresh(code: str) -> str:
    """What ``code`` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("package", "room", "path"), [pytest.param(*m, id=str(m[2].relative_to(SOURCE))) for m in modules()]
)
def test_a_module_imports_only_rooms_below_its_own(package, room, path):
    level = LEVEL[package]
    assert room in level, f"{room} has no place in the order of {package}"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] != room and parts[1] in level:
            assert level[parts[1]] < level[room], f"{package}.{room} imports {parts[1]}"
            assert not (package == "spectreg" and room not in APART and parts[1] in APART), f"{room} imports a measure"


@pytest.mark.parametrize("path", sorted((SOURCE / "spectreg").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_never_imports_the_lab(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "spectreg_lab"]


def test_importing_spectreg_loads_nothing_of_its_own_but_torch_and_jaxtyping():
    code = "import torch, jaxtyping, sys; before = set(sys.modules); import spectreg; print(*set(sys.modules) - before)"
    strangers = {name.split(".")[0] for name in fresh(code).split()} - {"spectreg", "torch", "jaxtyping"}
    assert strangers <= set(sys.stdlib_module_names)


def test_help_does_not_load_torch():
    code = "import sys; sys.argv = ['spectreg', '--help']\nfrom spectreg_lab.cli import app\n"
    assert fresh(code + "try: app()\nexcept SystemExit: pass\nprint('torch' in sys.modules)").endswith("False\n")


def test_all_is_what_is_public():
    names = [n for n, x in vars(spectreg).items() if not n.startswith("_") and not isinstance(x, ModuleType)]
    assert sorted(spectreg.__all__) == sorted(names)
