"""Packages that are too old are refused in a sentence, and the floors are those pip is told."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from embedkit.errors import MissingError
from embedkit.floors import FLOORS, require

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", FLOORS)
def test_the_floor_and_what_is_above_is_taken_and_what_is_below_refused(package: str) -> None:
    major, minor = FLOORS[package].version
    for good in (f"{major}.{minor}", f"{major}.{minor}.3+cu132", f"{major + 1}.0.0", "built"):
        require(package, good)
    for old in (f"{major}.{minor - 1}.99", f"{major - 1}.999"):
        with pytest.raises(MissingError, match="too old") as error:
            require(package, old)
        assert f"{major}.{minor}" in str(error.value.facts)
        assert "pip install --upgrade" in str(error.value.hint)


def test_pip_is_told_the_same_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        said += extra
    wheels = {"faiss": ["faiss-cpu"], "onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    for package, floor in FLOORS.items():
        for wheel in wheels.get(package, [package.lower()]):
            found = {
                tuple(map(int, match.groups()))
                for one in said
                if (match := re.fullmatch(rf"{wheel}>=(\d+)\.(\d+)", one))
            }
            assert found == {floor.version}, wheel


@pytest.mark.parametrize(
    ("package", "first", "name"),
    [
        ("faiss", "from embedkit.index import Catalog", "faiss"),
        ("onnxruntime", "import embedkit.runtime.backends.onnxruntime", "onnxruntime"),
        ("PIL", "import embedkit.imaging", "Pillow"),
    ],
)
def test_an_old_package_is_met_where_it_is_first_loaded(
    package: str, first: str, name: str
) -> None:
    # Pillow compares its own version while its parts are loaded.
    code = f"import {package}, PIL.Image; {package}.__version__ = '0.9.1'; {first}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"the installed {name} 0.9.1 is too old" in done.stderr
