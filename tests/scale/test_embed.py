"""Sources to one file of vectors: counts, order, resuming, both formats, flat memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from embedkit.errors import (
    DataError,
    EmbedKitError,
    ImageError,
    Interrupted,
    MismatchError,
    UsageError,
)
from embedkit.runtime import Embedder
from embedkit.runtime.pipeline import Row
from embedkit.scale import Source, embed_sources, find_sources, local_engine
from tests.scale.places import picture
from tests.tiny_model import tiny_contract, write_tiny_model

CONTRACT = tiny_contract(dim=4)
ROOT = Path(__file__).parents[2]


def numbered(count: int, start: int = 0) -> Iterator[Source]:
    for n in range(start, start + count):
        yield Source(f"p/{n}.jpg", f"class{n % 3}", "same", b"")


def vector(source: Source) -> Row:
    number = int(Path(source.path).stem)
    return np.array([number, 1, 2, 3], np.float32)


class Engine:
    """Gives each source the vector of its number; fails and stops as told; keeps account."""

    def __init__(self, *, bad: Iterable[int] = (), stop_at: int | None = None) -> None:
        self.asked: list[str] = []
        self._bad = {f"p/{n}.jpg" for n in bad}
        self._stop_at = stop_at
        self.code = "not-an-image"

    def __call__(
        self, sources: Iterable[Source]
    ) -> Generator[tuple[Source, Row | ImageError], None, None]:
        for source in sources:
            if len(self.asked) == self._stop_at:
                raise KeyboardInterrupt
            self.asked.append(source.path)
            wrong = source.path in self._bad
            yield source, ImageError(self.code, "as told") if wrong else vector(source)


def rows(output: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]


def test_each_row_is_the_vector_of_the_line_of_the_same_number(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    report = embed_sources(numbered(10), output, Engine(bad=[0, 7]), CONTRACT)
    assert (report.found, report.embedded, report.known, report.failed) == (10, 8, 0, 2)
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    listed = rows(output)
    assert vectors[:, 0].tolist() == [int(Path(row["path"]).stem) for row in listed]
    assert vectors[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert listed[0] == {"path": "p/1.jpg", "label": "class1", "model": CONTRACT.fingerprint}
    failed = [json.loads(line) for line in (tmp_path / "v.failed.jsonl").read_text().splitlines()]
    assert [row["path"] for row in failed] == ["p/0.jpg", "p/7.jpg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("v.failed.jsonl", "v.jsonl", "v.npy")
    ]


def test_parquet_holds_the_same_and_says_which_model(tmp_path: Path) -> None:
    output = tmp_path / "v.parquet"
    sources = [*numbered(5), Source("caf\udce9/5.jpg", "caf\udce9", "", b"")]
    embed_sources(iter(sources), output, Engine(), CONTRACT)
    table = parquet.read_table(output)
    assert table.column_names == ["path", "label", "vector", "model"]
    assert table.schema.field("vector").type.list_size == 4
    assert np.stack(table["vector"].to_numpy()).tolist() == [vector(s).tolist() for s in sources]
    assert table["path"].to_pylist()[-1] == "caf\\xe9/5.jpg"
    assert set(table["model"].to_pylist()) == {CONTRACT.fingerprint}
    said = json.loads(table.schema.metadata[b"embedkit"])
    assert said["fingerprint"] == CONTRACT.fingerprint
    assert said["metric"] == "cosine"


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_no_source_is_an_error_or_where_allowed_an_empty_file(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    with pytest.raises(DataError, match="no picture to embed"):
        embed_sources(numbered(0), output, Engine(), CONTRACT)
    assert list(tmp_path.iterdir()) == []
    report = embed_sources(numbered(0), output, Engine(), CONTRACT, may_be_empty=True)
    assert report.found == 0
    if name == "v.npy":
        assert np.load(output).shape == (0, 4)
        assert rows(output) == []
    else:
        assert parquet.read_table(output).num_rows == 0


def test_interrupted_it_keeps_what_is_done_and_the_next_run_does_the_rest(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    with pytest.raises(Interrupted):
        embed_sources(numbered(20), output, Engine(bad=[2], stop_at=12), CONTRACT)
    assert not output.exists()
    engine = Engine(bad=[2])
    # One more has come first, and one is gone.
    sources = [*numbered(1, 50), *(s for s in numbered(20) if s.path != "p/5.jpg")]
    report = embed_sources(iter(sources), output, engine, CONTRACT)
    assert engine.asked == ["p/50.jpg", *(f"p/{n}.jpg" for n in range(12, 20))]
    assert (report.found, report.embedded, report.known, report.failed) == (20, 9, 10, 1)
    assert np.load(output)[:, 0].tolist() == [50, 0, 1, 3, 4, *range(6, 20)]


def test_what_changed_or_could_not_be_fetched_is_done_again(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    engine = Engine(bad=[1], stop_at=4)
    engine.code = "unreadable"
    with pytest.raises(Interrupted):
        embed_sources(numbered(5), output, engine, CONTRACT)
    again = Engine()
    changed = (s if s.path != "p/3.jpg" else Source(s.path, "", "new", b"") for s in numbered(5))
    embed_sources(changed, output, again, CONTRACT)
    assert again.asked == ["p/1.jpg", "p/3.jpg", "p/4.jpg"]
    assert np.load(output)[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_source_named_twice_is_two_rows(tmp_path: Path) -> None:
    report = embed_sources(
        iter([*numbered(3), *numbered(3)]), tmp_path / "v.npy", Engine(), CONTRACT
    )
    assert report.found == 6
    assert np.load(tmp_path / "v.npy")[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_unfinished_work_of_another_model_is_not_mixed_in(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    with pytest.raises(Interrupted):
        embed_sources(numbered(5), output, Engine(stop_at=3), CONTRACT)
    with pytest.raises(MismatchError, match="another model"):
        embed_sources(numbered(5), output, Engine(), tiny_contract(dim=4, seed=1))
    embed_sources(numbered(5), output, Engine(), CONTRACT)


def test_a_damaged_or_foreign_work_file_is_refused_and_left(tmp_path: Path) -> None:
    work = tmp_path / "v.npy.unfinished"
    work.write_bytes(b"my own notes" * 100)
    with pytest.raises(MismatchError, match="cannot be used"):
        embed_sources(numbered(5), tmp_path / "v.npy", Engine(), CONTRACT)
    assert work.read_bytes() == b"my own notes" * 100


def test_two_at_one_output_are_told(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"

    def meddled() -> Iterator[Source]:
        yield from numbered(2)
        with pytest.raises(EmbedKitError, match="another embedkit is writing"):
            embed_sources(numbered(5), output, Engine(), CONTRACT)
        yield from numbered(2, 2)

    assert embed_sources(meddled(), output, Engine(), CONTRACT).found == 4


def test_what_stood_there_stands_until_the_new_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    embed_sources(numbered(3), output, Engine(), CONTRACT)
    with pytest.raises(DataError, match=r"no picture is usable[\s\S]*p/0.jpg: as told"):
        embed_sources(numbered(2), output, Engine(bad=[0, 1]), CONTRACT)
    assert np.load(output).shape == (3, 4)
    assert len(rows(output)) == 3


@pytest.mark.parametrize("name", ["v.txt", "v", "missing/v.npy"])
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    engine = Engine()
    with pytest.raises(UsageError):
        embed_sources(numbered(3), tmp_path / name, engine, CONTRACT)
    assert engine.asked == []


def test_an_address_is_no_output() -> None:
    with pytest.raises(UsageError, match="on this machine") as told:
        embed_sources(numbered(3), Path("s3://bucket/v.npy"), Engine(), CONTRACT)
    assert told.value.hint == "-o v.npy"


def test_memory_does_not_grow_with_the_number_of_sources(tmp_path: Path) -> None:
    class Forgetful(Engine):
        def __call__(
            self, sources: Iterable[Source]
        ) -> Generator[tuple[Source, Row | ImageError], None, None]:
            for source in sources:
                yield source, vector(source)

    peaks = []
    for count in (300, 5000):
        tracemalloc.start()
        embed_sources(numbered(count), tmp_path / "v.npy", Forgetful(), CONTRACT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A block of 4096 rows while writing; the rows of one second while embedding.
    assert peaks[1] < peaks[0] + 8_000_000


def test_a_model_and_photos_give_what_the_embedder_gives(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "m.onnx")
    photos = [picture(tmp_path / f"photos/c{n % 2}/{n}.jpg", n) for n in range(7)]
    (tmp_path / "photos/c0/broken.jpg").write_bytes(b"\xff\xd8\xff")
    with Embedder.load(tmp_path / "m.onnx", device="cpu") as embedder:
        report = embed_sources(
            find_sources([str(tmp_path / "photos")]),
            tmp_path / "v.npy",
            local_engine(embedder, batch=3),
            embedder.contract,
        )
        expected = embedder.embed(sorted(photos))
    assert (report.found, report.failed) == (8, 1)
    assert [row["path"] for row in rows(tmp_path / "v.npy")] == [str(p) for p in sorted(photos)]
    assert {row["label"] for row in rows(tmp_path / "v.npy")} == {"c0", "c1"}
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-6


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from embedkit.scale import embed_sources
from tests.scale.test_embed import CONTRACT, numbered, vector
import embedkit.scale.embed as room
room._COMMIT_SECONDS = 0.0
def engine(sources):
    for n, source in enumerate(sources):
        if n == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield source, vector(source)
embed_sources(numbered(30), Path(sys.argv[1]), engine, CONTRACT)
"""


def test_killed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, output, "20"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    engine = Engine()
    report = embed_sources(numbered(30), output, engine, CONTRACT)
    assert report.known == 20
    assert engine.asked == [f"p/{n}.jpg" for n in range(20, 30)]
    assert np.load(output)[:, 0].tolist() == list(range(30))
