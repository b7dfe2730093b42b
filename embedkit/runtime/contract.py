"""What a deployed model says about itself: one versioned JSON document, in the ONNX or beside it.

A single ``.onnx`` copied to another machine is enough to embed and to search, because everything
that decides what a vector means is in here: the preprocessing, the width, the normalisation, and a
self-test. An engine carries it in the file next to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedkit.errors import MismatchError, UsageError
from embedkit.imaging.preprocess import Pixels, Preprocess
from embedkit.runtime.codebooks import Codebooks

__all__ = ["CODES_NAME", "CONTRACT_KEY", "SCHEMA", "ModelContract", "Prefix", "SelfTest"]

SCHEMA = "embedkit.model/1"
CONTRACT_KEY = "embedkit.contract"
CODES_NAME = "codes"
"""The graph's output of a model with codebooks: uint8 ``(N, parts)``."""


@dataclass(frozen=True)
class SelfTest:
    """A generated picture's seed and the vector the model must give for it.

    Attributes:
        seed: Of `pixels`.
        vector: ``embedding_dim`` numbers, measured in the network the model was exported from.
        min_cosine: What the running model must reach against it.
    """

    seed: int
    vector: tuple[float, ...]
    min_cosine: float = 0.999

    def pixels(self, preprocess: Preprocess) -> Pixels:
        """``(1, height, width, 3)`` uint8: smooth colour waves, the same on every machine."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        phase, speed = rng.uniform(0, 6, size=(2, 3)), rng.uniform(1, 9, size=(2, 3))
        rows = np.linspace(0, 1, preprocess.height)[:, None, None]
        columns = np.linspace(0, 1, preprocess.width)[None, :, None]
        wave = np.sin(rows * speed[0] + phase[0]) * np.cos(columns * speed[1] + phase[1])
        pixels: Pixels = np.rint(127.5 + 127.5 * wave).astype(np.uint8)[None]
        return pixels


@dataclass(frozen=True)
class Prefix:
    """A narrower width of a model's vectors.

    Attributes:
        dim: How many of the first numbers.
        quality: Measured retrieval metrics of them; empty where nothing was held out.
        thresholds: Calibrated scores of them, by name; empty when not calibrated.
    """

    dim: int
    quality: dict[str, float] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelContract:
    """Everything an exported model says about itself.

    Attributes:
        name: For people; the run's name.
        embedding_dim: Width D of a vector.
        normalizes: Whether the graph ends in an L2 node, so that vectors are unit rows.
        metric: ``cosine`` or ``l2``: how two vectors are compared.
        preprocess: The whole geometry and colour spec.
        weights_hash: sha256 of the network's weights (hex), the same at every precision.
        precision: ``fp32``, ``fp16`` or ``int8``.
        kept_float: Names of what stayed in float at a reduced precision.
        input_name: Of the ONNX graph: uint8 ``(N, height, width, 3)``.
        output_name: Of the ONNX graph: float32 ``(N, embedding_dim)``.
        self_test: See `SelfTest`; None only while exporting.
        backbone: Its name.
        pooling: Its name.
        loss: Its name.
        loss_options: What it was created with.
        recipe: The whole recipe the model was trained by.
        data: Where from, counts of classes and images, hash of the manifest.
        versions: Of the packages that made it.
        quality: Measured retrieval metrics, by precision: ``{"fp32": {"recall@1": ...}}``.
        thresholds: Calibrated scores, by name; empty when not calibrated.
        codebooks: Of a model that also gives codes; None for all others.
        vectors: How many vectors of equal length the ``embedding_dim`` numbers are, side by side;
            two pictures are as alike as the most alike two of them, by cosine. 1 for most models.
        prefixes: Narrower widths, rising, whose first numbers alone are an embedding; see `cut`.
    """

    name: str
    embedding_dim: int
    normalizes: bool
    metric: str
    preprocess: Preprocess
    weights_hash: str
    precision: str = "fp32"
    kept_float: tuple[str, ...] = ()
    input_name: str = "pixels"
    output_name: str = "embedding"
    self_test: SelfTest | None = None
    backbone: str = ""
    pooling: str = ""
    loss: str = ""
    loss_options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    codebooks: Codebooks | None = None
    vectors: int = 1
    prefixes: tuple[Prefix, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in ("cosine", "l2"):
            raise ValueError(f"metric must be 'cosine' or 'l2', got {self.metric!r}")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {self.embedding_dim}")
        if self.codebooks is not None and self.codebooks.dim != self.embedding_dim:
            raise ValueError(
                f"codebooks of {self.codebooks.dim} numbers for vectors of {self.embedding_dim}"
            )
        if self.codebooks is not None and self.metric != "l2":
            raise ValueError("codes are compared by l2, and by nothing else")
        several = self.vectors
        if not isinstance(several, int) or several < 1 or self.embedding_dim % several:
            raise ValueError(f"{self.embedding_dim} numbers are not {self.vectors} vectors")
        if self.vectors > 1 and not (self.metric == "cosine" and self.normalizes):
            raise ValueError("several vectors per picture are compared by their cosines")
        widths = (0, *self.widths)
        if any(a >= b for a, b in itertools.pairwise(widths)):
            raise ValueError(f"the widths {widths[1:]} do not rise")
        if self.prefixes and (self.codebooks is not None or self.vectors > 1):
            raise ValueError("codes and several vectors have no narrower widths")

    @property
    def widths(self) -> tuple[int, ...]:
        """All widths its vectors may have, rising; the last is `embedding_dim`."""
        return (*(prefix.dim for prefix in self.prefixes), self.embedding_dim)

    def cut(self, dim: int) -> ModelContract:
        """What the model says about itself when only the first `dim` numbers are kept.

        It has a fingerprint of its own: an index of one width is not searched with another.

        Raises:
            UsageError: It has no such width.
        """
        if dim == self.embedding_dim:
            return self
        found = next((prefix for prefix in self.prefixes if prefix.dim == dim), None)
        if found is None:
            widths = ", ".join(map(str, self.widths))
            raise UsageError(
                f"the model {self.name!r} gives no vectors of {dim} numbers",
                facts=f"it has {widths}"
                + ("" if self.prefixes else "; no narrower ones were trained"),
                hint=f"--dim {max((w for w in self.widths if w < dim), default=self.widths[0])}"
                if self.prefixes
                else f"leave --dim out, or: embedkit train --dim {self.embedding_dim} "
                f"--nested {dim}",
            )
        test = self.self_test
        if test is not None:
            vector = np.array(test.vector[:dim])
            if self.normalizes:
                vector /= max(float(np.linalg.norm(vector)), 1e-12)
            test = dataclasses.replace(test, vector=tuple(vector.tolist()))
        return dataclasses.replace(
            self,
            codebooks=None,
            embedding_dim=dim,
            prefixes=tuple(prefix for prefix in self.prefixes if prefix.dim < dim),
            quality={"fp32": found.quality} if found.quality else {},
            thresholds=found.thresholds,
            self_test=test,
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits an index remembers: weights, preprocessing, width, metric, codebooks.

        Precision is left out on purpose: an int8 file of the same network is gated to give the
        same neighbours.
        """
        parts = (
            self.weights_hash,
            self.preprocess.fingerprint(),
            str(self.embedding_dim),
            self.metric,
            str(self.normalizes),
            *((self.codebooks.fingerprint(),) if self.codebooks else ()),
            *((f"vectors {self.vectors}",) if self.vectors > 1 else ()),
        )
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def dumps(self) -> str:
        """The JSON document, one line, keys sorted."""
        document = {"schema": SCHEMA, "fingerprint": self.fingerprint, **dataclasses.asdict(self)}
        if self.codebooks is None:
            del document["codebooks"]
        if self.vectors == 1:
            del document["vectors"]
        if not self.prefixes:
            del document["prefixes"]
        return json.dumps(document, sort_keys=True, allow_nan=False)

    @classmethod
    def loads(cls, text: str) -> ModelContract:
        """The contract of a file.

        Raises:
            MismatchError: Not such a document, of another version, or altered since it was written.
        """
        try:
            document = json.loads(text)
            schema = document.pop("schema")
            fingerprint = document.pop("fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MismatchError(
                "this model carries no contract that can be read",
                facts=f"{type(error).__name__}: {error}",
                hint="export it with: embedkit export",
            ) from error
        if schema != SCHEMA:
            raise MismatchError(
                "this model was written by another embedkit",
                facts=f"its contract is {schema!r}, this embedkit reads {SCHEMA!r}",
                hint="pip install --upgrade embedkit, or export the model again",
            )
        try:
            document["preprocess"] = Preprocess.from_json(document["preprocess"])
            document["kept_float"] = tuple(document["kept_float"])
            if document["self_test"] is not None:
                test = document["self_test"]
                document["self_test"] = SelfTest(
                    seed=int(test["seed"]),
                    vector=tuple(float(value) for value in test["vector"]),
                    min_cosine=float(test["min_cosine"]),
                )
            document["prefixes"] = tuple(Prefix(**one) for one in document.get("prefixes", ()))
            if "codebooks" in document:
                document["codebooks"] = Codebooks.from_json(document["codebooks"])
            contract = cls(**document)
        except (TypeError, KeyError, ValueError) as error:
            raise MismatchError(
                "this model's contract is damaged", facts=f"{type(error).__name__}: {error}"
            ) from error
        if contract.fingerprint != fingerprint:
            raise MismatchError(
                "this model's contract was altered after it was written",
                facts=f"it says {fingerprint}, its content gives {contract.fingerprint}",
                hint="export it again with: embedkit export",
            )
        return contract
