"""The kinds of index there are: how each is spelled, how long it gets, and what a read one must be.

Every kind is a genuine FAISS index, named by its factory string. `factory_of` is the second half of
the allow-list (`file` holds the first): what FAISS read is taken apart and must be one of these, of
one width, one count and one metric throughout, or it is refused before anything is searched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np

__all__ = [
    "KINDS",
    "MAX_TRAINING",
    "apply_search",
    "base_of",
    "bytes_per_vector",
    "factories",
    "factory_of",
    "search_parameters",
    "training_rows",
]

KINDS = ("flat", "pq", "ivf", "ivf-disk", "hnsw", "sq8", "tiny", "learned")
"""flat: exact. pq: 4-bit codes scanned, the best looked at again in 16 or 8 bits. ivf: the same in
lists, of which a few are scanned. ivf-disk: the same in 8-bit codes, never in memory
(`embedkit.index.on_disk`). hnsw: a graph. sq8: 8 bits a number. tiny: the 4-bit codes alone.
learned: the model's own codes alone (`embedkit.index.learned`).
"""

# FAISS draws 256 rows for each of 16 centroids, so this is ample for everything but the lists.
_TRAINING = 20_000
# Rows to find the centres of lists from: at 512 numbers each 0.5 GB.
MAX_TRAINING = 262_144
_ROWS_PER_LIST = 39  # FAISS warns below this

# What search takes, and the largest value believed when a file is opened.
_LARGEST = {"k_factor": 1024, "nprobe": MAX_TRAINING, "efSearch": 65_536}


def factories(kind: str, count: int, dim: int) -> list[str]:
    """The forms of a kind for `count` vectors ``(dim,)``, the most faithful and largest first."""
    codes = f"PQ{_parts(dim)}x4fs"
    forms = {
        "flat": ["Flat"],
        "pq": [f"{codes},Refine(SQfp16)", f"{codes},Refine(SQ8)"],
        "ivf": [f"IVF{_lists(count)},{codes},Refine({sq})" for sq in ("SQfp16", "SQ8")],
        "ivf-disk": [f"IVF{_lists(count)},PQ{_whole_parts(dim)}x8,Refine(SQfp16)"],
        "hnsw": ["HNSW32,SQfp16", "HNSW16,SQ8"],
        "sq8": ["SQ8"],
        "tiny": [codes],
    }
    return forms[kind]


def training_rows(kind: str, count: int) -> int:
    """How many vectors a kind is trained from, of `count`."""
    lists = max(64 * _lists(count), _TRAINING)
    wanted = {"flat": 0, "ivf": lists, "ivf-disk": lists}.get(kind, _TRAINING)
    return min(count, wanted, MAX_TRAINING)


def bytes_per_vector(factory: str, count: int, dim: int) -> float:
    """How much memory and disk an index takes, by arithmetic; within a few percent of the file."""
    total = 0.0
    for part in factory.replace("Refine(", "").replace(")", "").split(","):
        if part == "Flat":
            total += 4 * dim
        elif part == "SQfp16":
            total += 2 * dim
        elif part == "SQ8":
            total += dim + 8 * dim / count
        elif part.endswith("x8"):
            total += int(part[2:-2]) + 4 * 256 * dim / count
        elif part.startswith("PQ"):
            total += _code_bytes(dim) + 64 * dim / count
        elif part.startswith("IVF"):
            # Ids of 8 bytes, centres, and codes: alone, or in blocks of 32, the last half empty.
            rest = 8 if "x8" in factory else 16 * _code_bytes(dim)
            total += 8 + int(part[3:]) * (4 * dim + rest) / count
        elif part.startswith("HNSW"):
            links = int(part[4:])
            total += 4 * (2 * links + links / (links - 1)) + 12  # links, where they begin, levels
    return total


def base_of(index: Any) -> Any:
    """What an index that looks again scans first."""
    return faiss.downcast_index(index.base_index)


def search_parameters(index: Any) -> dict[str, int]:
    """What FAISS remembers of how to search an index of ours; empty where there is nothing to set.

    Raises:
        ValueError: A value that no index of ours has.
    """
    found: dict[str, float] = {}
    if hasattr(index, "k_factor"):
        found["k_factor"] = float(index.k_factor)
        base = base_of(index)
        if hasattr(base, "nprobe"):
            found["nprobe"] = int(base.nprobe)
    if hasattr(index, "hnsw"):
        found["efSearch"] = int(index.hnsw.efSearch)
    return _believed(found)


def apply_search(index: Any, parameters: Mapping[str, Any]) -> None:
    """Set how an index of ours searches from now on.

    Raises:
        ValueError: Other parameters than this index takes, or out of range.
    """
    believed = _believed(parameters)
    if set(believed) != set(search_parameters(index)):
        raise ValueError(f"it is not searched with {', '.join(believed) or 'nothing'}")
    if "k_factor" in believed:
        index.k_factor = believed["k_factor"]
    if "nprobe" in believed:
        base_of(index).nprobe = believed["nprobe"]
    if "efSearch" in believed:
        index.hnsw.efSearch = believed["efSearch"]


def factory_of(index: Any) -> str:
    """The factory string of an index of ours, every part of it looked at.

    Raises:
        ValueError: It is none, or its parts do not fit together.

    Cost: flat, pq and tiny at once; the ids of ivf and the links of hnsw are gone through.
    """
    name = type(index).__name__
    if index.d < 1 or index.ntotal < 0 or not index.is_trained:
        raise ValueError("it holds no vectors")
    if name in ("IndexFlatIP", "IndexFlatL2", "IndexFlat"):
        return "Flat"
    if name == "IndexScalarQuantizer":
        return _scalar(index)
    if name == "IndexPQ":
        return _coded(index)
    if name == "IndexPQFastScan":
        return _scanned(index)
    if name == "IndexIVFPQFastScan":
        return _inverted(index)
    if name == "IndexIVFPQ":
        return _inverted_words(index)
    if name == "IndexHNSWSQ":
        _same(index, storage := faiss.downcast_index(index.storage))
        if type(storage).__name__ != "IndexScalarQuantizer":
            raise ValueError(f"a graph over {type(storage).__name__}")
        return f"{_graph(index)},{_scalar(storage)}"
    if name == "IndexRefine":
        base = base_of(index)
        fine = faiss.downcast_index(index.refine_index)
        _same(index, base)
        _same(index, fine)
        kinds = (type(base).__name__, type(fine).__name__)
        if kinds[0] not in ("IndexPQFastScan", "IndexIVFPQFastScan", "IndexIVFPQ"):
            raise ValueError(f"{kinds[0]} looked at again")
        if kinds[1] != "IndexScalarQuantizer":
            raise ValueError(f"looked at again in {kinds[1]}")
        return f"{factory_of(base)},Refine({_scalar(fine)})"
    raise ValueError(f"it is a {name}")


def _believed(parameters: Mapping[str, Any]) -> dict[str, int]:
    believed = {}
    for name, value in parameters.items():
        largest = _LARGEST.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise ValueError(f"{name} is {value!r}")
        if not 1 <= value <= largest:
            raise ValueError(f"{name} is {value!r}, not 1 to {largest}")
        believed[name] = int(value)
    return believed


def _same(whole: Any, part: Any) -> None:
    if (part.d, part.ntotal, part.metric_type) != (whole.d, whole.ntotal, whole.metric_type):
        raise ValueError("its parts are of different vectors")


def _scalar(index: Any) -> str:
    types = {faiss.ScalarQuantizer.QT_fp16: "SQfp16", faiss.ScalarQuantizer.QT_8bit: "SQ8"}
    name = types.get(index.sq.qtype)
    size = index.d * (2 if name == "SQfp16" else 1)
    trained = 0 if name == "SQfp16" else 2 * index.d
    if name is None or index.sq.d != index.d:
        raise ValueError("numbers of an unknown length")
    if index.code_size != size or index.sq.code_size != size:
        raise ValueError("its vectors have another length than they should")
    if index.codes.size() != size * index.ntotal or index.sq.trained.size() != trained:
        raise ValueError("it holds another number of vectors than it says")
    return name


def _codes(index: Any) -> str:
    """The 4-bit codes of an index, alone or in lists, as FAISS spells them."""
    parts, even = index.M, index.M + index.M % 2
    pq = index.pq
    form = (pq.nbits, pq.M, pq.d, pq.M * pq.dsub, pq.centroids.size(), index.M2, index.bbs)
    if form != (4, parts, index.d, index.d, 16 * index.d, even, 32) or index.implem != 0:
        raise ValueError("codes of another form")
    return f"PQ{parts}x4fs"


def _coded(index: Any) -> str:
    """Codes that a model gave, in as many whole bytes as they take."""
    pq = index.pq
    parts, bits = pq.M, pq.nbits
    if not 1 <= bits <= 8 or parts < 1 or (pq.d, parts * pq.dsub) != (index.d, index.d):
        raise ValueError("codes of another form")
    if pq.ksub != 1 << bits or pq.centroids.size() != pq.ksub * index.d:
        raise ValueError("it holds another number of words than it says")
    plain = index.search_type == index.ST_PQ and not index.encode_signs
    if not plain or index.metric_type != faiss.METRIC_L2:
        raise ValueError("codes that are compared in another way")
    size = -(-parts * bits // 8)
    if (index.code_size, pq.code_size) != (size, size) or index.codes.size() != size * index.ntotal:
        raise ValueError("it holds another number of codes than it says")
    return f"PQ{parts}x{bits}"


def _scanned(index: Any) -> str:
    codes = _codes(index)
    rows = 32 * -(-index.ntotal // 32)
    if index.ntotal2 != rows or index.codes.size() != rows * index.M2 // 2:
        raise ValueError("it holds another number of codes than it says")
    return codes


def _inverted(index: Any) -> str:
    codes = _codes(index)
    _check_lists(index)
    return f"IVF{index.nlist},{codes}"


def _inverted_words(index: Any) -> str:
    """Lists of codes of a byte each, of what the centre leaves over."""
    pq, lists = index.pq, faiss.downcast_InvertedLists(index.invlists)
    parts = pq.M
    sizes = (pq.nbits, pq.d, parts * pq.dsub, pq.centroids.size(), pq.code_size, index.code_size)
    if sizes != (8, index.d, index.d, 256 * index.d, parts, parts) or not index.by_residual:
        raise ValueError("codes of another form")
    if type(lists).__name__ != "ArrayInvertedLists" or lists.code_size != parts:
        raise ValueError("lists of another form")
    no_map = faiss.DirectMap.NoMap  # type: ignore[attr-defined]
    if index.direct_map.type != no_map or index.polysemous_ht:
        raise ValueError("lists that are searched in another way")
    _check_lists(index)
    return f"IVF{index.nlist},PQ{parts}x8"


def _check_lists(index: Any) -> None:
    """See that every vector is in a list, and nothing else."""
    centres = faiss.downcast_index(index.quantizer)
    flat = type(centres).__name__ in ("IndexFlatIP", "IndexFlatL2", "IndexFlat")
    if not flat or centres.ntotal != index.nlist or centres.d != index.d:
        raise ValueError("its lists have no centres")
    if centres.metric_type != index.metric_type or index.invlists.nlist != index.nlist:
        raise ValueError("its lists have no centres")
    held = 0
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        held += size
        if not size:
            continue
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        # FAISS looks ids up without asking whether they can be.
        if ids.min() < 0 or ids.max() >= index.ntotal:
            raise ValueError("its lists name vectors that are not there")
    if held != index.ntotal:
        raise ValueError("its lists hold another number of vectors than it says")


def _graph(index: Any) -> str:
    graph = index.hnsw
    count = index.ntotal
    levels = faiss.vector_to_array(graph.levels)
    offsets = faiss.vector_to_array(graph.offsets).astype(np.int64)
    links = graph.neighbors
    if len(levels) != count or len(offsets) != count + 1 or graph.max_level >= 64:
        raise ValueError("its graph is of other vectors")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != links.size():
        raise ValueError("its graph is cut short")
    per_level = faiss.vector_to_array(graph.cum_nneighbor_per_level)
    if (levels < 1).any() or levels.max(initial=0) >= len(per_level):
        raise ValueError("its graph has levels that are not there")
    if (np.diff(offsets) != per_level[levels]).any():
        raise ValueError("its graph is cut short")
    near = faiss.rev_swig_ptr(links.data(), links.size())
    if near.min(initial=-1) < -1 or near.max(initial=-1) >= count:
        raise ValueError("its graph leads to vectors that are not there")
    start = graph.entry_point
    if not 0 <= start < count or levels[start] != graph.max_level + 1:
        raise ValueError("its graph has no beginning")
    return f"HNSW{graph.nb_neighbors(1)}"


def _parts(dim: int) -> int:
    """Into how many parts a vector is cut: about D/4, of short ones D/2, so that it comes out."""
    target = dim / 2 if dim <= 128 else dim / 4
    return next(parts for parts in range(math.ceil(target), dim + 1) if dim % parts == 0)


def _whole_parts(dim: int) -> int:
    """The same for codes of 8 bits: half as many, of the same length together."""
    target = dim / 4 if dim <= 128 else dim / 8
    return next(parts for parts in range(math.ceil(target), dim + 1) if dim % parts == 0)


def _code_bytes(dim: int) -> int:
    """Of one vector; FAISS packs an even number of parts."""
    return -(-_parts(dim) // 2)


def _lists(count: int) -> int:
    # A tenth may be held out to be looked for.
    rows = min(0.9 * count, MAX_TRAINING)
    return max(1, int(min(4 * math.sqrt(count), rows / _ROWS_PER_LIST)))
