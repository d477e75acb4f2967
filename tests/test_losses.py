"""The divergences against a slow float64 oracle, their edges, and the chunked sum against the dense one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctxdistill import losses
from ctxdistill.losses import (
    LOSSES,
    _kl,
    chunked,
    cross_entropy,
    divergence,
    entropy,
    log_softmax,
    terms,
    topk_divergence,
)

KINDS = sorted(LOSSES)
EPS = float(torch.finfo(torch.float32).eps)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(row: Tensor, temperature: float) -> np.ndarray:
    x = row.double().numpy() / temperature
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return sum(x * (math.log(x) - math.log(y)) if y > 0 else math.inf for x, y in zip(a, b, strict=True) if x > 0)


def oracle(kind: str, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> float:
    """One position, token by token."""
    p, q = distribution(teacher, temperature), distribution(student, temperature)
    m = (p + q) / 2
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]
    return value * temperature**2


def tolerance(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> float:
    """Each log-probability is off by a few roundings of the largest logit; the divergence is a mean of such terms."""
    largest = max(teacher[teacher.isfinite()].abs().max().item(), student[student.isfinite()].abs().max().item())
    return 8 * EPS * (largest / temperature + math.log(teacher.shape[-1]) + 1) * temperature**2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("size", [2, 17, 1000])
def test_equals_oracle(kind: str, temperature: float, size: int) -> None:
    teacher, student = logits(5, size, seed=1), logits(5, size, seed=2)
    got = divergence(kind, teacher, student, temperature)
    want = torch.tensor([oracle(kind, t, s, temperature) for t, s in zip(teacher, student, strict=True)])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=tolerance(teacher, student, temperature))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_give_exactly_zero_at_150_000_tokens(kind: str, temperature: float, dtype: torch.dtype) -> None:
    x = logits(2, 150_000, scale=5.0).to(dtype).requires_grad_()
    value = divergence(kind, x.detach(), x, temperature)
    assert value.tolist() == [0.0, 0.0]
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 16 * EPS  # p times the rounding of sum(p)


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_sign_and_gradient(kind: str) -> None:
    teacher = logits(4, 5000)
    student = (teacher + 1e-3 * logits(4, 5000, seed=3)).requires_grad_()
    value = divergence(kind, teacher, student)
    assert (value > 0).all()
    value.sum().backward()
    assert student.grad is not None
    assert (student.grad != 0).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_not_negative_up_to_rounding(kind: str, seed: int) -> None:
    teacher = logits(16, 50, seed=seed)
    student = teacher + 1e-4 * logits(16, 50, seed=seed + 100)
    assert divergence(kind, teacher, student).min() > -tolerance(teacher, student)


def test_direction() -> None:
    # The teacher has two modes, the student only one of them: forward KL punishes the missing mode, reverse hardly.
    teacher = torch.tensor([[10.0, 10.0, 0.0]])
    student = torch.tensor([[10.0, 0.0, 0.0]])
    forward, reverse, jsd = (divergence(kind, teacher, student).item() for kind in ("forward_kl", "reverse_kl", "jsd"))
    assert forward == pytest.approx(0.5 * 10 - math.log(2), abs=1e-3)
    assert reverse == pytest.approx(math.log(2), abs=1e-2)
    assert divergence("reverse_kl", student, teacher).item() == pytest.approx(forward)
    assert divergence("jsd", student, teacher).item() == pytest.approx(jsd)


def test_jsd_of_disjoint_distributions_is_log_two() -> None:
    value = divergence("jsd", torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))
    assert value.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(kind: str, temperature: float) -> None:
    teacher, student = (logits(3, 6, seed=s).double().requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(lambda t, s: divergence(kind, t, s, temperature), (teacher, student))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_topk(kind: str) -> None:
    log_p = logits(3, 6, seed=1).double().log_softmax(-1)
    values, ids = log_p.topk(2)
    student = logits(3, 6, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: topk_divergence(kind, values, ids, s), (student,))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_computed_in_fp32(kind: str) -> None:
    teacher, student = logits(4, 300, seed=1).bfloat16(), logits(4, 300, seed=2).bfloat16()
    got = divergence(kind, teacher, student)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, divergence(kind, teacher.float(), student.float()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_tokens_that_both_sides_mask_contribute_nothing(kind: str, temperature: float) -> None:
    teacher, student = logits(4, 20, seed=1), logits(4, 20, seed=2)
    masked = [torch.cat([x, torch.full((4, 5), -math.inf)], -1).requires_grad_() for x in (teacher, student)]
    value = divergence(kind, *masked, temperature)
    torch.testing.assert_close(value, divergence(kind, teacher, student, temperature), rtol=1e-5, atol=1e-6)
    value.sum().backward()
    for x in masked:
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[:, 20:] == 0).all()


@pytest.mark.parametrize(("kind", "finite"), [("forward_kl", True), ("jsd", True), ("reverse_kl", False)])
def test_tokens_that_only_the_teacher_masks(kind: str, finite: bool) -> None:
    teacher, student = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    value = divergence(kind, teacher, student)
    assert value.isfinite().item() is finite
    if not finite:
        assert value.item() == math.inf
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if finite:
        assert value.item() == pytest.approx(oracle(kind, teacher[0], student[0].detach()), rel=1e-5)
        assert student.grad[0, 2] > 0  # less mass there would bring them closer


@pytest.mark.parametrize("kind", KINDS)
def test_low_temperature_has_finite_gradients(kind: str) -> None:
    teacher, student = logits(4, 50, seed=1, scale=30), logits(4, 50, seed=2, scale=30).requires_grad_()
    divergence(kind, teacher, student, 1e-3).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind: str) -> None:
    broken = torch.tensor([[1.0, math.nan, 2.0]])
    fine = torch.tensor([[1.0, 2.0, 3.0]])
    assert divergence(kind, fine, broken).isnan().all()
    assert divergence(kind, broken, fine).isnan().all()


def test_shapes() -> None:
    assert divergence("jsd", logits(2, 3, 7), logits(2, 3, 7, seed=1)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(1, 7\)"):
        divergence("jsd", logits(2, 7), logits(1, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_formulas_are_named(kind: str) -> None:
    assert LOSSES[kind].name == kind
    assert "teacher" in LOSSES[kind].formula
    p, q = logits(3, 5).log_softmax(-1), logits(3, 5, seed=1).log_softmax(-1)
    torch.testing.assert_close(LOSSES[kind].function(p, q), divergence(kind, p, q), rtol=1e-5, atol=1e-6)


# -- top-k ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [0, 1])
def test_topk_of_all_tokens_equals_the_full_divergence(kind: str, missing: int) -> None:
    teacher, student = logits(6, 30, seed=1, scale=1.0), logits(6, 30, seed=2, scale=1.0)
    values, ids = teacher.log_softmax(-1).topk(30 - missing)
    full = divergence(kind, teacher, student)
    torch.testing.assert_close(topk_divergence(kind, values, ids, student), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 29])
def test_topk_equals_oracle_over_buckets(kind: str, k: int) -> None:
    teacher, student = logits(4, 30, seed=1), logits(4, 30, seed=2)
    values, ids = teacher.log_softmax(-1).topk(k)
    got = topk_divergence(kind, values, ids, student)
    for row in range(4):
        p, q = distribution(teacher[row], 1.0), distribution(student[row], 1.0)
        kept = ids[row].numpy()
        rest = np.setdiff1d(np.arange(30), kept)
        buckets = [torch.from_numpy(np.log([*x[kept], x[rest].sum()])) for x in (p, q)]
        assert got[row].item() == pytest.approx(oracle(kind, *buckets), rel=2e-4, abs=2e-6)
        assert got[row] <= divergence(kind, teacher[row], student[row]) + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_equal_sides_is_zero_up_to_rounding(kind: str) -> None:
    x = logits(8, 2000, scale=4.0)
    values, ids = x.log_softmax(-1).topk(64)
    assert topk_divergence(kind, values, ids, x).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_topk_counts_mass_in_the_tail(kind: str) -> None:
    teacher = torch.tensor([[5.0, 1.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[5.0, 1.0, 9.0, 9.0, 9.0]], requires_grad=True)
    values, ids = teacher.log_softmax(-1).topk(2)
    value = topk_divergence(kind, values, ids, student)
    assert value.item() > 0.3
    value.backward()
    assert student.grad is not None
    assert (student.grad[0, 2:] > 0).all()  # the student's tail is pushed down


@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_finite_where_the_tail_is_below_fp32(kind: str) -> None:
    teacher = torch.tensor([[60.0, 0.0, 0.0, 0.0], [9.0, 8.0, -math.inf, -math.inf]])
    for other in ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 90.0, 0.0], [60.0, 0.0, 0.0, 0.0]):
        student = torch.tensor([other, other], requires_grad=True)
        values, ids = teacher.log_softmax(-1).topk(2)
        value = topk_divergence(kind, values, ids, student)
        value.sum().backward()
        assert student.grad is not None
        assert value.isfinite().all()
        assert student.grad.isfinite().all()
        assert other[2] < 90 or (value > 0.6).all()  # all of the student is in a tail that the teacher does not have


def test_topk_gradient_reaches_a_student_tail_that_rounds_to_nothing() -> None:
    # The teacher has half of its mass in the tail, the student 1e-11: 1 - sum(kept) would be 0 there.
    teacher = torch.tensor([[1.0, 1.0]])
    student = torch.tensor([[25.0, 0.0]], requires_grad=True)
    values, ids = teacher.log_softmax(-1).topk(1)
    topk_divergence("forward_kl", values, torch.zeros_like(ids), student).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5]]))


def test_topk_with_masked_vocabulary_on_both_sides() -> None:
    mask = torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf])
    teacher, student = logits(3, 5, seed=1) + mask, (logits(3, 5, seed=2) + mask).requires_grad_()
    for k in (2, 3, 4, 5):
        values, ids = teacher.log_softmax(-1).topk(k)
        for kind in KINDS:
            value = topk_divergence(kind, values, ids, student)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


def test_topk_refuses_a_temperature() -> None:
    values, ids = logits(2, 9).log_softmax(-1).topk(3)
    with pytest.raises(ValueError, match=r"temperature 1 only, found 2\.0.*tail"):
        topk_divergence("forward_kl", values, ids, logits(2, 9), temperature=2.0)


# -- cross-entropy, entropy -------------------------------------------------------------------------------------------


def test_cross_entropy_is_forward_kl_to_a_point_mass() -> None:
    student, ids = logits(5, 40), torch.tensor([3, 1, 4, 1, 5])
    point = torch.full((5, 40), -math.inf)
    point[torch.arange(5), ids] = 0.0
    found = cross_entropy(log_softmax(student), ids)
    torch.testing.assert_close(found, divergence("forward_kl", point, student))
    want = [-math.log(distribution(row, 1.0)[i]) for row, i in zip(student, ids, strict=True)]
    assert found.tolist() == pytest.approx(want, rel=1e-5)


def test_entropy() -> None:
    def of(logits: Tensor) -> Tensor:
        return entropy(log_softmax(logits))

    assert of(torch.zeros(2, 3, 8)).tolist() == [[pytest.approx(math.log(8))] * 3] * 2
    assert of(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(math.log(2))
    assert of(torch.tensor([500.0, 0.0])).item() == 0
    assert of(torch.tensor([0.0, math.nan])).isnan()
    p = distribution(logits(50), 1.0)
    assert of(logits(50)).item() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert of(logits(3, 50).bfloat16()).dtype == torch.float32


# -- all that a step of training asks for -----------------------------------------------------------------------------


def plain(kind: str, teacher: Tensor, student: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """`terms`, from their parts."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return divergence(kind, teacher, student, temperature), cross_entropy(log_q, ids), entropy(log_p), entropy(log_q)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_is_its_parts_in_value_and_gradient(kind: str, temperature: float) -> None:
    teacher, start = logits(6, 300, seed=1), logits(6, 300, seed=2)
    if kind == "forward_kl":
        teacher[1, :7] = -math.inf  # only the teacher excludes these
    teacher[2, 5:9] = start[2, 5:9] = -math.inf  # both
    ids = torch.tensor([0, 9, 9, 299, 4, 4])
    found = []
    for function in (terms, plain):
        student = start.clone().requires_grad_()
        values = tuple(function(kind, log_softmax(teacher), student, ids, temperature))
        assert [v.requires_grad for v in values] == [True, True, False, False]
        (gradient,) = torch.autograd.grad(
            values[0] @ torch.linspace(-1, 2, 6) + values[1] @ torch.linspace(1, -3, 6), student
        )
        found.append([v.detach() for v in values] + [gradient])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_terms_of_some_positions_at_a_time_are_those_of_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, start, ids = logits(6, 300, seed=1), logits(6, 300, seed=2), torch.tensor([0, 9, 9, 299, 4, 4])
    seen, found = list[int](), []
    expectation = losses._expectation

    def counted(p: Tensor, x: Tensor) -> Tensor:
        seen.append(len(p))
        return expectation(p, x)

    monkeypatch.setattr(losses, "_expectation", counted)
    for at_once in (rows * 300 + 299, losses.CACHED):
        monkeypatch.setattr(losses, "CACHED", at_once)
        student = start.clone().requires_grad_()
        values = terms("forward_kl", teacher.clone(), student, ids)
        (gradient,) = torch.autograd.grad(values[0] @ torch.linspace(-1, 2, 6) + values[1].sum(), student)
        found.append([*(v.detach() for v in values), gradient])
    assert max(seen[: len(seen) - 3]) == rows and seen[-3:] == [6] * 3
    for some, whole in zip(*found, strict=True):
        assert torch.equal(some, whole)


