"""The oldest package versions that are safe with files from elsewhere; older ones are refused.

pip keeps them at installation; this keeps them where another program has installed an older one
since.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from embedkit.errors import MissingError

__all__ = ["FLOORS", "Floor", "require"]


class Floor(NamedTuple):
    """The oldest version that is taken.

    Attributes:
        version: Its first two numbers.
        reason: What an older one does.
        install: What to hand to pip.
    """

    version: tuple[int, int]
    reason: str
    install: str


FLOORS = {
    "faiss": Floor((1, 15), "a damaged index can crash older ones", "faiss-cpu"),
    "onnx": Floor((1, 21), "a model file can reach other files through older ones", "onnx"),
    "onnxruntime": Floor(
        (1, 27),
        "a model file can read any file of this machine through older ones",
        '"embedkit[cpu]"   (or "embedkit[gpu]")',
    ),
    "Pillow": Floor((12, 3), "a picture file can overwrite memory of older ones", "pillow"),
    "torch": Floor((2, 10), "a checkpoint file can run code in older ones", "torch"),
}


def require(package: str, version: str) -> None:
    """Refuse a package that is older than its floor.

    Args:
        package: Of `FLOORS`.
        version: What it says it is: ``1.27.0``, ``2.10.0+cu132``. One without two numbers (built by
            hand) is taken.

    Raises:
        MissingError: It is too old.
    """
    floor = FLOORS[package]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= floor.version:
        return
    least = ".".join(map(str, floor.version))
    raise MissingError(
        f"the installed {package} {version} is too old",
        facts=f"{floor.reason}; the oldest that is taken is {least}",
        hint=f"pip install --upgrade {floor.install}",
    )
