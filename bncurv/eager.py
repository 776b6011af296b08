"""Compiled modules run eagerly while bncurv watches. The compiler's stance is one per process: last out restores it."""

from __future__ import annotations

import sys
from typing import Any

_WATCHERS: dict[object, None] = {}
_BEFORE: dict[str, Any] = {}  # "stance": the one found by the first watcher


def run_eagerly(watcher: object) -> None:
    """From now on, until `release`; asking for it would import the compiler where nobody has, so not then."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return
    _WATCHERS[watcher] = None
    found = compiler._stance
    if found.stance != "force_eager":
        _BEFORE.setdefault("stance", found)
        compiler._set_stance(type(found)("force_eager"))


def release(watcher: object) -> None:
    """This watcher is done; may be called again, also if it never began."""
    _WATCHERS.pop(watcher, None)
    if not _WATCHERS and "stance" in _BEFORE:
        sys.modules["torch._dynamo.eval_frame"]._set_stance(_BEFORE["stance"])
        _BEFORE.pop("stance", None)
