"""What every registered loss promises: a new loss is tested by existing."""

from __future__ import annotations

import importlib
import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedkit.errors import UnknownNameError, UsageError
from embedkit.losses import MetricLoss, create, names, needs_classes, options

CLASSES, WIDTH = 6, 8

# Rows per step of the losses that read the batch by position; the others take any number.
GROUP = {"isif": 2, "expression-triplet": 3}
# Losses that read the order of rows, and the options that make them stop where there are any.
ORDERED = {"log-ratio": {"anchors": "all"}, "dense-triplet": {"anchors": "all"}}
BY_POSITION = [*GROUP, "npair"]
# Centroids are given, not learned.
FIXED = ["upper-bound"]

every_loss = pytest.mark.parametrize("name", names())


def make(name: str, *, classes: int = CLASSES, width: int = WIDTH, **given: Any) -> MetricLoss:
    torch.manual_seed(7)
    sizes = {"num_classes": classes, "embedding_dim": width} if needs_classes(name) else {}
    return create(name, **sizes, **given)


def batch(count: int = 12, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, width), torch.arange(count) // 2 % CLASSES


def gradient(loss: Callable[..., Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    value = loss(x, labels)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


@every_loss
def test_the_docstring_names_paper_shape_and_cost(name: str) -> None:
    loss = make(name)
    module = importlib.import_module(type(loss).__module__)
    assert "Paper" in (module.__doc__ or "")
    assert "Shape:" in (type(loss).__doc__ or "")
    assert "Cost" in (type(loss).__doc__ or "")
    assert all(f" {option}: " in (type(loss).__doc__ or "") for option in options(name))


@every_loss
def test_options_are_keywords_with_defaults(name: str) -> None:
    parameters = inspect.signature(type(make(name))).parameters.values()
    assert all(part.kind is part.KEYWORD_ONLY for part in parameters)
    assert inspect.Parameter.empty not in options(name).values()


@every_loss
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_tiny_batches_give_a_finite_differentiable_scalar(name: str, count: int) -> None:
    x, labels = batch()
    count *= GROUP.get(name, 1)
    value, slope = gradient(make(name), x[:count], labels[:count])
    assert value.shape == ()
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()
    if count == 0:
        assert value == 0


@every_loss
@pytest.mark.parametrize(
    "spoil", ["duplicates", "collapsed", "zero rows", "constant rows", "one class", "all alone"]
)
def test_hostile_batches_give_finite_values_and_gradients(name: str, spoil: str) -> None:
    x, labels = batch()
    match spoil:
        case "duplicates":
            x[::2] = x[0]
        case "collapsed":
            x[:] = x[0]
        case "zero rows":
            x[3:7] = 0
        case "constant rows":
            x[:] = 1
        case "one class":
            labels[:] = 2
        case "all alone":
            x, labels = x[:6], torch.arange(6)
    for dtype in (torch.float32, torch.float64):
        value, slope = gradient(make(name), x.to(dtype), labels)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_half_precision_input_and_autocast_change_nothing_but_rounding(
    name: str, dtype: torch.dtype, scale: float
) -> None:
    x, labels = batch()
    x = (scale * x).to(dtype)
    loss = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, slope = gradient(loss, x, labels)
    assert value.dtype == torch.float32
    assert slope.dtype == dtype
    assert torch.isfinite(slope).all()
    plain, _ = gradient(loss, x.float(), labels)
    torch.testing.assert_close(value, plain)


@every_loss
def test_float64_is_kept(name: str) -> None:
    x, labels = batch()
    value, _ = gradient(make(name), x.double(), labels)
    assert value.dtype == torch.float64


@every_loss
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    x, labels = batch()
    if name in BY_POSITION:
        pytest.skip("its positives are told by their places in the batch")
    order = torch.randperm(len(x))
    loss = make(name, **ORDERED.get(name, {}))
    if name == "margin":
        loss = make(name, mining="all")  # the draws follow the order
    value, slope = gradient(loss, x.double(), labels)
    moved, moved_slope = gradient(loss, x.double()[order], labels[order])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_slope, slope[order])


@every_loss
def test_labels_of_any_integer_width_and_layout_mean_the_same(name: str) -> None:
    x, labels = batch()
    loss = make(name)
    value, _ = gradient(loss, x, labels)
    strided = torch.stack([labels, labels + 1], dim=1)[:, 0]
    assert not strided.is_contiguous()
    for same in (labels.int(), labels.short(), labels.to(torch.uint8), strided):
        assert gradient(loss, x, same)[0] == value
    if not needs_classes(name):
        torch.testing.assert_close(gradient(loss, x, labels * -1000 + 7)[0], value)


@every_loss
def test_a_normalising_loss_ignores_the_length_of_rows(name: str) -> None:
    x, labels = batch()
    loss = make(name)
    if not loss.normalizes:
        return
    lengths = torch.rand(len(x), 1, dtype=torch.float64) + 0.5
    value, _ = gradient(loss, x.double(), labels)
    torch.testing.assert_close(gradient(loss, x.double() * lengths, labels)[0], value)


@every_loss
def test_every_call_leaves_tell_tales_as_floats(name: str) -> None:
    x, labels = batch()
    loss = make(name)
    assert loss.stats == {}
    loss(x, labels)
    assert len(loss.stats) >= 3
    assert all(type(value) is float and math.isfinite(value) for value in loss.stats.values())
    assert 0 < loss.stats["spread"] <= 1
    loss(torch.ones_like(x), labels)
    assert loss.stats["spread"] < 0.01


@every_loss
def test_class_vectors_are_the_parameter_proxies_and_learn(name: str) -> None:
    loss = make(name)
    found = dict(loss.named_parameters())
    assert needs_classes(name) == loss.needs_classes
    assert ("proxies" in found) == (loss.needs_classes and name not in FIXED)
    if "proxies" in found:
        assert found["proxies"].shape[0] == CLASSES
        assert found["proxies"].shape[-1] == WIDTH
        loss(*batch()).backward()
        assert found["proxies"].grad is not None
        assert found["proxies"].grad.any()


@every_loss
def test_state_and_settings_survive_a_round_trip(name: str) -> None:
    x, labels = batch()
    loss, twin = make(name), make(name)
    twin.load_state_dict(loss.state_dict())
    assert gradient(twin, x, labels)[0] == gradient(loss, x, labels)[0]


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What is merely expanded owns no memory.
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@every_loss
def test_no_tensor_grows_with_the_cube_of_the_batch(name: str) -> None:
    count = 512 // GROUP.get(name, 1) * GROUP.get(name, 1)
    torch.manual_seed(0)
    x, labels = torch.randn(count, 128, requires_grad=True), torch.arange(count) // 4
    loss = make(name, classes=128, width=128, **ORDERED.get(name, {}))
    with Largest() as largest:
        loss(x, labels).backward()
    assert largest.numel <= 8 * count * count


@every_loss
def test_wrong_inputs_are_named(name: str) -> None:
    x, labels = batch()
    loss = make(name)
    for bad in (x[0], x.int(), x[None]):
        with pytest.raises(UsageError, match="embeddings"):
            loss(bad, labels)
    with pytest.raises(UsageError, match="labels"):
        loss(x, labels[:-1])
    if loss.needs_classes:
        with pytest.raises(UsageError, match="labels 0 to 5"):
            loss(x, labels + 1)
        with pytest.raises(UsageError, match=f"width {WIDTH}"):
            loss(x[:, :-1], labels)


@every_loss
def test_unknown_options_and_misplaced_sizes_are_named(name: str) -> None:
    sizes = {"num_classes": 3, "embedding_dim": 4} if needs_classes(name) else {}
    with pytest.raises(UnknownNameError, match=f"there is no option of {name} named 'nonsense'"):
        create(name, **sizes, nonsense=1)
    if needs_classes(name):
        with pytest.raises(UsageError, match="needs embedding_dim"):
            create(name, num_classes=3)
        with pytest.raises(UsageError, match="num_classes must be"):
            create(name, num_classes=0, embedding_dim=4)
    else:
        with pytest.raises(UsageError, match="takes no num_classes"):
            create(name, num_classes=3)


def test_the_nearest_name_and_option_are_offered() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'triplet'"):
        create("tripplet")
    with pytest.raises(UnknownNameError, match="did you mean 'margin'"):
        create("rll", margn=0.4)


def test_options_are_the_documented_defaults() -> None:
    assert options("rll") == {
        "alpha": 1.2,
        "margin": 0.4,
        "temperature": 10,
        "balance": 1.0,
        "combine": "sum",
        "gradient": "query",
    }
    assert options("proxy-anchor") == {"alpha": 32, "margin": 0.1}
    assert options("multi-similarity") == {"alpha": 2, "beta": 50, "base": 0.5, "epsilon": 0.1}
    assert options("softmax") == {"temperature": 0.05}


def test_importing_the_package_imports_no_single_loss() -> None:
    code = (
        "import sys, embedkit.losses; "
        "print([m for m in sys.modules if m.startswith('embedkit.losses.') and '._' not in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
