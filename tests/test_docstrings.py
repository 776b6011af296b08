"""The examples in the docstrings run, and there are some."""

import doctest
import importlib
import pkgutil

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import bncurv

matplotlib.use("Agg")
MODULES = ["bncurv", *(f"bncurv.{m.name}" for m in pkgutil.iter_modules(bncurv.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    plt.close("all")
    assert result.failed == 0  # doctest prints what it expected and got


def test_the_two_gestures_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    for gesture in (bncurv.curvature, bncurv.extend):
        assert finder.find(gesture)[0].examples
