"""The lowest precision that keeps its promise: rungs from int8 up to fp32, each gated and timed.

``int8`` and ``fp16`` ask for one rung, and fail when it does not pass. ``auto`` climbs: int8; int8
with the worst layers kept in float; fp16 with the layers kept in float that it cannot hold; fp32.
It takes the first that passes the gate and is faster here than fp32, and may rightly end at fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from embedkit.atomic import published
from embedkit.errors import GateError, UnknownNameError
from embedkit.export.calibration import Calibration
from embedkit.export.gate import GateReport, HeldOut, Thresholds, compare
from embedkit.export.precision import (
    Layer,
    find_layers,
    overflowing,
    rounded_everywhere,
    to_fp16,
    to_int8,
    with_contract,
)
from embedkit.export.sensitivity import LayerError, layer_errors, run_graph
from embedkit.export.speed import BATCH, Speed, measure_speed
from embedkit.runtime import read_contract
from embedkit.runtime.contract import ModelContract, SelfTest

__all__ = ["QUANT", "Ladder", "Rung", "only_fp32", "reduce_precision"]

QUANT = ("none", "fp16", "int8", "auto")
_REDUCED = ("fp16", "int8")

# Less than this is noise between two runs, and no reason for a second file.
_FASTER = 1.05
# Other CPUs and GPUs round elsewhere; what saturates or overflows there falls far below.
_SELF_TEST = {"fp16": 0.999, "int8": 0.98}
_NAMED = 5

Progress = Callable[[int, int], None]
Stage = Callable[[str, int], AbstractContextManager[Progress]]
"""``stage(name, total)`` opens a bar, as a context manager that yields a `Progress`."""


@contextmanager
def _no_stage(name: str, total: int) -> Iterator[Progress]:
    yield lambda done, failed: None


@dataclass(frozen=True)
class Rung:
    """One precision that was considered.

    Attributes:
        name: ``int8``, ``int8 + 4 float``, ``int8 TensorRT``, ...
        precision: ``fp32``, ``fp16`` or ``int8``.
        kept_float: Layers of the network that stay in float, beside the tail, which always does.
        report: The gate's; None while it is being made.
        size: Of the file, bytes.
        speed: Against fp32; None when it was not timed.
        verdict: ``taken``, ``passed``, ``failed`` or ``no faster``.
        reason: One sentence.
        errors: Of each layer when it alone is reduced, the worst first; empty unless measured.
        path: Where it was published; None where it was not.
    """

    name: str
    precision: str
    kept_float: tuple[str, ...] = ()
    report: GateReport | None = None
    size: int | None = None
    speed: Speed | None = None
    verdict: str = ""
    reason: str = ""
    errors: tuple[LayerError, ...] = ()
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        speed = self.speed
        return {
            "name": self.name,
            "precision": self.precision,
            "kept_float": list(self.kept_float),
            "file": None if self.path is None else str(self.path),
            "size": self.size,
            "gate": self.report and self.report.to_json(),
            "images_per_second": speed and speed.images_per_second[-1],
            "speed_ratio": speed and speed.ratio,
            "verdict": self.verdict,
            "reason": self.reason,
            "layers": [
                {"name": e.layer.name, "error": e.error if np.isfinite(e.error) else None}
                for e in self.errors
            ],
        }


@dataclass(frozen=True)
class Ladder:
    """What was considered and what was taken.

    Attributes:
        asked: ``none``, ``fp16``, ``int8`` or ``auto``.
        rungs: In the order they were tried, fp32 first.
        calibration: Its photos; None where none were needed.
        engine: What an engine of the taken precision is built from; None where nobody asked.
    """

    asked: str
    rungs: tuple[Rung, ...]
    calibration: Calibration | None = None
    engine: Rung | None = None

    @property
    def taken(self) -> Rung:
        """The rung to deploy on a CPU."""
        return next(rung for rung in self.rungs if rung.verdict == "taken")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        timed = next((rung.speed for rung in self.rungs if rung.speed), None)
        seen = self.calibration
        return {
            "asked": self.asked,
            "taken": self.taken.precision,
            "file": str(self.taken.path),
            "reason": self.taken.reason,
            "speed": timed
            and {"batch": BATCH, "provider": "CPUExecutionProvider", "rounds": timed.rounds},
            "calibration": seen
            and {
                "photos": len(seen.paths),
                "classes": seen.classes,
                "chosen_from": seen.chosen_from,
                "cache": str(seen.cache),
                "reused": seen.reused,
            },
            "rungs": [rung.to_json() for rung in self.rungs],
            "engine_graph": self.engine and self.engine.to_json(),
        }


def only_fp32(model: Path, report: GateReport) -> Ladder:
    """The ladder of ``none``."""
    return Ladder("none", (_fp32(model, report, "taken", "no other precision was asked for"),))


def reduce_precision(
    model: Path,
    report: GateReport,
    held_out: HeldOut,
    calibration: Calibration,
    *,
    asked: str,
    min_cosine: float | None = None,
    max_drop: float = 0.5,
    for_engine: bool = False,
    stage: Stage = _no_stage,
) -> Ladder:
    """Write ``model.fp16.onnx`` or ``model.int8.onnx`` beside `model`, if that is what is taken.

    Args:
        model: The fp32 file, which passed its gate.
        report: That gate's.
        held_out: What every rung is judged on.
        calibration: Of `model`.
        asked: ``fp16``, ``int8`` or ``auto``.
        min_cosine: In the place of each precision's own.
        max_drop: In points.
        for_engine: Also make the graph an engine is built from: for int8 that is
            ``model.int8-trt.onnx``, with the same layers in float; where ``auto`` finds that it
            does not pass, fp16, then fp32.
        stage: Shows how far it is.

    Raises:
        GateError: What was asked for by name does not pass; nothing was published under its name.
        UnknownNameError: `asked` is none of these.

    Cost: for each rung that is tried a conversion, all held-out photos, and 6 seconds of timing;
    once for each layer a conversion and 16 pictures where int8 does not pass.
    """
    if asked not in QUANT[1:]:
        raise UnknownNameError("precision", asked, QUANT[1:])
    thresholds = {p: Thresholds.of(p, min_cosine=min_cosine, max_drop=max_drop) for p in _REDUCED}
    with tempfile.TemporaryDirectory(prefix="embedkit-") as folder:
        bench = _Bench(model, held_out, calibration, thresholds, stage, Path(folder))
        climbed = _climb(bench) if asked == "auto" else _just(bench, asked)
        tried = [one.rung for one in climbed]
        taken = next((one for one in climbed if one.rung.verdict == "taken"), None)
        if taken is not None:
            path = taken.publish(model.with_name(f"model.{taken.rung.precision}.onnx"))
            tried[tried.index(taken.rung)] = replace(taken.rung, path=path)
        speed = next((rung.speed for rung in tried if rung.speed), None)
        reason = "; ".join(f"{rung.name} {rung.reason}" for rung in tried)
        verdict = "passed" if taken else "taken"
        fp32 = _fp32(model, report, verdict, "" if taken else f"no rung is better: {reason}")
        fp32 = replace(fp32, speed=speed and Speed(speed.images_per_second[:1], speed.rounds))
        ladder = Ladder(asked, (fp32, *tried), calibration)
        return replace(ladder, engine=_for_engine(bench, ladder)) if for_engine else ladder


@dataclass(frozen=True)
class _Candidate:
    """A rung with the graph and the contract it would be published with."""

    rung: Rung
    graph: Any
    contract: ModelContract

    @property
    def passed(self) -> bool:
        return self.rung.report is not None and self.rung.report.passed

    def publish(self, path: Path) -> Path:
        with published(path) as temporary:
            temporary.write_bytes(with_contract(self.graph, self.contract))
        return path


class _Bench:
    """Makes candidates from one fp32 file and looks at them."""

    def __init__(
        self,
        model: Path,
        held_out: HeldOut,
        calibration: Calibration,
        thresholds: Mapping[str, Thresholds],
        stage: Stage,
        folder: Path,
    ) -> None:
        self.model, self.held_out, self.calibration = model, held_out, calibration
        self.thresholds, self.stage, self.folder = thresholds, stage, folder
        self.fp32 = onnx.load(model)
        self.contract = read_contract(model)
        self.layers = find_layers(self.fp32)

    def int8(self, kept: Sequence[Layer] = (), *, target: str = "cpu") -> _Candidate:
        reduced = [layer for layer in self.layers if layer not in kept]
        graph = to_int8(self.fp32, self.calibration.ranges, reduced, target=target)
        name = "int8 TensorRT" if target == "tensorrt" else _with_float("int8", kept)
        return self._judge(Rung(name, "int8", _names(kept)), graph, graph)

    def fp16(self) -> _Candidate:
        """With the layers in float that would overflow."""
        nodes = set(overflowing(self.fp32, self.calibration.ranges))
        kept = [layer for layer in self.layers if nodes.intersection(layer.nodes)]
        graph = to_fp16(self.fp32, [layer for layer in self.layers if layer not in kept])
        rung = Rung(_with_float("fp16", kept), "fp16", _names(kept))
        return self._judge(rung, graph, rounded_everywhere(graph))

    def timed(self, candidate: _Candidate) -> _Candidate:
        file = self._write("timed.onnx", candidate.graph, candidate.contract)
        speed = measure_speed([self.model, file])
        return replace(candidate, rung=replace(candidate.rung, speed=speed))

    def errors(self, precision: str) -> tuple[LayerError, ...]:
        """Of every layer, the worst first."""

        def reduce(layers: Sequence[Layer]) -> Any:
            if precision == "fp16":
                return rounded_everywhere(to_fp16(self.fp32, layers))
            return to_int8(self.fp32, self.calibration.ranges, layers)

        pixels = self.calibration.pixels
        with self.stage("layers", len(self.layers)) as progress:
            return layer_errors(self.fp32, self.layers, reduce, pixels, progress=progress)

    def _judge(self, rung: Rung, graph: Any, faithful: Any) -> _Candidate:
        """Gate `faithful`, which computes on any machine what `graph` is meant to."""
        contract = replace(self.contract, precision=rung.precision, kept_float=rung.kept_float)
        test = contract.self_test
        assert test is not None  # every exported file carries one
        vector = run_graph(faithful, test.pixels(contract.preprocess))[0]
        if np.isfinite(vector).all():  # otherwise the gate says so
            least = _SELF_TEST[rung.precision]
            test = SelfTest(test.seed, tuple(vector.tolist()), min_cosine=least)
        contract = replace(contract, self_test=test)
        file = self._write("judged.onnx", faithful, contract)
        with self.stage(rung.name, len(self.held_out.pixels)) as progress:
            report = compare(
                file,
                self.held_out,
                thresholds=self.thresholds[rung.precision],
                progress=progress,
            )
        if report.recall_at_1 and report.map_at_r:
            figures = {"recall@1": report.recall_at_1.after, "map@r": report.map_at_r.after}
            contract = replace(contract, quality={**contract.quality, rung.precision: figures})
        size = len(with_contract(graph, contract))
        if report.passed:
            rung = replace(rung, report=report, size=size, verdict="passed", reason="passes")
        else:
            rung = replace(
                rung, report=report, size=size, verdict="failed", reason=report.reasons[-1]
            )
        return _Candidate(rung, graph, contract)

    def _write(self, name: str, graph: Any, contract: ModelContract) -> Path:
        path = self.folder / name
        path.write_bytes(with_contract(graph, contract))
        return path


def _just(bench: _Bench, precision: str) -> list[_Candidate]:
    """One rung, which must pass."""
    candidate = bench.int8() if precision == "int8" else bench.fp16()
    if not candidate.passed:
        raise _refused(bench, candidate)
    candidate = _weighed(bench, candidate)
    return [_verdict(candidate, "taken", f"was asked for; {candidate.rung.reason}")]


def _climb(bench: _Bench) -> list[_Candidate]:
    """From int8 upwards, until one passes and is faster than fp32."""
    tried = [_weighed(bench, bench.int8())]
    if tried[0].rung.verdict == "failed" and _ratio(tried[0]) >= _FASTER:
        errors = bench.errors("int8")
        tried[0] = replace(tried[0], rung=replace(tried[0].rung, errors=errors))
        count = 1
        # With half of the layers in float little is left of the speed.
        while count <= len(errors) // 2 and tried[-1].rung.verdict == "failed":
            kept = [error.layer for error in errors[:count]]
            tried.append(_weighed(bench, bench.int8(kept)))
            count *= 2
    if tried[-1].rung.verdict != "passed":
        tried.append(_weighed(bench, bench.fp16()))
    if tried[-1].rung.verdict == "passed":
        tried[-1] = _verdict(tried[-1], "taken", tried[-1].rung.reason)
    return tried


def _weighed(bench: _Bench, candidate: _Candidate) -> _Candidate:
    """Timed; what passes and is no faster than fp32 is told apart."""
    candidate = bench.timed(candidate)
    ratio = _ratio(candidate)
    if not candidate.passed:
        return candidate
    if ratio >= _FASTER:
        return _verdict(candidate, "passed", f"passes, and runs {ratio:.1f} times as fast as fp32")
    reason = f"passes, and is no faster than fp32 on this CPU ({ratio:.2f} times)"
    if candidate.rung.precision == "fp16":
        reason += ", which computes it in fp32; it is for GPUs (--quant fp16) and half the size"
    return _verdict(candidate, "no faster", reason)


def _for_engine(bench: _Bench, ladder: Ladder) -> Rung:
    """The graph to build an engine from, published."""
    taken = ladder.taken
    if taken.precision != "int8":
        return taken
    kept = [layer for layer in bench.layers if layer.name in taken.kept_float]
    symmetric = bench.int8(kept, target="tensorrt")
    if symmetric.passed:
        path = symmetric.publish(bench.model.with_name("model.int8-trt.onnx"))
        reason = "has the form of int8 that TensorRT takes, and passes"
        return replace(symmetric.rung, path=path, reason=reason)
    if ladder.asked == "int8":
        raise _refused(bench, symmetric)
    half = bench.fp16()
    if half.passed:
        path = half.publish(bench.model.with_name("model.fp16.onnx"))
        reason = "passes; int8 in the form that TensorRT takes does not"
        return replace(half.rung, path=path, reason=reason)
    return replace(ladder.rungs[0], reason="passes; no lower precision that TensorRT takes does")


def _refused(bench: _Bench, candidate: _Candidate) -> GateError:
    rung = candidate.rung
    assert rung.report is not None
    worst = bench.errors(rung.precision)[:_NAMED]
    named = [f"  {one.layer.name}: {one.error:.2g}" for one in worst]
    return GateError(
        f"{rung.name} is not as good as the network; it was not published",
        facts="\n".join(
            [
                *rung.report.reasons,
                f"layers that hurt the most (1 - cosine with only this one in {rung.precision}):",
                *named,
            ]
        ),
        hint="embedkit export --quant auto   (keeps such layers in float)",
    )


def _fp32(model: Path, report: GateReport, verdict: str, reason: str) -> Rung:
    return Rung(
        "fp32",
        "fp32",
        report=report,
        size=model.stat().st_size,
        verdict=verdict,
        reason=reason,
        path=model,
    )


def _verdict(candidate: _Candidate, verdict: str, reason: str) -> _Candidate:
    return replace(candidate, rung=replace(candidate.rung, verdict=verdict, reason=reason))


def _ratio(candidate: _Candidate) -> float:
    assert candidate.rung.speed is not None
    return candidate.rung.speed.ratio


def _with_float(precision: str, kept: Sequence[Layer]) -> str:
    return f"{precision} + {len(kept)} float" if kept else precision


def _names(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)