def test_terms_of_no_position() -> None:
    student = torch.zeros(0, 9, requires_grad=True)
    found = terms("forward_kl", torch.zeros(0, 9), student, torch.zeros(0, dtype=torch.int64))
    assert [len(v) for v in found] == [0] * 4
    assert torch.autograd.grad(found.divergence.sum(), student)[0].shape == (0, 9)


@pytest.mark.parametrize("part", [0, 1])
def test_terms_gradcheck(part: int) -> None:
    teacher, student = logits(3, 9, seed=1).double(), logits(3, 9, seed=2).double().requires_grad_()
    ids = torch.tensor([2, 0, 8])
    assert torch.autograd.gradcheck(lambda s: terms("forward_kl", log_softmax(teacher), s, ids)[part], (student,))


def test_terms_of_equal_sides_is_exactly_zero() -> None:
    same = logits(4, 150_000, seed=1)
    found = terms("forward_kl", same.clone(), same, torch.zeros(4, dtype=torch.int64))
    assert found.divergence.tolist() == [0.0] * 4
    assert torch.equal(found.teacher_entropy, found.student_entropy)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_without_a_log_have_no_entropies(kind: str) -> None:
    teacher, student, ids = logits(3, 50, seed=1), logits(3, 50, seed=2).requires_grad_(), torch.tensor([1, 2, 3])
    bare, full = (
        terms(kind, log_softmax(teacher), student, ids, log=False),
        terms(kind, log_softmax(teacher), student, ids),
    )
    assert bare.teacher_entropy is None and bare.student_entropy is None
    assert torch.equal(bare.divergence, full.divergence) and torch.equal(bare.cross_entropy, full.cross_entropy)
    (gradient,) = torch.autograd.grad(bare.divergence.sum(), student)
    assert torch.equal(gradient, torch.autograd.grad(full.divergence.sum(), student)[0])


