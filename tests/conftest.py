"""What several test files share: the photos beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos and weights beside the project; a test skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EMBEDKIT_SHARED", beside))
    if not folder.is_dir():
        pytest.skip("no ../shared/data and no EMBEDKIT_SHARED: this test needs the real photos")
    return folder
