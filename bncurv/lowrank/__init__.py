"""The GGN as a low-rank matrix, G = Vᵀ V with one row V[k] per component: spectrum, eigenvectors, products, solves.

`GGN` is what both forms share (``base.py``); `LowRank` holds V (``rows.py``), `MatrixFreeGGN` the network's graph
(``matrix_free.py``). ``lanczos.py`` has the iterations that need products only.
"""

from bncurv.lowrank.base import GGN
from bncurv.lowrank.lanczos import leading, one_blas_thread
from bncurv.lowrank.matrix import gram
from bncurv.lowrank.matrix_free import BatchOperator, MatrixFreeGGN
from bncurv.lowrank.rows import DIRECT_SIZE, LowRank
from bncurv.lowrank.steps import Damping, positive
from bncurv.lowrank.vectors import Vector
from bncurv.precision import LANCZOS_TOLERANCE

__all__ = [
    "DIRECT_SIZE",
    "GGN",
    "LANCZOS_TOLERANCE",
    "BatchOperator",
    "Damping",
    "LowRank",
    "MatrixFreeGGN",
    "Vector",
    "gram",
    "leading",
    "one_blas_thread",
    "positive",
]
