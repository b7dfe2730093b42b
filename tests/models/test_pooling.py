"""Poolings against the same sums written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embedkit.errors import UnknownNameError
from embedkit.models.pooling import (
    GemPooling,
    SecondOrderPooling,
    create_pooling,
    pooling_names,
)


def gem_loop(channel: list[float], p: float, epsilon: float = 1e-6) -> float:
    return float((sum(max(v, epsilon) ** p for v in channel) / len(channel)) ** (1 / p))


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 10.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_gem_is_the_generalised_mean_written_as_a_loop(p: float, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    feature_map = torch.randn(2, 4, *size, dtype=torch.float64) * 3
    got = GemPooling(4, p=p).double()(feature_map)
    for b in range(2):
        for c in range(4):
            wanted = gem_loop(feature_map[b, c].flatten().tolist(), p)
            assert got[b, c].item() == pytest.approx(wanted, rel=1e-9)


def test_gem_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    pool = GemPooling(3).double()
    feature_map = (torch.rand(2, 3, 2, 3, dtype=torch.float64) + 0.1).requires_grad_()
    torch.autograd.gradcheck(pool, (feature_map,))
    value = pool(feature_map).sum()
    (slope,) = torch.autograd.grad(value, pool.p)
    step = 1e-6
    with torch.no_grad():
        pool.p.add_(step)
        raised = pool(feature_map).sum()
    assert slope.item() == pytest.approx(((raised - value) / step).item(), rel=1e-4)


@pytest.mark.parametrize("p", [-4.0, 0.0, 3.0, 50.0])
@pytest.mark.parametrize("fill", [-3.0, 0.0, 1e-30, 1e4, 6e4])
def test_gem_stays_finite_on_dead_flat_and_huge_maps(p: float, fill: float) -> None:
    feature_map = torch.full((1, 2, 3, 3), fill, requires_grad=True)
    pool = GemPooling(2, p=p)
    pooled = pool(feature_map)
    pooled.sum().backward()
    assert pooled.detach().numpy() == pytest.approx(max(fill, 1e-6), rel=1e-5)
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()
    assert pool.p.grad is not None
    assert pool.p.grad.isfinite().all()


def test_the_arithmetic_of_gem_fits_into_float16() -> None:
    """The steps of the exported graph, each rounded to float16: nothing overflows or vanishes."""
    x = np.array([[60000.0, 3.0], [0.01, 40000.0]], dtype=np.float16)
    scale = x.max()
    mean = ((x / scale) ** np.float16(3)).mean(dtype=np.float16)
    got = mean ** np.float16(1 / 3) * scale
    assert float(got) == pytest.approx(gem_loop(x.astype(float).ravel().tolist(), 3), rel=5e-3)


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_second_order_is_the_normalised_upper_triangle_in_numpy(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    pool = SecondOrderPooling(6, reduced=4).double()
    feature_map = torch.randn(3, 6, *size, dtype=torch.float64)
    weight = pool.reduce.weight.detach().numpy()[:, :, 0, 0]
    for row, picture in zip(pool(feature_map).detach().numpy(), feature_map.numpy(), strict=True):
        reduced = weight @ picture.reshape(6, -1)
        moments = reduced @ reduced.T / reduced.shape[1]
        upper = [moments[i, j] for i in range(4) for j in range(i, 4)]
        rooted = np.sign(upper) * np.sqrt(np.abs(upper))
        assert row == pytest.approx(rooted / np.linalg.norm(rooted), abs=1e-3)


def test_second_order_of_an_empty_map_is_zero_with_a_finite_gradient() -> None:
    feature_map = torch.zeros(2, 8, 3, 3, requires_grad=True)
    pooled = SecondOrderPooling(8)(feature_map)
    pooled.sum().backward()
    assert not pooled.any()
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()


@pytest.mark.parametrize("name", pooling_names())
def test_autocast_leaves_the_sums_in_float32(name: str) -> None:
    torch.manual_seed(0)
    pool = create_pooling(name, 16)
    feature_map = torch.rand(2, 16, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool(feature_map.bfloat16())
    assert pooled.dtype == torch.float32
    assert pooled.shape == (2, pool.num_features)
    assert pooled.detach() == pytest.approx(pool(feature_map).detach(), abs=0.02)


def test_an_unknown_pooling_gets_the_nearest_real_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gem'"):
        create_pooling("gems", 8)
