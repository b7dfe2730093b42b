"""How much an installation weighs: embedkit's light runtime against PyTorch alone.

    python -m benchmarks.install

Installs this checkout with the [cpu] extra into an empty folder and adds up its files; the weight
of torch and all it requires is read from the environment this script runs in.
Target: the light runtime at most 300 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.figures import machine, save

__all__ = ["light_bytes", "torch_bytes"]

ROOT = Path(__file__).resolve().parents[1]


def light_bytes() -> dict[str, int]:
    """Bytes of each installed package of ``embedkit[cpu]``."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*command, "--target", str(target), f"{ROOT}[cpu]"], check=True)
        sizes: dict[str, int] = {}
        for path in target.rglob("*"):
            if path.is_file():
                name = path.relative_to(target).parts[0]
                sizes[name] = sizes.get(name, 0) + path.stat().st_size
        return sizes


def torch_bytes() -> dict[str, int]:
    """Bytes of torch and of everything it requires, as installed here."""
    sizes: dict[str, int] = {}
    waiting = ["torch", "torchvision"]
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        files = (Path(str(file.locate())) for file in found.files or [])
        sizes[name] = sum(path.stat().st_size for path in files if path.is_file())
        for text in found.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return sizes


def main() -> None:
    light, torch = light_bytes(), torch_bytes()
    for title, sizes in (("embedkit[cpu]", light), ("torch, torchvision", torch)):
        print(f"{title}: {sum(sizes.values()) / 1e6:,.0f} MB")
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:6]:
            print(f"    {size / 1e6:8,.1f}  {name}")
    ratio = sum(light.values()) / sum(torch.values())
    print(f"ratio {ratio:.3f}")
    save(
        "install",
        {
            "machine": machine(),
            "light_mb": round(sum(light.values()) / 1e6, 1),
            "torch_mb": round(sum(torch.values()) / 1e6, 1),
            "ratio": round(ratio, 4),
        },
    )


if __name__ == "__main__":
    main()
