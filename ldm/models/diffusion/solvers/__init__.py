"""The solvers by name: what each takes and costs, its class, and the whole family as one function, `solve`.

Only names and facts are read at import, so that options and metadata can use them without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm.models.diffusion.solvers.registry import K_DIFFUSION as K_DIFFUSION
from ldm.models.diffusion.solvers.registry import SOLVERS as SOLVERS
from ldm.models.diffusion.solvers.registry import SolverRow as SolverRow

if TYPE_CHECKING:
    from ldm.models.diffusion.solvers.function import solve as solve


def __getattr__(name: str) -> Any:
    if name == "solve":
        from ldm.models.diffusion.solvers.function import solve

        return solve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
