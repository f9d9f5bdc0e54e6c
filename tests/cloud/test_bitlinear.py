"""The ternary product: integers multiplied, scales afterwards, gradients straight through."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from nearfar_cloud.training import bitlinear  # noqa: E402
from nearfar_cloud.training.bitlinear import BitLinear, quantize_rows, trits, weight_scale  # noqa: E402

# Both sum the same 256 products, in another order and with the scales inside or outside the sum.
MAX_F32_ERROR = 1e-5
# bf16 keeps 8 bits: the output is rounded once, by at most 2^-9 of its size.
MAX_BF16_ROUNDING = 2.0**-8


def layer_and_rows(seed: int = 0) -> tuple[BitLinear, torch.Tensor]:
    torch.manual_seed(seed)
    return BitLinear(256, {"a": 64, "b": 32}, 0.05), torch.randn(5, 7, 256)


def fake_quantised(layer: BitLinear, x: torch.Tensor) -> torch.Tensor:
    """The product written the usual way: both factors rounded in place, straight through, then one float product."""
    parts = []
    for w in layer.latent.split(layer.sizes):
        s = weight_scale(w)
        parts.append(w + (trits(w, s) * s - w).detach())
    q, step = quantize_rows(x)
    return (x + (q * step - x).detach()) @ torch.cat(parts).T


def test_integer_product_equals_the_fake_quantised_one() -> None:
    layer, x = layer_and_rows()
    y = torch.cat(layer(x, torch.float32), dim=-1)
    assert torch.allclose(y, fake_quantised(layer, x), atol=MAX_F32_ERROR, rtol=MAX_F32_ERROR)


def test_gradients_equal_those_of_autograd_through_the_fake_quantised_product() -> None:
    layer, x = layer_and_rows()
    x.requires_grad_()
    weights = torch.randn(96)
    (dx, dw), (dx_expected, _) = (
        torch.autograd.grad((y.square() * weights).sum(), (x, layer.latent))
        for y in (torch.cat(layer(x, torch.float32), dim=-1), fake_quantised(layer, x))
    )
    assert torch.allclose(dx, dx_expected, rtol=1e-4, atol=1e-4)
    # Weights: straight through both factors, so the rows that multiply the gradient are the rounded ones.
    q, step = quantize_rows(x)
    upstream = 2 * fake_quantised(layer, x) * weights
    expected = upstream.flatten(0, 1).T @ (q * step).flatten(0, 1)
    assert torch.allclose(dw, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_int8_product_is_the_float_one_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    layer, x = layer_and_rows()
    x.requires_grad_()
    found = []
    for has_int8 in (False, True):
        monkeypatch.setattr(bitlinear, "HAS_INT8", has_int8)
        y = torch.cat(layer(x, dtype), dim=-1)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.latent))))
    if dtype == torch.bfloat16:  # the float product is rounded to bf16 before its scales, the integer one after them
        assert torch.allclose(found[0][0].float(), found[1][0].float(), rtol=2 * MAX_BF16_ROUNDING, atol=1e-6)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_only_rounds_the_output() -> None:
    layer, x = layer_and_rows()
    exact, rounded = (torch.cat(layer(x, dtype), dim=-1).float() for dtype in (torch.float32, torch.bfloat16))
    assert ((exact - rounded).abs() <= MAX_BF16_ROUNDING * 2 * exact.abs() + 1e-7).all()


def test_each_matrix_has_a_scale_that_f16_holds_exactly() -> None:
    layer, _ = layer_and_rows()
    with torch.no_grad():
        layer.latent[:64] *= 3
    (a, scale_a), (b, scale_b) = layer.matrices().values()
    assert a.shape == (64, 256)
    assert b.shape == (32, 256)
    assert scale_a > 2 * scale_b
    for scale in (scale_a, scale_b):
        assert torch.tensor(scale).half().float().item() == scale
    assert set(a.unique().tolist()) == {-1, 0, 1}


def test_the_product_uses_exactly_the_matrices_that_are_exported() -> None:
    layer, x = layer_and_rows()
    q, step = quantize_rows(x)
    for y, (t, scale) in zip(layer(x, torch.float32), layer.matrices().values(), strict=True):
        assert torch.equal(y, (q @ t.float().T) * (step * scale))


def test_a_row_of_zeros_gives_zeros() -> None:
    layer, x = layer_and_rows()
    x[0, 0] = 0
    assert not layer(x, torch.float32)[0][0, 0].any()


def test_activations_become_whole_numbers_up_to_127() -> None:
    q, step = quantize_rows(torch.tensor([[1.0, -4.0, 0.1], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[32.0, -127.0, 3.0], [0.0, 0.0, 0.0]]
    assert step[0].item() == pytest.approx(4 / 127)
