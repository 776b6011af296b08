"""Adapters where their library is missing (where it is not, `test_adapter_*.py`)."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["curvlinops", "laplace"])
def test_a_missing_library_is_told(name, monkeypatch):
    adapter = f"bncurv.adapters.{name}"
    for module in [m for m in sys.modules if m == adapter or m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{adapter} needs .*: pip install 'bncurv\[{name}\]'"):
        importlib.import_module(adapter)