def test_terms_hides_no_nan_and_no_infinity() -> None:
    teacher, student = logits(4, 9, seed=1), logits(4, 9, seed=2)
    teacher[0, 3], student[1, 3], student[2, 3] = math.nan, math.nan, -math.inf
    found = terms("forward_kl", log_softmax(teacher), student, torch.tensor([1, 1, 3, 3]))
    assert found.divergence.isnan().tolist() == [True, True, False, False]
    assert found.divergence.isinf().tolist() == [False, False, True, False]
    assert found.cross_entropy.isinf().tolist() == [False, False, True, False]
    assert found.teacher_entropy.isnan().tolist() == [True, False, False, False]
    assert found.student_entropy.isnan().tolist() == [False, True, False, False]


def test_terms_of_half_precision_is_computed_in_fp32() -> None:
    teacher, student = logits(3, 50, seed=1).bfloat16(), logits(3, 50, seed=2).bfloat16().requires_grad_()
    found = terms("forward_kl", log_softmax(teacher), student, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(found.divergence, divergence("forward_kl", teacher.float(), student.float()))
    found.divergence.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


def test_forward_kl_is_the_plain_one_in_value_and_gradient() -> None:
    teacher, start = logits(6, 300, seed=1), logits(6, 300, seed=2)
    teacher[1, :7] = -math.inf  # only the teacher excludes these
    teacher[2, 5:9] = start[2, 5:9] = -math.inf  # both
    upstream = torch.linspace(-1, 2, 6)
    found = []
    for function in (LOSSES["forward_kl"].function, _kl):
        student = start.clone().requires_grad_()
        value = function(log_softmax(teacher), log_softmax(student))
        (gradient,) = torch.autograd.grad(value @ upstream, student)
        found.append((value.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "function", [divergence, lambda kind, a, b: terms(kind, log_softmax(a), b, torch.tensor([0])).divergence]
)
def test_forward_kl_of_a_token_that_the_teacher_rounds_to_nothing(function: Any) -> None:
    teacher, student = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -math.inf]])
    assert function("forward_kl", teacher, student).tolist() == [0.0]


