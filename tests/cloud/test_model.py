"""The decoder of training: packing, exits, and the pieces against other implementations."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from torch.nn import functional  # noqa: E402

from nearfar import lower_numpy  # noqa: E402
from nearfar.gguf_reader import TensorType  # noqa: E402
from nearfar.quant import dequantize, quantize  # noqa: E402
from nearfar_cloud.training.losses import CHUNK, IGNORED, head_loss, plain_head_loss  # noqa: E402
from nearfar_cloud.training.model import (  # noqa: E402
    Decoder,
    attention,
    fake_q8_0,
    rotate,
    rotation,
    visible,
)
from tests.cloud.toy_batches import TINY  # noqa: E402

MAX_SUM_ORDER_ERROR = 2e-5  # the same sums in another order, f32
MAX_GRADIENT_ERROR = 1e-5


def tiny(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(TINY)


def run(model: Decoder, ids: list[int], pos: list[int], doc: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    batch = [torch.tensor([x]) for x in (ids, pos, doc)]
    with torch.no_grad():
        return model(*batch, model.head(q8_embedding=False))


def test_packed_rows_equal_rows_alone() -> None:
    model = tiny()
    a, b = [5, 9, 33, 2, 60], [7, 7, 1]
    packed, _ = run(model, a + b, [*range(5), *range(3)], [0] * 5 + [1] * 3)
    for row, place in ((a, slice(0, 5)), (b, slice(5, 8))):
        alone, _ = run(model, row, list(range(len(row))), [0] * len(row))
        assert torch.allclose(packed[:, place], alone, atol=MAX_SUM_ORDER_ERROR)


def test_a_row_does_not_see_what_comes_after_it() -> None:
    model = tiny()
    rows = [run(model, [5, 9, 33, last], [0, 1, 2, 3], [0] * 4)[0] for last in (1, 2)]
    assert torch.equal(rows[0][:, :3], rows[1][:, :3])
    assert not torch.equal(rows[0][:, 3], rows[1][:, 3])


def test_an_exit_gives_the_rows_of_a_model_that_ends_there() -> None:
    model = tiny()
    _, exits = run(model, [5, 9, 33], [0, 1, 2], [0] * 3)
    del model.blocks[2:]
    model.output_norm = model.exit_norms["2"]
    final, _ = run(model, [5, 9, 33], [0, 1, 2], [0] * 3)
    assert torch.equal(exits[2], final)


def test_attention_is_the_softmax_of_its_definition() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = visible(torch.tensor([[0] * 5 + [1] * 4, [0] * 9]))
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    scores = (q @ wide[0].mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ wide[1]
    assert torch.allclose(attention(q, k, v, mask), expected, atol=MAX_SUM_ORDER_ERROR)


def test_rotation_equals_the_numpy_specification() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 16)
    pos = torch.arange(6)[None]
    cos, sin = rotation(pos, 16, 10_000.0)
    expected = lower_numpy.rotate(x[0].transpose(0, 1).numpy(), cos[0, 0].numpy(), sin[0, 0].numpy(), "halves")
    assert np.allclose(rotate(x, cos, sin)[0].transpose(0, 1).numpy(), expected, atol=1e-6)


def test_fake_q8_0_gives_exactly_what_the_file_will_hold() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 64) * torch.logspace(-4, 1, 40)[:, None]
    x[3] = 0
    stored = dequantize(quantize(x.numpy(), TensorType.Q8_0), TensorType.Q8_0, (40, 64))
    # x + (rounded - x) may differ from rounded in the last bit of x.
    assert np.allclose(fake_q8_0(x).numpy(), stored, rtol=1e-6, atol=1e-9)


def test_fake_q8_0_passes_gradients_through() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    (fake_q8_0(x) * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 32), 3.0))


@pytest.mark.parametrize("kl", [0.0, 0.5, 1.0])
def test_the_chunked_head_loss_equals_the_plain_one_and_so_do_its_gradients(kl: float) -> None:
    torch.manual_seed(0)
    n, d, v = CHUNK + 37, 16, 50
    inputs = [torch.randn(n, d), torch.randn(n, d), torch.randn(v, d)]
    targets, weights = torch.randint(0, v, (n,)), torch.rand(n)
    values, grads = [], []
    for chunked in (True, False):
        f, e, h = (x.clone().requires_grad_() for x in inputs)
        if chunked:
            shaped = [x.unsqueeze(0) for x in (f, e)]
            rows = (targets.unsqueeze(0), weights.unsqueeze(0))
            loss = head_loss(*shaped, h, *rows, exit_weight=0.3, kl=kl)[0]
        else:
            loss = plain_head_loss(f, e, h, targets, weights, 0.3, kl)
        (loss / n).backward()
        values.append(loss.item())
        grads.append((f.grad, e.grad, h.grad))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for mine, expected in zip(*grads, strict=True):
        assert torch.allclose(mine, expected, atol=MAX_GRADIENT_ERROR)


@pytest.mark.parametrize("with_exit", [False, True])
@pytest.mark.parametrize("distill", [None, 0.0, 0.5, 1.0])
def test_a_head_loss_with_a_teacher_or_without_an_exit_has_the_gradients_of_the_plain_formula(
    distill: float | None, with_exit: bool
) -> None:
    torch.manual_seed(1)
    n, v = CHUNK + 5, 40
    inputs = [torch.randn(n, 16), torch.randn(v, 16), torch.randn(n, 16)]
    taught, table = torch.randn(n, 24), torch.randn(v, 24)  # the teacher is wider
    targets, weights = torch.randint(0, v, (n,)), torch.rand(n)
    f, h, e = (x.clone().requires_grad_() for x in inputs)
    teacher = {} if distill is None else {"teacher": (taught[None], table), "distill": distill}
    mine = head_loss(
        f[None], e[None] if with_exit else None, h, targets[None], weights[None], exit_weight=0.3, kl=0.4, **teacher
    )
    (mine[0] / n).backward()
    pf, ph, pe = (x.clone().requires_grad_() for x in inputs)
    logits = None if distill is None else taught @ table.mT
    plain = plain_head_loss(pf, pe if with_exit else None, ph, targets, weights, 0.3, 0.4, logits, distill or 0.0)
    (plain / n).backward()
    assert mine[0].item() == pytest.approx(plain.item(), rel=1e-5)
    each = functional.cross_entropy(f @ h.T, targets, reduction="none")
    assert mine[1].item() == pytest.approx((weights * each).sum().item(), rel=1e-5)
    assert torch.allclose(f.grad, pf.grad, atol=MAX_GRADIENT_ERROR)
    assert torch.allclose(h.grad, ph.grad, atol=MAX_GRADIENT_ERROR)
    if with_exit:
        assert torch.allclose(e.grad, pe.grad, atol=MAX_GRADIENT_ERROR)
    else:
        assert mine[2] == 0
        assert e.grad is None


def test_rows_without_target_or_weight_change_nothing() -> None:
    torch.manual_seed(0)
    f, e, h = torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(11, 8)
    targets = torch.tensor([[1, 2, IGNORED, 4, 5, IGNORED]])
    weights = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.5, 0.0]])
    keep = [0, 3, 4]
    some = head_loss(f[:, keep], e[:, keep], h, targets[:, keep], weights[:, keep], exit_weight=0.3)
    assert torch.allclose(head_loss(f, e, h, targets, weights, exit_weight=0.3), some)


def test_reported_losses_are_the_cross_entropies_of_both_heads() -> None:
    torch.manual_seed(0)
    f, e, h = torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(11, 8)
    targets, weights = torch.randint(0, 11, (1, 6)), torch.rand(1, 6)
    _, final, early = head_loss(f, e, h, targets, weights, exit_weight=0.3, kl=0.5)
    for rows, got in ((f, final), (e, early)):
        each = functional.cross_entropy((rows @ h.T)[0], targets[0], reduction="none")
        assert got.item() == pytest.approx((each * weights[0]).sum().item(), rel=1e-5)
