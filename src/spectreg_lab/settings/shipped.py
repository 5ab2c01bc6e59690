"""The studies that come with the package, by name."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parents[1] / "studies"


def studies() -> dict[str, Path]:
    """The file of every study that came with the package, or lies in its checkout."""
    shipped = PACKAGE / "shipped"
    return {path.stem: path for path in sorted((shipped if shipped.is_dir() else CHECKOUT).glob("*.toml"))}


def find(study: Path) -> Path:
    """``study`` where there is such a file, else the one that came with the package under that name."""
    return study if study.exists() else studies().get(study.name.removesuffix(".toml"), study)
