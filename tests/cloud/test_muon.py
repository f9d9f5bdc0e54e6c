"""Muon: updates have singular values near one, stacked matrices are apart, and a small problem is solved."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from nearfar_cloud.training.muon import ADAM_RMS, Muon, orthogonal  # noqa: E402


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8), (1, 1, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonal(x)
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3
    assert values.max() < 1.3
    # x = U S V^T and y = U S' V^T with S' > 0: U^T y V is diagonal and positive.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ y @ vh.mT
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_a_parameter_that_stacks_matrices_is_updated_like_the_matrices_alone() -> None:
    torch.manual_seed(1)
    rows = (8, 4, 4)
    weight, grad = torch.randn(16, 8), torch.randn(16, 8)
    stacked = torch.nn.Parameter(weight.clone())
    alone = [torch.nn.Parameter(part.clone()) for part in weight.split(rows)]
    one = Muon([{"params": [stacked], "rows": [rows]}], lr=0.1)
    many = Muon([{"params": alone, "rows": [(n,) for n in rows]}], lr=0.1)
    for _ in range(3):
        stacked.grad = grad.clone()
        for p, g in zip(alone, grad.split(rows), strict=True):
            p.grad = g.clone()
        one.step()
        many.step()
    assert torch.allclose(stacked, torch.cat(list(alone)), atol=1e-5)


def test_an_update_is_as_large_as_adamws_would_be() -> None:
    torch.manual_seed(2)
    p = torch.nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.randn(64, 64)
    Muon([{"params": [p], "rows": [(64,)]}], lr=1.0).step()
    assert float(p.detach().square().mean().sqrt()) == pytest.approx(ADAM_RMS, rel=0.2)


def test_least_squares_are_solved() -> None:
    torch.manual_seed(3)
    x, truth = torch.randn(256, 16), torch.randn(8, 16)
    w = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([{"params": [w], "rows": [(8,)]}], lr=0.3)
    for n in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - n / 200)
        w.grad = None
        loss = (x @ w.T - x @ truth.T).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-2
