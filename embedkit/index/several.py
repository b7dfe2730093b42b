"""Catalogs of several vectors per picture: what they can be, and what needs one vector instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import UsageError
from embedkit.index.choose import Wanted

if TYPE_CHECKING:
    from embedkit.index.catalog import Catalog
    from embedkit.runtime import ModelContract

Doubles = npt.NDArray[np.float64]

__all__ = ["check_type", "likeness", "needs_one_vector", "refuse_several"]


def likeness(queries: npt.NDArray[Any], rows: npt.NDArray[Any], parts: int) -> Doubles:
    """``(Q, M)`` greatest cosines of ``(Q, D)`` and ``(M, D)``, each row `parts` vectors."""
    # Here, because most searches have no use for it, and are to begin at once.
    from embedkit.evaluate import greatest_cosines, split_rows

    return greatest_cosines(split_rows(queries, parts), split_rows(rows, parts))


def check_type(contract: ModelContract, wanted: Wanted) -> None:
    """Refuse a type of index that cannot hold the vectors of a model.

    Raises:
        UsageError: Several vectors per picture, and a type other than flat.
    """
    if contract.vectors > 1 and wanted.type not in (None, "auto", "flat"):
        raise UsageError(
            f"an index of type {wanted.type} cannot hold several vectors per picture",
            facts=f"{contract.name!r} gives {contract.vectors} of each",
            hint="--type flat",
        )


def needs_one_vector(what: str, catalog: Catalog) -> None:
    """Refuse a catalog of several vectors per picture; `what` begins the sentence."""
    refuse_several(what, catalog.path.name, catalog.parts)


def refuse_several(what: str, name: str, vectors: int) -> None:
    """The same for anything that has a name.

    Raises:
        UsageError: There is more than one.
    """
    if vectors > 1:
        raise UsageError(
            f"{what} needs one vector per picture", facts=f"{name} has {vectors} of each"
        )
