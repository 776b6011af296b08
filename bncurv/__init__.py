"""bncurv: exact curvature through train-mode BatchNorm, at a cost linear in the batch size.

Start with `curvature` (one call on an untouched model) or `extend` (BackPACK's ``with backpack(...)`` gesture).
The idea of the package is told at the head of ``gate.py`` and ``engine.py``. Importing it lets BackPACK's
``with backpack(...)`` call two functions of bncurv where a block begins and ends (``context.py``).
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bncurv.api import at, curvature
from bncurv.context import watch_blocks
from bncurv.extension import extend, unextend
from bncurv.gate import register_coupled
from bncurv.influence import InfluenceGrad, InfluenceProjection
from bncurv.layers import register_layer
from bncurv.losses import register_loss
from bncurv.lowrank import GGN, LowRank, MatrixFreeGGN
from bncurv.lowrank_quantity import LowRankGGN
from bncurv.point import Point
from bncurv.quantities import (
    ComponentDiagGGNExact,
    ComponentGrad,
    ComponentL2Grad,
    ComponentVariance,
    DiagGGNExact,
    SqrtGGNExact,
    SumComponentGradSquared,
)
from bncurv.report import CouplingReport
from bncurv.results import Results
from bncurv.sampling import ComponentDiagGGNMC, DiagGGNMC, SqrtGGNMC
from bncurv.slow import SlowPathWarning

__version__ = "0.1.0"

watch_blocks()

__all__ = [
    "ComponentDiagGGNExact",
    "ComponentDiagGGNMC",
    "ComponentGrad",
    "ComponentL2Grad",
    "ComponentVariance",
    "CouplingReport",
    "DiagGGNExact",
    "DiagGGNMC",
    "GGN",
    "InfluenceGrad",
    "InfluenceProjection",
    "LowRank",
    "LowRankGGN",
    "MatrixFreeGGN",
    "Point",
    "Results",
    "SlowPathWarning",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumComponentGradSquared",
    "at",
    "curvature",
    "extend",
    "register_coupled",
    "register_layer",
    "register_loss",
    "unextend",
]

_MODULES = ["adapters", "layers", "losses", "plots", "quantities", "reference"]  # public too, imported when asked for


def __dir__() -> list[str]:
    """What is public: the inner modules are no completions."""
    return [*__all__, *_MODULES, "__version__"]


if not TYPE_CHECKING:  # to which it would say that every name is there

    def __getattr__(name: str) -> ModuleType:
        if name in _MODULES:
            return import_module(f"bncurv.{name}")
        raise AttributeError(f"module 'bncurv' has no attribute '{name}'")
