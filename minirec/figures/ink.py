"""What all figures share: colours, and text from outside made safe to draw."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"  # Okabe and Ito's, and a grey
LONGEST = 24  # letters of a token that a figure shows


def depth_colours(deepest: int) -> tuple[ListedColormap, BoundaryNorm]:
    """One colour per number of steps from 1 to `deepest`: light is shallow, dark is deep."""
    colours = plt.get_cmap("viridis_r")(np.linspace(0.08, 1.0, max(deepest, 2)))
    return ListedColormap(colours), BoundaryNorm(np.arange(0.5, max(deepest, 2) + 1), max(deepest, 2))


def readable_on(colour) -> str:
    """Black or white, whichever can be read on this colour."""
    return "black" if np.dot(colour[:3], (0.3, 0.6, 0.1)) > 0.55 else "white"


def plain(text, most: int | None = None) -> str:
    """Text from outside (a token, a label, a title) such that matplotlib draws its letters and nothing else.

    Dollar signs are escaped, so that no part is read as mathematics.  What cannot be drawn (control characters, lone
    surrogates) is written as its escape; line breaks stay where `most` is None.  Longer than `most` ends in "…".
    """
    text = str(text)
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    keep = "" if most else "\n"
    text = "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return text.replace("$", r"\$")


def word(text: str, most: int = LONGEST) -> str:
    """One token as it can be written into a cell: visible, on one line, cut after `most` letters."""
    return plain(text.strip() or "·", most)


def token_word(tokenizer, token: int, most: int = LONGEST) -> str:
    """The `word` of a token id."""
    return word(tokenizer.decode([token], skip_special_tokens=False), most)
