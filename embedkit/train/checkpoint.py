"""The state of a training in one safetensors file: a kill leaves the old one, damage is found.

Tensors (network, method, optimiser) are stored as they are; everything scalar is one JSON
document in the file's metadata. Nothing is pickled. A digest over all tensors finds a damaged file,
which safetensors alone does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from embedkit.atomic import published
from embedkit.errors import EmbedKitError, MismatchError

__all__ = [
    "Checkpoint",
    "pack",
    "read_checkpoint",
    "unpack",
    "write_checkpoint",
]

_SCHEMA = "embedkit.checkpoint/1"
_KEY = "embedkit.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: By name, on the CPU: ``network/...``, ``method/...``,
            ``optimizer/<kind>/<parameter>``, ``average/...``.
        state: The JSON document given to `write_checkpoint`.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Replace `path` by these tensors and this JSON document, at once or not at all.

    Raises:
        EmbedKitError: The file cannot be written; what stood there stands.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = {"schema": _SCHEMA, "digest": _digest(whole), "state": state}
    metadata = {"format": "pt", _KEY: json.dumps(document, allow_nan=False)}
    try:
        with published(path) as temporary:
            save_file(whole, temporary, metadata)
    except SafetensorError as error:
        raise EmbedKitError(
            f"{path} could not be written", facts=f"{error}; what stood there before still stands"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """The content of a checkpoint.

    Raises:
        MismatchError: There is none, or it is damaged, foreign or of another version.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise MismatchError(f"there is no checkpoint {path}") from error
    except (SafetensorError, OSError) as error:
        raise MismatchError(f"the checkpoint {path} is damaged", facts=str(error)) from error
    if _KEY not in metadata:
        raise MismatchError(
            f"{path} is a safetensors file, but no checkpoint of embedkit",
            facts=f"its metadata has no {_KEY!r}",
        )
    try:
        document = json.loads(metadata[_KEY])
        schema, digest, state = document["schema"], document["digest"], document["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"the checkpoint {path} is damaged", facts=f"{type(error).__name__}: {error}"
        ) from error
    if schema != _SCHEMA:
        raise MismatchError(
            f"the checkpoint {path} was written by another embedkit",
            facts=f"it is {schema!r}, this embedkit reads {_SCHEMA!r}",
        )
    if _digest(tensors) != digest:
        raise MismatchError(
            f"the checkpoint {path} is damaged",
            facts="its tensors are not those that were written",
        )
    return Checkpoint(tensors, state)


def pack(
    network: nn.Module,
    method: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: nn.Module | None = None,
) -> dict[str, Tensor]:
    """All tensors of a training by name; without an optimiser, those of its result.

    Args:
        average: The network of averaged weights, where there is one.
    """
    tensors = {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"method/{name}": tensor for name, tensor in method.state_dict().items()}
    if optimizer is not None:
        for name, parameter in _parameters(network, method).items():
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{kind}/{name}"] = tensor
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    method: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    average: nn.Module | None = None,
) -> None:
    """Put the tensors of `pack` back, exactly; None leaves a part out.

    Raises:
        MismatchError: They belong to another network or method.
    """
    _load(network, tensors, "network/")
    if average is not None:
        _load(average, tensors, "average/")
    if method is None:
        return
    _load(method, tensors, "method/")
    if optimizer is None:
        return
    parameters = _parameters(network, method)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, kind, owner = name.split("/", 2)
            if owner not in parameters or parameters[owner] not in trained:
                raise MismatchError(f"the checkpoint trains {owner}, which this run does not")
            parameter = parameters[owner]
            state = optimizer.state.setdefault(parameter, {})
            if tensor.shape == parameter.shape:
                # In the parameter's own memory format, so that the next step runs the same kernel.
                state[kind] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            else:
                # Fused AdamW counts its steps where the parameter is.
                state[kind] = tensor.to(parameter.device, copy=True)


def _parameters(network: nn.Module, method: nn.Module) -> dict[str, nn.Parameter]:
    named = {f"network/{name}": parameter for name, parameter in network.named_parameters()}
    return named | {f"method/{name}": parameter for name, parameter in method.named_parameters()}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    differing = sorted(found.keys() ^ wanted.keys()) or sorted(
        name for name in wanted if wanted[name].shape != found[name].shape
    )
    if differing:
        raise MismatchError(
            f"the checkpoint holds another {prefix.rstrip('/')} than its settings describe",
            facts=f"{len(differing)} tensors differ, the first is {differing[0]}",
        )
    module.load_state_dict(found)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
