"""What the tests of this folder share: pictures, a model, and tar files made byte by byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["jpeg", "picture", "tar_of"]


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))
    return path


def jpeg(seed: int) -> bytes:
    """A photo of random colours, 40 x 32."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((40, 32)).save(file, "JPEG")
    return file.getvalue()


def tar_of(members: dict[str, bytes], *, mode: str = "w") -> bytes:
    """A tar with these files in this order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()
