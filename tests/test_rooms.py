"""The rooms: the light half works where torch cannot be imported, and costs nothing until used."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = [
    "embedkit",
    "embedkit.errors",
    "embedkit.registry",
    "embedkit.imaging",
    "embedkit.evaluate",
    "embedkit.runtime",
    "embedkit.runtime.backends.onnxruntime",
    "embedkit.runtime.backends.tensorrt",
    "embedkit.export.tensorrt",  # a machine that only deploys builds its own engine
    "embedkit.index",
    "embedkit.report",
    "embedkit.scale",
    "embedkit.serve",
    "embedkit.cli.main",
    "embedkit.data",  # readers: `embedkit eval` of an exported model needs them
]
HEAVY = [
    *("torch", "torchvision", "onnx", "onnxscript", "safetensors"),
    *("imagehash", "scipy", "sklearn"),
]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_the_light_half_imports_where_there_is_no_torch(module: str) -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    run(f"import sys; {blocked}; import {module}")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import embedkit", ["numpy", "PIL", "faiss", "onnxruntime", "typer"]),
        ("import embedkit.cli.main", ["numpy", "PIL", "faiss", "onnxruntime", "rich", "torch"]),
        ("import embedkit.imaging", ["faiss", "onnxruntime"]),
        ("import embedkit.evaluate", ["faiss", "onnxruntime"]),
        ("import embedkit.runtime", ["faiss", "onnxruntime"]),
        ("import embedkit.index", ["onnxruntime"]),
    ],
)
def test_an_import_brings_nothing_it_does_not_need(statement: str, absent: list[str]) -> None:
    loaded = run(f"import sys; {statement}; print(*sys.modules)").split()
    assert not set(absent) & set(loaded)


def test_every_public_name_resolves_and_no_other_does() -> None:
    import embedkit

    for name in embedkit.__all__:
        assert getattr(embedkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        embedkit.Embeder  # noqa: B018
