"""Show the examples of docstrings as code: each block of ``>>>`` lines and what it prints is put between fences."""

import re

import griffe

BLOCK = re.compile(r"^(>>> .*(?:\n.+)*)", re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """For mkdocstrings, whose Google style takes only what stands under a heading "Examples" for code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = BLOCK.sub(r"```pycon\n\1\n```", obj.docstring.value)
