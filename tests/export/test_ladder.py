"""What is published has passed the gate; what is taken is also faster, and it is said why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from embedkit.errors import GateError, UnknownNameError
from embedkit.export import (
    Calibration,
    GateReport,
    HeldOut,
    Ladder,
    calibrate,
    compare,
    ladder,
    only_fp32,
    read_held_out,
    reduce_precision,
    remove_leftovers,
)
from embedkit.export.speed import Speed, measure_speed
from embedkit.runtime import Embedder, read_contract
from tests.export.small import Exported, Photos


class Home:
    """A folder with model.onnx, and all that is needed to climb."""

    def __init__(self, exported: Exported, photos: Photos, folder: Path) -> None:
        self.model = folder / "model.onnx"
        self.model.write_bytes(exported.path.read_bytes())
        self.held_out: HeldOut = read_held_out(
            exported.network, exported.contract, photos.paths, photos.labels
        )
        self.report: GateReport = compare(self.model, self.held_out)
        self.seen: Calibration = calibrate(
            self.model, photos.paths, photos.labels, cache=folder / "calibration"
        )

    def climb(self, asked: str, *, for_engine: bool = False, **limits: float) -> Ladder:
        return reduce_precision(
            self.model,
            self.report,
            self.held_out,
            self.seen,
            asked=asked,
            for_engine=for_engine,
            **limits,
        )

    def files(self) -> list[str]:
        return sorted(path.name for path in self.model.parent.glob("model*"))


@pytest.fixture
def home(exported: Exported, photos: Photos, tmp_path: Path) -> Home:
    return Home(exported, photos, tmp_path)


def as_fast(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(ladder, "measure_speed", lambda models: Speed((100.0, 100.0 * ratio), 5))


def test_int8_is_written_and_describes_itself(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    as_fast(monkeypatch, 3)
    result = home.climb("int8", for_engine=True)
    assert home.files() == ["model.int8-trt.onnx", "model.int8.onnx", "model.onnx"]
    contract = read_contract(home.model.with_name("model.int8.onnx"))
    plain = read_contract(home.model)
    assert contract.precision == "int8"
    assert contract.fingerprint == plain.fingerprint
    assert contract.self_test is not None
    assert contract.self_test != plain.self_test
    assert set(contract.quality["int8"]) == {"recall@1", "map@r"}
    with Embedder.load(home.model.with_name("model.int8.onnx"), device="cpu") as embedder:
        assert embedder.self_test() > 0.9999
    assert result.taken.path == home.model.with_name("model.int8.onnx")
    assert result.taken.size == result.taken.path.stat().st_size
    assert result.engine is not None
    assert result.engine.path == home.model.with_name("model.int8-trt.onnx")
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [rung["verdict"] for rung in document["rungs"]] == ["passed", "taken"]
    assert document["engine_graph"]["gate"]["passed"]
    assert document["calibration"]["photos"] == 24


def test_fp16_is_written_and_said_not_to_be_faster(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fast(monkeypatch, 0.98)
    result = home.climb("fp16", for_engine=True)
    assert home.files() == ["model.fp16.onnx", "model.onnx"]
    assert read_contract(home.model.with_name("model.fp16.onnx")).precision == "fp16"
    assert "was asked for; passes, and is no faster" in result.taken.reason
    assert result.engine == result.taken
    with Embedder.load(home.model.with_name("model.fp16.onnx"), device="cpu") as embedder:
        assert embedder.self_test() > 0.9999


def test_what_fails_is_not_written_and_the_layers_are_named(home: Home) -> None:
    with pytest.raises(GateError, match="layers that hurt the most") as caught:
        home.climb("int8", min_cosine=1.0)
    assert caught.value.exit_code == 4
    assert caught.value.facts is not None
    named = [line.split(":")[0].strip() for line in caught.value.facts.splitlines()[-5:]]
    assert len(set(named)) == 5
    assert all(name.startswith(("conv1", "layer")) for name in named)
    assert home.files() == ["model.onnx"]


def test_auto_takes_int8_where_it_passes_and_is_faster(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fast(monkeypatch, 2.5)
    result = home.climb("auto")
    assert [rung.name for rung in result.rungs] == ["fp32", "int8"]
    assert result.taken.reason == "passes, and runs 2.5 times as fast as fp32"
    assert home.files() == ["model.int8.onnx", "model.onnx"]


def test_auto_stays_in_fp32_where_nothing_is_faster_and_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fast(monkeypatch, 1.04)
    result = home.climb("auto", for_engine=True)
    assert [(rung.name, rung.verdict) for rung in result.rungs] == [
        ("fp32", "taken"),
        ("int8", "no faster"),
        ("fp16", "no faster"),
    ]
    assert "int8 passes, and is no faster" in result.taken.reason
    assert home.files() == ["model.onnx"]
    assert result.engine == result.taken


def test_auto_keeps_the_worst_layers_in_float_until_it_passes(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_fast(monkeypatch, 2)
    first = home.climb("auto").rungs[1].report
    assert first is not None
    home.model.with_name("model.int8.onnx").unlink()
    result = home.climb("auto", min_cosine=first.min_cosine + 1e-9)
    full, *mixed = result.rungs[1:]
    assert full.verdict == "failed"
    assert [one.error for one in full.errors] == sorted(
        (one.error for one in full.errors), reverse=True
    )
    assert mixed[0].kept_float == (full.errors[0].layer.name,)
    assert mixed[0].name == "int8 + 1 float"
    assert result.taken.name in {rung.name for rung in mixed}
    assert result.taken.report is not None
    assert result.taken.report.min_cosine > first.min_cosine
    assert read_contract(result.taken.path or Path()).kept_float == result.taken.kept_float


def test_a_name_that_is_no_precision_is_refused(home: Home) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        home.climb("int9")


def test_without_a_wish_there_is_only_fp32(home: Home) -> None:
    result = only_fp32(home.model, home.report)
    assert result.to_json()["rungs"][0]["verdict"] == "taken"
    assert result.taken.path == home.model


def test_speed_is_measured_in_turns_and_compares_alike_with_alike(exported: Exported) -> None:
    speed = measure_speed([exported.path, exported.path])
    assert speed.rounds >= 5
    assert 0.3 < speed.ratio < 3


def test_leftovers_of_another_model_go_and_our_own_stay(exported: Exported, tmp_path: Path) -> None:
    source = exported.path.read_bytes()
    (tmp_path / "model.onnx").write_bytes(source)
    (tmp_path / "model.fp16.onnx").write_bytes(source)
    (tmp_path / "model.int8.onnx").write_bytes(b"of another")
    (tmp_path / "notes.onnx").write_bytes(b"not ours to look at")
    for stem, origin in (("model", source), ("model.fp16", b"another")):
        (tmp_path / f"{stem}.engine").write_bytes(b"ftrt")
        digest = hashlib.sha256(origin).hexdigest()
        (tmp_path / f"{stem}.engine.json").write_text(json.dumps({"onnx_sha256": digest}))
    (tmp_path / "model.int8.engine").write_bytes(b"ftrt")
    removed = {path.name for path in remove_leftovers(tmp_path)}
    assert removed == {
        "model.int8.onnx",
        "model.fp16.engine",
        "model.fp16.engine.json",
        "model.int8.engine",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx",
        "model.fp16.onnx",
        "model.engine",
        "model.engine.json",
        "notes.onnx",
    }
    assert remove_leftovers(tmp_path) == []