def test_forward_kl_has_a_gradient_for_the_teacher_where_one_is_wanted() -> None:
    teacher, student = logits(3, 9, seed=1).double().requires_grad_(), logits(3, 9, seed=2).double()
    assert torch.autograd.gradcheck(lambda t: divergence("forward_kl", t, student), (teacher,))


# -- chunks -----------------------------------------------------------------------------------------------------------

P, D, V = 23, 8, 50


def job(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return logits(P, D, seed=1, scale=1.0), logits(D, V, seed=2, scale=1.0), logits(P, V, seed=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [*range(1, P + 2), 1000])
def test_chunked_equals_dense_in_loss_and_gradient(kind: str, chunk: int) -> None:
    start, head, teacher = job(kind)
    hidden, dense = start.clone().requires_grad_(), start.clone().requires_grad_()
    seen: list[int] = []

    def fn(part: Tensor, where: slice) -> Tensor:
        seen.append(len(part))
        return divergence(kind, teacher[where], part @ head)

    total, values = chunked(fn, hidden, chunk=chunk)
    want = divergence(kind, teacher, dense @ head)
    (total * 0.25).backward()  # an upstream gradient other than 1
    (want.sum() * 0.25).backward()
    assert total.shape == ()
    torch.testing.assert_close(values, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, dense.grad, rtol=1e-5, atol=1e-6)
    assert max(seen) <= chunk
    assert sum(seen) == P
    assert max(seen) - min(seen) <= 1  # no small last one
    assert len(seen) == -(-P // chunk)


def test_chunked_gradcheck() -> None:
    start, head, teacher = (x.double() for x in (logits(7, 4, seed=1), logits(4, 9, seed=2, scale=1.0), logits(7, 9)))

    def fn(part: Tensor, where: slice) -> Tensor:
        return divergence("jsd", teacher[where], part @ head)

    assert torch.autograd.gradcheck(lambda h: chunked(fn, h, chunk=5)[0], (start.requires_grad_(),))


def test_chunked_holds_the_logits_of_one_chunk_only() -> None:
    start, head, teacher = job("forward_kl")
    alive: set[int] = set()
    most = 0

    class Count:
        """Lives exactly as long as the graph of its chunk."""

        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    class Logits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, part: Tensor) -> Tensor:
            ctx.count = Count()  # type: ignore[attr-defined]
            return part @ head

        @staticmethod
        def backward(ctx: object, upstream: Tensor) -> Tensor:
            return upstream @ head.T

    def fn(part: Tensor, where: slice) -> Tensor:
        nonlocal most
        value = divergence("forward_kl", teacher[where], Logits.apply(part))
        most = max(most, len(alive))
        return value

    total, _ = chunked(fn, start.requires_grad_(), chunk=4)
    assert most == 1
    assert not alive  # before the backward pass, too
    total.backward()
    assert start.grad is not None


def test_chunked_passes_the_gradient_on_and_keeps_values_out_of_it() -> None:
    start, head, teacher = job("forward_kl")
    weight = torch.eye(D, requires_grad=True)
    dense = torch.eye(D, requires_grad=True)

    def fn(part: Tensor, where: slice) -> Tensor:
        return divergence("forward_kl", teacher[where], part @ head)

    total, values = chunked(fn, start @ weight, chunk=7)
    assert not values.requires_grad
    total.backward()
    fn(start @ dense, slice(0, P)).sum().backward()
    torch.testing.assert_close(weight.grad, dense.grad, rtol=1e-4, atol=1e-5)  # sums over 23 positions


@pytest.mark.parametrize("needed", [True, False])
def test_chunked_without_gradient_computes_values_only(needed: bool) -> None:
    start, head, teacher = job("forward_kl")
    start.requires_grad_(needed)

    def fn(part: Tensor, where: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        return divergence("forward_kl", teacher[where], part @ head)

    with torch.set_grad_enabled(not needed):
        total, values = chunked(fn, start, chunk=5)
    assert not total.requires_grad
    torch.testing.assert_close(total, divergence("forward_kl", teacher, start.detach() @ head).sum())
    assert values.shape == (P,)


def test_chunked_bf16_gradient_has_the_type_of_its_input() -> None:
    start, head, teacher = job("forward_kl")
    hidden = start.bfloat16().requires_grad_()

    def fn(part: Tensor, where: slice) -> Tensor:
        return divergence("forward_kl", teacher[where], part.float() @ head)

    total, _ = chunked(fn, hidden, chunk=6)
    (total / 3).backward()
    assert total.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_chunked_edges() -> None:
    def never(part: Tensor, where: slice) -> Tensor:
        raise AssertionError("no positions, no call")

    total, values = chunked(never, torch.zeros(0, D, requires_grad=True), chunk=4)
    assert (total.item(), values.shape) == (0.0, (0,))
    with pytest.raises(ValueError, match="chunk >= 1, found 0"):
        chunked(never, torch.zeros(3, D), chunk=0)
