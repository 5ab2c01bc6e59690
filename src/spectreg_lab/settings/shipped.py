"""The studies that come with the package, by name."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parents[1] / "studies"


def studies() -> dict[str, Path]:
    """The file of every study that came with the package, or lies in its checkout."""
    shipped = PACKAGE / "shipped"
    return {path.stem: path for path in sorted((shipped if shipped.is_dir() else CHECKOUT).glob("*.toml"))}


def find(study: Path) -> Path:
    """``study`` where there is such a file, else the one that came with the package under that name.

    A folder here that is called like a study does not hide it; one that is given by its path, ``runs/digits``, is none.
    """
    named = not study.exists() or (study.is_dir() and len(study.parts) == 1)
    return studies().get(study.name.removesuffix(".toml"), study) if named else study
