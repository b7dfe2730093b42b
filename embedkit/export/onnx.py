"""A trained network becomes one ONNX file: pixels in, vectors out, and it knows what it is.

A network that ends in codebooks has a second output, the codes.

uint8 pixels ``(batch, height, width, 3)`` enter; casting, normalisation, backbone, pooling, head
and, where the loss lives on the unit sphere, the L2 norm are nodes of the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedkit.atomic import published
from embedkit.errors import EmbedKitError, GateError, MismatchError, MissingExtraError
from embedkit.floors import require
from embedkit.models import EmbeddingNet, weights_hash
from embedkit.models.quantized import QuantizedNet
from embedkit.runtime.contract import CODES_NAME, CONTRACT_KEY, ModelContract, SelfTest
from embedkit.runtime.seal import sealed

try:
    import onnx
    import onnxscript  # noqa: F401  torch's exporter needs it and names it badly when it is missing
except ModuleNotFoundError as error:
    raise MissingExtraError("the export", package=str(error.name), extra="train") from error

__all__ = ["OPSET", "export_onnx"]

require("onnx", onnx.__version__)

# What torch's exporter writes natively; onnxruntime and both kinds of TensorRT read it.
OPSET = 20

_SELF_TEST_SEED = 0


def export_onnx(network: EmbeddingNet, contract: ModelContract, path: Path) -> ModelContract:
    """Write `network` to `path` as one self-contained ONNX file; the network is left as it is.

    Args:
        network: On any device, in any mode; exported as it evaluates.
        contract: What the file will say about itself; must be this network's.
        path: Replaced at once, or not at all.

    Returns:
        The contract as it stands in the file: with the self-test, measured here in torch.

    Raises:
        MismatchError: The contract is not this network's.
        GateError: The network gives vectors that are not finite.
        EmbedKitError: It cannot be translated or written.

    Cost: some seconds, and twice the network's memory.
    """
    network = copy.deepcopy(network).cpu().eval()
    _check_contract(network, contract)
    deployed = _deployed(network, contract).eval()
    contract = dataclasses.replace(
        contract,
        self_test=_self_test(deployed, contract),
        versions={**contract.versions, "onnx": version("onnx"), "opset": str(OPSET)},
    )
    model = _translate(deployed, contract)
    _forget_the_source(model)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.dumps())
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EmbedKitError("the exported graph is not valid ONNX", facts=str(error)) from error
    with published(path) as temporary:
        temporary.write_bytes(sealed(model.SerializeToString()))
    return contract


class _Deployed(nn.Module):
    """The network with the tail a deployed model carries."""

    def __init__(self, network: EmbeddingNet, contract: ModelContract) -> None:
        super().__init__()
        self.network = network
        self.normalizes = contract.normalizes

    def forward(self, pixels: Tensor) -> Tensor:
        embedding: Tensor = self.network(pixels)
        if not self.normalizes:
            return embedding
        length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        unit: Tensor = embedding / length.clamp(min=1e-12)
        return unit


class _DeployedWithCodes(nn.Module):
    """A network that ends in codebooks: soft rows, which have no unit length, and codes."""

    def __init__(self, network: QuantizedNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.with_codes(pixels)


def _deployed(network: EmbeddingNet, contract: ModelContract) -> nn.Module:
    if isinstance(network, QuantizedNet):
        return _DeployedWithCodes(network)
    return _Deployed(network, contract)


def _check_contract(network: EmbeddingNet, contract: ModelContract) -> None:
    """A contract that describes another network would be believed by everyone after us."""
    spread = np.array(contract.preprocess.std)
    scale, shift = 1 / (255 * spread), -np.array(contract.preprocess.mean) / spread
    faults = []
    if contract.weights_hash != weights_hash(network):
        faults.append("the weights are others")
    if contract.embedding_dim != network.embedding_dim:
        faults.append(
            f"{network.embedding_dim} numbers, the contract says {contract.embedding_dim}"
        )
    if not (
        np.allclose(network.scale.numpy().ravel(), scale, rtol=1e-5)
        and np.allclose(network.shift.numpy().ravel(), shift, rtol=1e-5, atol=1e-6)
    ):
        faults.append("pixels are normalised by another mean and std")
    if contract.vectors != network.vectors:
        faults.append(f"{network.vectors} vectors per picture, it says {contract.vectors}")
    own = network.codebooks() if isinstance(network, QuantizedNet) else None
    if contract.codebooks != own:
        faults.append("the codebooks are others")
    if faults:
        raise MismatchError("the contract is not this network's", facts="\n".join(faults))


def _self_test(deployed: nn.Module, contract: ModelContract) -> SelfTest:
    test = SelfTest(seed=_SELF_TEST_SEED, vector=())
    with torch.inference_mode():
        given = deployed(torch.from_numpy(test.pixels(contract.preprocess)))
        vector = given[0][0] if contract.codebooks else given[0]
    if not vector.isfinite().all():
        raise GateError(
            "the network gives vectors that are not finite",
            facts="seen on the self-test's picture; nothing was written",
            hint="train again with a lower --learning-rate, or export an earlier checkpoint",
        )
    return dataclasses.replace(test, vector=tuple(vector.tolist()))


def _translate(deployed: nn.Module, contract: ModelContract) -> Any:
    size = contract.preprocess.height, contract.preprocess.width
    # Traced at 2, because a 1 would be taken for a constant.
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    try:
        # What the exporter prints and warns about is for its own developers; errors are raised.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                deployed,
                (example,),
                input_names=[contract.input_name],
                output_names=[contract.output_name, *[CODES_NAME] * bool(contract.codebooks)],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        raise EmbedKitError(
            f"the backbone {contract.backbone} could not be translated to ONNX",
            facts=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}",
            hint="please report it with the versions that `embedkit --version` shows",
        ) from error
    if program is None:  # only for a caller that lets the exporter write the file itself
        raise EmbedKitError("torch.onnx.export returned nothing")
    return program.model_proto


def _forget_the_source(model: Any) -> None:
    """The exporter notes on every node where in whose source it came from; that is not shipped."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.metadata_props[:]
