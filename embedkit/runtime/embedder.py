"""Embed pictures with an exported model: load it, see that it works, hand in files or arrays."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from PIL import Image

from embedkit.errors import (
    EmbedKitError,
    ImageError,
    MismatchError,
    UnknownNameError,
    UsageError,
)
from embedkit.imaging import Pixels, read_pixels
from embedkit.runtime.backends.base import Backend, CodingBackend, Vectors
from embedkit.runtime.codebooks import Codes
from embedkit.runtime.contract import ModelContract
from embedkit.runtime.engine_file import read_engine
from embedkit.runtime.pipeline import Embedded, Row, embed_stream, usable_cores
from embedkit.runtime.prefix import PrefixBackend

__all__ = ["BACKENDS", "Embedder", "Picture", "read_contract"]

Picture = Path | str | Image.Image | npt.NDArray[np.uint8]
"""A file, or a decoded picture; an array is ``(H, W, 3)`` RGB or ``(H, W)`` grey, uint8."""

BACKENDS = ("auto", "onnxruntime", "onnxruntime-tensorrt", "tensorrt")
"""What `Embedder.load` takes as its backend."""

_BATCH = 32

_Coded = tuple[Row, Codes | None]


class Embedder:
    """A loaded model: pictures in, vectors out. Get one from `load`; use it in a ``with``.

    Several threads may use one at once; `close` it when all have ended.

    Vectors are unit rows where ``contract.normalizes`` says so. The vector of a picture depends on
    the batch it ran in by the rounding of float32 only (measured: below 1e-6 per number).

    A model may give K vectors per picture (``contract.vectors``): they stand side by side in a row,
    and two pictures are as alike as `embedkit.evaluate.greatest_cosines` of ``split_rows`` says.

    Args:
        backend: A loaded engine.
        threads: Cores that one run of it takes; 0: all.
    """

    def __init__(self, backend: Backend, *, threads: int = 0) -> None:
        self._backend = backend
        self._threads = threads

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int = 0,
        dim: int | None = None,
        check: bool = True,
    ) -> Embedder:
        """The model in a file, ready, its self-test passed.

        Args:
            path: An ``.onnx`` or ``.engine`` that ``embedkit export`` wrote.
            device: ``cpu``, ``cuda``, ``cuda:N``; ``auto`` takes CUDA where it works.
            backend: ``auto`` goes by the file's ending. ``onnxruntime``; ``onnxruntime-tensorrt``
                builds and keeps an engine of its own for an ``.onnx``; ``tensorrt`` runs an
                ``.engine``, for an ``.onnx`` the one beside it.
            threads: Of the CPU, for one run of the model; 0: one per core, which answers soonest.
                With 1, `embed_files` runs the model once per core side by side, which embeds the
                most pictures a second (measured: by a tenth to a fifth).
            dim: Of the vectors, where the model was trained for several widths
                (``contract.widths``): its first numbers, scaled to unit length again where the
                whole vector is. None: all of them.
            check: False hands out a model that fails its self-test too, to be looked at.

        Raises:
            UsageError: There is no such file, device, backend or width.
            MismatchError: The file is damaged, foreign, or gives other vectors than when it was
                exported.
            MissingError: A device or package that was asked for is not there.
        """
        with contextlib.ExitStack() as undo:
            loaded = _load_backend(Path(path), device, backend, threads)
            embedder = undo.enter_context(cls(loaded, threads=threads))
            test = embedder.contract.self_test
            cosine = embedder.self_test() if check and test is not None else 1.0
            if test is not None and cosine < test.min_cosine:
                raise MismatchError(
                    f"the model {str(path)!r} does not give the vectors it was exported with",
                    facts=f"on {embedder.device} its self-test has cosine {cosine:.4f}, at least "
                    f"{test.min_cosine} is promised",
                    hint="copy or export the file again; if that does not help, try another device",
                )
            if dim is not None:
                embedder = embedder.cut(dim)
            undo.pop_all()
        return embedder

    def cut(self, dim: int) -> Embedder:
        """The same loaded model, of which only the first `dim` numbers are kept.

        Raises:
            UsageError: It has no such width.
        """
        if dim == self.embedding_dim:
            return self
        return Embedder(PrefixBackend(self._backend, dim), threads=self._threads)

    @property
    def contract(self) -> ModelContract:
        """What the model says about itself."""
        return self._backend.contract

    @property
    def device(self) -> str:
        """Where it really runs: ``cpu``, ``cuda:0``."""
        return self._backend.device

    @property
    def embedding_dim(self) -> int:
        """Width D of a vector."""
        return self._backend.contract.embedding_dim

    def embed(self, images: Sequence[Picture]) -> Vectors:
        """Vectors ``(N, D)`` of pictures, in order; none give ``(0, D)``.

        Raises:
            ImageError: The first that is no usable picture, named.
            UsageError: Something else than a picture was given.
        """
        if isinstance(images, str | Path | Image.Image):
            raise UsageError("embed takes a sequence of pictures", hint="embed([picture])")
        vectors = np.empty((len(images), self.embedding_dim), np.float32)
        results = embed_stream(
            images, read=self._read, run=self.embed_pixels, batch=_BATCH, runs=self.runs_at_once()
        )
        with contextlib.closing(results):
            for number, (picture, result) in enumerate(results):
                if isinstance(result, ImageError):
                    name = picture if isinstance(picture, Path | str) else f"picture {number}"
                    raise ImageError(result.code, f"{name}: {result.reason}") from result
                vectors[number] = result
        return vectors

    def embed_pixels(self, pixels: Pixels) -> Vectors:
        """Vectors ``(N, D)`` of ``(N, height, width, 3)`` uint8 made by ``contract.preprocess``.

        N may be 0. All N run at once: hand in as many as the device's memory holds.

        Raises:
            UsageError: Another shape or dtype.
            EmbedKitError: The engine failed, or gave numbers that are not finite.
        """
        self._check(pixels)
        if not len(pixels):
            return np.empty((0, self.embedding_dim), np.float32)
        return self._usable(self._backend.run(np.ascontiguousarray(pixels)), len(pixels))

    @property
    def gives_codes(self) -> bool:
        """Whether `embed_coded` can be called."""
        return self.contract.codebooks is not None and isinstance(self._backend, CodingBackend)

    def embed_coded(self, pixels: Pixels) -> tuple[Vectors, Codes]:
        """As `embed_pixels`, and the codes ``(N, parts)`` that the model chooses in the same run.

        Raises:
            MismatchError: The model, or the engine that runs it, gives no codes.
        """
        books = self.contract.codebooks
        if books is None or not isinstance(self._backend, CodingBackend):
            raise MismatchError(
                f"{self._backend.name} gives no codes of the model {self.contract.name!r}",
                hint="an .onnx file of a model that was trained with --loss spq gives them",
            )
        self._check(pixels)
        if not len(pixels):
            return np.empty((0, books.dim), np.float32), np.empty((0, books.parts), np.uint8)
        vectors, codes = self._backend.run_coded(np.ascontiguousarray(pixels))
        if codes.shape != (len(pixels), books.parts) or codes.max() >= books.words:
            raise EmbedKitError(
                "the model gave codes that cannot be used",
                facts=f"{codes.shape}, at most {codes.max(initial=0)}, for {len(pixels)} pictures "
                f"and {books.parts} codebooks of {books.words} words",
                hint="export the model again with: embedkit export",
            )
        return self._usable(vectors, len(pixels)), codes

    def _check(self, pixels: Pixels) -> None:
        side = self.contract.preprocess
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (side.height, side.width, 3):
            raise UsageError(
                f"pixels must be uint8 (N, {side.height}, {side.width}, 3)",
                facts=f"got {pixels.dtype} {pixels.shape}",
            )

    def _usable(self, vectors: Vectors, count: int) -> Vectors:
        if vectors.shape != (count, self.embedding_dim) or not np.isfinite(vectors).all():
            raise EmbedKitError(
                "the model gave vectors that cannot be used",
                facts=f"{vectors.shape} for {count} pictures of dimension "
                f"{self.embedding_dim}, finite: {bool(np.isfinite(vectors).all())}",
                hint="try --device cpu, or export the model again at fp32",
            )
        return vectors

    def embed_files(
        self, paths: Iterable[Path], *, batch: int = _BATCH, workers: int | None = None
    ) -> Generator[Embedded, None, None]:
        """Each file's vector or error, in order, as a stream; see `pipeline.embed_stream`.

        With its codes, where `gives_codes`.

        Args:
            paths: Any length; taken lazily.
            batch: Files in the model at once, over all its runs.
            workers: Threads that decode; None: one per core, 16 at most.

        Raises:
            UsageError: `batch` or `workers` is below 1.
            EmbedKitError: The engine failed; a broken file never raises.
        """
        run = self._coded_rows if self.gives_codes else self._plain_rows
        return _as_embedded(
            embed_stream(
                paths,
                read=self._read,
                run=run,
                batch=batch,
                workers=workers,
                runs=self.runs_at_once(workers),
            )
        )

    def runs_at_once(self, workers: int | None = None) -> int:
        """How many runs of the model side by side fill the cores, or as many of them as `workers`.

        One on a GPU, and where a run takes all cores as it is.
        """
        if self.device != "cpu" or not self._threads:
            return 1
        cores = usable_cores()
        return max(1, min(cores, workers or cores) // self._threads)

    def self_test(self) -> float:
        """Cosine between the vector the model gives for its own test picture and the one it must.

        Raises:
            MismatchError: The model carries no self-test.
        """
        test = self.contract.self_test
        if test is None:
            raise MismatchError(
                "this model carries no self-test", hint="export it again with: embedkit export"
            )
        given = self.embed_pixels(test.pixels(self.contract.preprocess))[0].astype(np.float64)
        wanted = np.array(test.vector)
        if wanted.shape != given.shape:
            raise MismatchError(
                "this model's self-test does not fit it",
                facts=f"{len(wanted)} numbers for a vector of {len(given)}",
            )
        scale = float(np.linalg.norm(given) * np.linalg.norm(wanted))
        return float(given @ wanted) / scale if scale > 0 else 0.0

    def close(self) -> None:
        """Give back what the engine holds; calling it twice is harmless."""
        self._backend.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _plain_rows(self, pixels: Pixels) -> Iterable[_Coded]:
        return ((row, None) for row in self.embed_pixels(pixels))

    def _coded_rows(self, pixels: Pixels) -> Iterable[_Coded]:
        return zip(*self.embed_coded(pixels), strict=True)

    def _read(self, picture: Picture) -> Pixels:
        return read_pixels(_readable(picture), self.contract.preprocess)


def read_contract(path: Path) -> ModelContract:
    """What a model says about itself, without making it ready to run.

    An ``.onnx`` carries its contract inside; ``model.engine`` in ``model.engine.json`` beside it.

    Raises:
        UsageError: There is no such file.
        MismatchError: It carries no contract, or a damaged one.
    """
    if path.suffix == ".engine":
        return read_engine(path)[1]
    from embedkit.runtime.backends.onnxruntime import read_onnx_contract

    return read_onnx_contract(path)


def _load_backend(path: Path, device: str, backend: str, threads: int) -> Backend:
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, BACKENDS)
    engine = path.suffix == ".engine"
    if backend == "auto":
        backend = "tensorrt" if engine else "onnxruntime"
    # Imported here, so that `import embedkit` does not pay for an engine.
    if backend == "tensorrt":
        from embedkit.runtime.backends.tensorrt import TensorRTBackend

        if engine:
            return TensorRTBackend(path, device=device)
        return TensorRTBackend(_engine_beside(path), device=device, onnx=path)
    if engine:
        raise UsageError(
            f"{backend} runs ONNX files, and {str(path)!r} is a TensorRT engine",
            hint="leave --backend out, or take the ONNX file it was built from: "
            f"{path.with_suffix('.onnx')}",
        )
    from embedkit.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        path, device=device, threads=threads, tensorrt=backend == "onnxruntime-tensorrt"
    )


def _engine_beside(onnx: Path) -> Path:
    engine = onnx.with_suffix(".engine")
    if not engine.is_file():
        raise UsageError(
            f"there is no TensorRT engine of {str(onnx)!r}",
            facts=f"it would be {engine}",
            hint=f"embedkit export {shlex.quote(str(onnx))} --trt",
        )
    return engine


def _readable(picture: Picture) -> Path | Image.Image:
    """What `read_pixels` takes."""
    if isinstance(picture, str):
        return Path(picture)
    if isinstance(picture, Path | Image.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        raise UsageError(
            f"a picture is a path, a PIL image or a uint8 array, got {type(picture).__name__}"
        )
    if picture.dtype != np.uint8 or (picture.ndim != 2 and picture.shape[2:] != (3,)):
        raise ImageError(
            "unsupported",
            f"an array must be uint8 (H, W, 3) or (H, W), got {picture.dtype} {picture.shape}",
        )
    if not picture.size:
        raise ImageError("empty", f"the array has no pixels, {picture.shape}")
    return Image.fromarray(picture)


def _as_embedded(
    results: Generator[tuple[Path, _Coded | ImageError], None, None],
) -> Generator[Embedded, None, None]:
    # Closed by hand: whoever leaves the stream early wants its threads gone now.
    with contextlib.closing(results):
        for path, result in results:
            if isinstance(result, ImageError):
                yield Embedded(path, None, result)
            else:
                vector, codes = result
                yield Embedded(path, vector, None, codes)
