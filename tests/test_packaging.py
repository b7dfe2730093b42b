"""The declared packages are those on the disk; a wheel and sdist hold embedkit and no more."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import embedkit

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> set[str]:
    return set(SETTINGS["tool"]["setuptools"]["packages"])


def on_disk() -> set[str]:
    places = {
        "embedkit": ROOT / "embedkit",
        "embedkit.cli": ROOT / "cli",
        "embedkit.models": ROOT / "models",
    }
    found = set()
    for name, folder in places.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    return found


def modules_on_disk() -> set[str]:
    return {
        f"embedkit/{path.relative_to(ROOT / start if start == 'embedkit' else ROOT).as_posix()}"
        for start in ("embedkit", "cli", "models")
        for path in (ROOT / start).rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_the_declared_packages_are_the_folders_on_the_disk() -> None:
    assert declared() == on_disk()


def test_the_two_links_lead_where_they_should() -> None:
    assert (ROOT / "embedkit" / "cli").readlink() == Path("../cli")
    assert (ROOT / "embedkit" / "models").readlink() == Path("../models")


def test_the_version_is_said_once_and_the_same_twice() -> None:
    assert SETTINGS["project"]["version"] == embedkit.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_every_module_and_only_embedkit(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if name.endswith(".py")} == modules_on_disk()
    assert {name.split("/")[0] for name in names} == {"embedkit"}
    assert "embedkit/py.typed" in names
    page = {path.name for path in (ROOT / "embedkit/serve/page").iterdir()}
    assert {f"embedkit/serve/page/{name}" for name in page} <= names
    assert {"embedkit/report/atlas.js", "embedkit/report/atlas.css"} <= names


def test_the_sdist_can_build_and_carries_licence_and_readme(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "cli/main.py", "models/__init__.py"} <= names


def test_the_wheel_works_from_an_empty_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r});"
        "import embedkit, embedkit.cli.main, embedkit.models;"
        f"assert embedkit.__file__.startswith({str(site)!r}), embedkit.__file__;"
        f"assert embedkit.cli.main.__file__.startswith({str(site)!r});"
        "embedkit.cli.main.main(['--version'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"embedkit {embedkit.__version__}")
