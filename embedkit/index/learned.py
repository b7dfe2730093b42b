"""An index of the codes a model gives: a few bytes a picture, compared as the model learned to.

Its quantiser is not trained here: the centroids are the model's codebooks, and the codes are those
the model chose, which need not be of the nearest words. The distance of a query to a picture is
that of the query's vector to the picture's words, as in Klein, Wolf, CVPR 2019, arXiv:1711.08589,
"asymmetric search".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from embedkit.errors import MismatchError, UsageError
from embedkit.runtime.codebooks import Codebooks, Codes

if TYPE_CHECKING:
    from embedkit.index.catalog import Catalog
    from embedkit.runtime import ModelContract

__all__ = ["LEARNED", "Learned", "add_codes", "check_kind", "learned_index", "needs_vectors"]

LEARNED = "learned"
"""The kind's name."""


@dataclass(frozen=True)
class Learned:
    """What a model learned to keep of pictures.

    Attributes:
        books: The words.
        codes: Gives the codes of all pictures afresh at each call, in blocks ``(n, M)``.
    """

    books: Codebooks
    codes: Callable[[], Iterator[Codes]]


def learned_index(books: Codebooks) -> Any:
    """An empty `faiss.IndexPQ` with these words, for `add_codes`.

    Where the words are no power of two the first one fills the rest, which no code names.
    """
    bits = (books.words - 1).bit_length()
    index = faiss.IndexPQ(books.dim, books.parts, bits, faiss.METRIC_L2)
    words = books.array()
    spare = np.repeat(words[:, :1], (1 << bits) - books.words, axis=1)
    faiss.copy_array_to_vector(np.concatenate([words, spare], axis=1).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def add_codes(index: Any, codes: Codes) -> None:
    """Put pictures with these codes ``(n, M)`` into a `learned_index`."""
    bits = index.pq.nbits
    packed = codes if bits == 8 else faiss.pack_bitstrings(np.ascontiguousarray(codes), bits)
    index.add_sa_codes(np.ascontiguousarray(packed))


def check_kind(kind: str | None, contract: ModelContract) -> None:
    """Refuse an index of codes for a model that gives none.

    Raises:
        MismatchError: It is `LEARNED`, and the model has no codebooks.
    """
    if kind == LEARNED and contract.codebooks is None:
        raise MismatchError(
            f"the model {contract.name!r} gives no codes to make an index of type learned from",
            facts="only a model that was trained with --loss spq gives them",
            hint="another type of index: --type auto, or --type tiny for a small one",
        )


def needs_vectors(what: str, catalog: Catalog) -> None:
    """Refuse a catalog of learned codes; `what` begins the sentence.

    Raises:
        UsageError: It is one: many different pictures have the same codes in it.
    """
    if catalog.choice is not None and catalog.choice.kind == LEARNED:
        raise UsageError(
            f"{what} needs the vectors of the pictures",
            facts=f"{catalog.path.name} keeps only their codes, which different pictures share",
            hint="an index of another type: embedkit index FOLDER --type flat -o OTHER.faiss",
        )
