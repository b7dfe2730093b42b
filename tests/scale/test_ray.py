"""A Ray cluster gives what this process gives, counts alike, and goes on where that one stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from embedkit.errors import Interrupted
from embedkit.runtime import Embedder
from embedkit.scale import embed_sources, find_sources, local_engine
from tests.scale.places import jpeg, picture, tar_of
from tests.tiny_model import write_tiny_model


@pytest.mark.slow
def test_a_cluster_started_here_finishes_what_was_begun_without_it(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='needs pip install "embedkit[ray]"')
    write_tiny_model(tmp_path / "model.onnx")
    for n in range(40):
        picture(tmp_path / f"photos/c{n % 3}/{n}.jpg", n)
    (tmp_path / "photos/broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "t.tar").write_bytes(tar_of({f"{n}.jpg": jpeg(n) for n in range(5)})[:-2000])
    paths = [str(tmp_path / "photos"), str(tmp_path / "t.tar")]
    output = tmp_path / "v.npy"
    with Embedder.load(tmp_path / "model.onnx", device="cpu") as embedder:

        def stops(sources):  # type: ignore[no-untyped-def]
            yield from islice(local_engine(embedder)(islice(sources, 10)), 10)
            raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            embed_sources(find_sources(paths), output, stops, embedder.contract)
        expected = tmp_path / "expected.npy"
        engine = local_engine(embedder)
        embed_sources(find_sources(paths), expected, engine, embedder.contract)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "embedkit.cli.main", "embed", *paths),
            *("--model", tmp_path / "model.onnx", "-o", output, "--ray", "local", "--json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout)
    assert said["found"] == said["embedded"] + said["known"] + said["failed"]
    assert said["known"] == 9
    assert np.abs(np.load(output) - np.load(expected)).max() < 1e-6
    assert (tmp_path / "v.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()
    failed = [(tmp_path / f"{name}.failed.jsonl").read_text() for name in ("v", "expected")]
    assert failed[0] == failed[1]
