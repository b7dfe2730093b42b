"""Weights from a file or from torchvision into a backbone: every key must fit, no code is run."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_weight

from embedkit.errors import EmbedKitError, MismatchError, MissingError, UsageError
from embedkit.floors import require
from embedkit.models.backbone import BackboneEntry

__all__ = ["download_weights", "load_into", "read_weights"]

require("torch", torch.__version__)

_SHOWN = 4


def download_weights(entry: BackboneEntry) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a backbone, from its cache folder or else from the network.

    Raises:
        UsageError: There are none for this backbone.
        MissingError: Not in the cache and not to be had; says where the file would be looked for.
    """
    if entry.weights is None:
        raise UsageError(
            f"there are no published ImageNet weights for {entry.name}",
            hint="--weights none, or another --backbone",
        )
    published = get_weight(entry.weights)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
    try:
        # torch.hub announces its download on stdout, which belongs to the command's answer.
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise MissingError(
            f"the ImageNet weights of {entry.name} are not here and could not be downloaded",
            facts=f"{published.url}: {reason}\nlooked for first: {cached}",
            hint="bring that file from a machine with network: copy it to the place above,\n"
            f"or hand it over with: --weights ./{cached.name}",
        ) from error
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or PyTorch file, by name; read without running code.

    A state dict inside a checkpoint is found under the usual keys ``state_dict`` and ``model``.

    Raises:
        UsageError: There is no such file.
        MismatchError: It is neither, or holds no tensors by name.
    """
    if not path.is_file():
        raise UsageError(
            f"there is no weights file {path}", hint="--weights imagenet, none or a file"
        )
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message suggests switching the protection off.
        raise _unreadable(
            path, "it holds more than tensors, or is no file of torch.save"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise _unreadable(path, f"it holds no tensors by name but a {type(content).__name__}")
    return tensors


def load_into(
    body: nn.Module, state: Mapping[str, Tensor], entry: BackboneEntry, source: str
) -> None:
    """Copy the backbone's part of a state dict; the rest of the file (a classifier) is left over.

    The part is found under any prefix, so that ``module.``, or a run of embedkit itself, is
    understood.

    Raises:
        MismatchError: A key is missing, has another shape, or holds a value that is not finite.
    """
    wanted = body.state_dict()
    # Counters of seen batches came later than many published files and change no output.
    required = [key for key in wanted if not key.endswith("num_batches_tracked")]
    prefix = _find_prefix(state, required)
    part = {key: state[prefix + key] for key in wanted if prefix + key in state}
    if entry.fit_state is not None:
        part = entry.fit_state(part, body)
    faults = [f"missing: {key}" for key in required if key not in part]
    faults += [
        f"shape of {key}: {tuple(part[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in required
        if key in part and part[key].shape != wanted[key].shape
    ]
    faults += [
        f"not finite: {key}" for key in required if key in part and not part[key].isfinite().all()
    ]
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise MismatchError(
            f"{source} does not fit the backbone {entry.name}",
            facts="\n".join(faults[:_SHOWN] + more),
            hint="the --backbone these weights were made with",
        )
    try:
        body.load_state_dict({**wanted, **part})
    except RuntimeError as error:
        raise EmbedKitError(f"{source} could not be loaded", facts=str(error)) from error


def _unreadable(path: Path, facts: str) -> MismatchError:
    return MismatchError(
        f"{path} is no file of weights that can be read",
        facts=facts,
        hint="save it with torch.save(model.state_dict(), 'weights.pth'), or as .safetensors",
    )


def _find_prefix(state: Mapping[str, Tensor], required: list[str]) -> str:
    """What stands before the backbone's keys in this file: where most of them are found."""
    ends = {key[: -len(required[0])] for key in state if key.endswith(required[0])} | {""}
    candidates = sorted((end for end in ends if end == "" or end.endswith(".")), key=len)
    return max(candidates, key=lambda prefix: sum(prefix + key in state for key in required))
