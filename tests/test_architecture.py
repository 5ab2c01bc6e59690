"""The wall between library and experiments, and the order in which modules import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spectreg

SOURCE = Path(spectreg.__file__).parents[1]
LAYERS = [
    ("files", "provenance"),
    ("config",),
    ("data",),
    ("models",),
    ("methods",),
    ("train",),
    ("measures",),
    ("store",),
    ("runs",),
    ("pool",),
    ("studies",),
    ("execution", "search", "display", "plan", "spectra"),
    ("exhibits",),
    ("report",),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> list[str]:
    """Every module that a file names in an import, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def lab_modules() -> list[Path]:
    """Every file of the experiments but the package's own first one."""
    return [
        path
        for path in sorted((SOURCE / "spectreg_lab").rglob("*.py"))
        if path.parent.name != "spectreg_lab" or path.stem != "__init__"
    ]


def of(path: Path) -> str:
    """The module or subpackage of the lab that a file belongs to."""
    return path.relative_to(SOURCE / "spectreg_lab").parts[0].removesuffix(".py")


def fresh(code: str) -> str:
    """What ``code`` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", lab_modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_of_the_lab_imports_only_lower_ones(path):
    mine = of(path)
    assert mine in LEVEL, f"{mine} has no place in the order"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "spectreg_lab" and len(parts) > 1 and parts[1] != mine and parts[1] in LEVEL:
            assert LEVEL[parts[1]] < LEVEL[mine], f"{mine} imports {parts[1]}"


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
    assert sorted(spectreg.__all__) == sorted(set(spectreg.__all__))
    assert all(hasattr(spectreg, name) for name in spectreg.__all__)
