"""One training in several processes: each computes a part of every batch, all see all embeddings.

    torchrun --nproc-per-node 4 -m embedkit.cli.main train ./photos

All processes plan the same batches, compute their own part's embeddings, exchange them, and compute
the same loss of the whole batch. Gradients of the loss to the embeddings are summed over the
processes, those of parameters are then averaged, so that they are those of one process with the
whole batch, whatever the loss: what a process adds to the network's gradient is its part times the
number of processes, and parameters of the loss have the same gradient everywhere.

The first process writes and talks. The others write the same files into a folder of their own,
which is thrown away.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed

from embedkit.errors import EmbedKitError, UsageError

__all__ = ["World", "joined"]

# For the others while the first one looks at all photos; who has died is noticed at once.
_PATIENCE = datetime.timedelta(hours=12)

_Thing = TypeVar("_Thing")


@dataclass(frozen=True)
class World:
    """The processes of a training; as it stands: this one alone, and every call does nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        local_rank: Number of this process on its machine.
        local_size: How many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def told(cls) -> World:
        """What torchrun says in the environment.

        Raises:
            UsageError: It says half of it.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ["LOCAL_RANK"])
            return cls(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        except (KeyError, ValueError) as error:
            raise UsageError(
                "WORLD_SIZE is set, and not all that belongs to it",
                facts=f"{type(error).__name__}: {error}",
                hint="torchrun --nproc-per-node 2 -m embedkit.cli.main train ./photos",
            ) from error

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device for this process, where `name` is what all of them were given.

        Raises:
            UsageError: One GPU for all of them.
        """
        if self.alone or name in ("cpu", "mps"):
            return name
        if ":" in name:
            raise UsageError(
                f"{self.size} processes cannot share {name}", hint="--device cuda: one for each"
            )
        use_cuda = name == "cuda" or torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if use_cuda else "cpu"

    def workers(self, asked: int | None) -> int | None:
        """Decoding threads of this process: its share of the machine when none were asked for."""
        if self.alone or asked is not None:
            return asked
        return max(1, (os.cpu_count() or 1) // self.local_size)

    @contextlib.contextmanager
    def folder(self, run_dir: Path) -> Iterator[Path]:
        """Where this process writes: the run's folder, or one that is thrown away."""
        if self.leads:
            yield run_dir
            return
        with tempfile.TemporaryDirectory(prefix="embedkit-") as temporary:
            own = Path(temporary) / run_dir.name
            own.mkdir()
            best = run_dir / "best.safetensors"
            if best.exists():
                shutil.copy(best, own)
            yield own

    # --- what is divided -------------------------------------------------------------------------

    def part(self, count: int) -> slice:
        """This process's part of `count` things; all of them where there are too few to divide."""
        if count < self.size:
            return slice(0, count)
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """``(count, ...)`` of all processes in order, from the `part` of each; differentiable."""
        if self.alone or count < self.size:
            return rows
        sizes = [count * (r + 1) // self.size - count * r // self.size for r in range(self.size)]
        gathered: Tensor = _Gather.apply(rows, sizes, self.rank)
        return gathered

    def compute(self, embed: Callable[[Tensor], Tensor], pixels: Tensor, count: int) -> Tensor:
        """``(count, D)``: `embed` of this process's pixels, and what the others computed.

        Random numbers differ between processes in here, and are the same again afterwards.
        """
        devices = [pixels.device] if pixels.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(torch.initial_seed() + self.rank)
            rows = embed(pixels)
        return self.gather(rows, count)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Over all processes; the same parameters must have one everywhere."""
        if self.alone:
            return
        gradients = [part.grad for part in parameters if part.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _together():
            torch_distributed.all_reduce(flat)
        flat /= self.size
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))

    # --- what must be agreed on ------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of the processes."""
        if self.alone:
            return flag
        count = torch.tensor(int(flag))
        with _together():
            torch_distributed.all_reduce(count)
        return bool(count)

    def of_leader(self, make: Callable[[], _Thing]) -> _Thing:
        """What the first process makes; the others wait for it.

        An error there is an error of all.
        """
        if self.alone:
            return make()
        made: list[Any] = [None]
        failed: EmbedKitError | None = None
        if self.leads:
            try:
                made = [make()]
            except EmbedKitError as error:
                failed = error
        if self.any(failed is not None):
            raise failed or EmbedKitError("the first process of this training has failed")
        with _together():
            torch_distributed.broadcast_object_list(made)
        thing: _Thing = made[0]
        return thing

    def align(self, *modules: nn.Module) -> None:
        """Give all processes the first one's parameters and buffers, against drift by rounding."""
        if self.alone:
            return
        with _together():
            for module in modules:
                for tensor in module.state_dict().values():
                    dense = tensor.contiguous()
                    torch_distributed.broadcast(dense, 0)
                    tensor.copy_(dense)


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward sums what each process's loss says of this one's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in sizes]
        with _together():
            torch_distributed.all_gather(pieces, padded)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        total = slope.contiguous().clone()
        with _together():
            torch_distributed.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.size], None, None


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun has started, connected; or this one alone.

    Raises:
        UsageError: The environment says half of what it should.
        EmbedKitError: They cannot find each other.
    """
    world = World.told()
    if world.alone:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        torch_distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield world
        # Whoever reads the run next finds it whole.
        world.any(False)
    finally:
        torch_distributed.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What the exchange says when another process is gone, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise EmbedKitError(
            "another process of this training has ended, and so does this one",
            facts=str(error).partition("\n")[0][:200],
            hint="its own message is above; then the same torchrun ... train --resume RUN",
        ) from error
