"""The command ``spectreg``, where the packages it needs may be missing."""

import sys


def main() -> None:
    """Run the command, or say what to install for it."""
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"spectreg {version('spectreg')}")
        return
    try:
        from spectreg_lab.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("spectreg", "spectreg_lab"):
            raise
        print(f"spectreg: the command needs {error.name}: pip install 'spectreg[lab]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
