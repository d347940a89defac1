"""Text in pictures and plots, drawn as it is: names of classes, runs and studies may have any characters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

LONGEST = 60
"""Characters of a name in a plot, from which it is cut: longer ones would leave no room for the plot."""


def one_line(text: str, longest: int | None = LONGEST) -> str:
    """Return text in one line that a font can draw: without control characters, cut after ``longest`` characters."""
    text = str(text).encode("utf-8", "replace").decode()  # a lone surrogate is no character
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


@contextlib.contextmanager
def literal_text() -> Iterator[None]:
    """Have matplotlib draw text as it is inside the block: no formulas between ``$``, no warning of missing glyphs.

    A character that the font lacks is drawn as a box.
    """
    # Imported here, since importing matplotlib takes a second.
    import matplotlib

    with (
        matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield
