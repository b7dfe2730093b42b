"""TensorBoard's event files of a training, for those who like to watch it there.

    tensorboard --logdir runs

What is written: ``train/loss`` and the loss's tell-tales and learning rates of every step, the
metrics of every evaluation, the untrained network at step 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedkit.errors import MissingExtraError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["EventLog", "check_tensorboard"]


def check_tensorboard() -> None:
    """Import the package, so that its absence is found before the work begins.

    Raises:
        MissingExtraError: It is not installed.
    """
    _writer_class()


class EventLog:
    """Writes into ``tensorboard/`` of a run, or nowhere.

    Args:
        folder: None writes nothing, and needs no package.
        purge_step: What an earlier, stopped part of the training wrote of this step and later ones
            is void, and TensorBoard does not show it.

    Raises:
        MissingExtraError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path | None, purge_step: int) -> None:
        self._writer: SummaryWriter | None = None
        if folder is not None:
            self._writer = _writer_class()(folder, purge_step=purge_step)

    def write(self, part: str, numbers: Mapping[str, Any], step: int) -> None:
        """Numbers after so many steps, as ``part/name``; what is None is left out."""
        if self._writer is not None:
            for name, number in numbers.items():
                if number is not None:
                    self._writer.add_scalar(f"{part}/{name}", number, step)

    def flush(self) -> None:
        """What was written is in the file when this returns."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "--tensorboard", package="tensorboard", extra="tensorboard"
        ) from error
    return SummaryWriter
