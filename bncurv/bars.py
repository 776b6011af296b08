"""Progress bars: in a notebook its own, elsewhere of characters."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():  # in a notebook without ipywidgets, where it falls back to characters
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
