"""The reference against loops, its backward against autograd, Philox against its authors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from contract_cases import checked, over
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swin_kernels.backends import reference
from swin_kernels.backends.reference.dropout import philox_first_word
from swin_kernels.position_bias import relative_position_index
from swin_kernels.testing import Case, differentiate, make_grad_out, with_grad

PLANE = Case(
    2, (5, 4), (3, 2), (1, 1), 2, 4, dtype=torch.float64, bias="table", pads=True, value_dim=3
)
LINE = PLANE.but(size=(7,), window=(4,), shift=(1,))
SPACE = PLANE.but(size=(3, 2, 4), window=(2, 2, 3), shift=(1, 0, 2), heads=1)
CASES = (
    PLANE,
    PLANE.but(shift=(0, 0)),
    PLANE.but(pad_order="roll-pad"),
    PLANE.but(pad_order="roll-pad", packed=True, value_dim=None, pads=False),
    PLANE.but(bias="none", pads=False, scale=0.7),
    PLANE.but(bias="dense", mask="soft", mask_value=-1.5),
    PLANE.but(bias="table+index", mask="holes", mask_value=-math.inf),
    PLANE.but(mask="dead", shift=(0, 1)),
    PLANE.but(cosine=True),
    PLANE.but(cosine=True, packed=True, value_dim=None, pad_order="roll-pad", mask="soft"),
    PLANE.but(periodic=(True, False), mask_value=-3.0),
    PLANE.but(size=(2, 1), pad_order="roll-pad"),
    PLANE.but(dropout_p=0.4),
    PLANE.but(dropout_p=0.4, cosine=True, bias="dense", mask="dead"),
    LINE,
    LINE.but(pad_order="roll-pad", mask_value=-2.0),
    SPACE,
    SPACE.but(cosine=True, pad_order="roll-pad", mask_value=-2.0, periodic=(True, False, False)),
)


def _philox(counter, seed):
    """One block of Philox4x32-10 in Python integers, its first word."""
    low, c, k = 0xFFFFFFFF, list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0]


def _attend_by_loops(case, operands):
    """The contract, one number at a time."""
    q, k, v = (x.tolist() for x in operands.unpacked())
    grid, axes = case.grid, range(len(case.size))  # held to torch's own in test_geometry.py
    index = operands.bias_index
    if index is None:  # held to loops in test_position_bias.py
        index = relative_position_index(case.window)
    out = torch.full((case.batch, *case.size, case.heads, case.dv), torch.nan).double()

    def fetch(x, image, place, head, filler, width):
        if None in place:
            return [0.0] * width if filler is None else filler[head].tolist()
        for step in (image, *place, head):
            x = x[step]
        return x

    def unit(x):
        norm = max(math.sqrt(sum(a * a for a in x)), 1e-12)
        return [a / norm for a in x]

    def bias(head, i, j):
        total = 0.0 if operands.bias is None else float(operands.bias[head, i, j])
        if operands.bias_table is not None:
            total += float(operands.bias_table[index[i, j], head])
        return total

    inner = list(itertools.product(*map(range, case.window)))
    for image in range(case.batch):
        for number, corner in enumerate(itertools.product(*map(range, grid.counts))):
            rolled = [[corner[a] * case.window[a] + step[a] for a in axes] for step in inner]
            places = [[grid.source(a, r[a]) for a in axes] for r in rolled]
            regions = [[grid.region(a, r[a]) for a in axes] for r in rolled]
            for head, i in itertools.product(range(case.heads), range(grid.tokens)):
                if None in places[i]:
                    continue
                query = fetch(q, image, places[i], head, None, case.head_dim)
                logits = []
                for j in range(grid.tokens):
                    key = fetch(k, image, places[j], head, operands.pad_key, case.head_dim)
                    if operands.logit_scale is None:
                        scale = case.head_dim**-0.5 if case.scale is None else case.scale
                        logit = scale * sum(a * b for a, b in zip(query, key))
                    else:
                        cosine = sum(a * b for a, b in zip(unit(query), unit(key)))
                        logit = cosine * float(operands.logit_scale[head])
                    logit += bias(head, i, j)
                    if regions[i] != regions[j]:
                        logit += case.mask_value
                    if operands.mask is not None:
                        logit += float(operands.mask[number, i, j])
                    logits.append(logit)
                top = max(logits)
                weights = [0.0 if top == -math.inf else math.exp(x - top) for x in logits]
                total = sum(weights) or 1.0
                row = [0.0] * case.dv
                for j in range(grid.tokens):
                    weight = weights[j] / total
                    if case.dropout_p > 0:
                        window = image * grid.windows + number
                        counter = (i * grid.tokens + j, head, window & 0xFFFFFFFF, window >> 32)
                        word = _philox(counter, int(operands.dropout_seed))
                        kept = word >= int(case.dropout_p * 2**32)
                        weight = weight / (1 - case.dropout_p) if kept else 0.0
                    value = fetch(v, image, places[j], head, operands.pad_value, case.dv)
                    row = [r + weight * x for r, x in zip(row, value)]
                out[(image, *places[i], head)] = torch.tensor(row, dtype=torch.float64)
    return out


@over(*CASES)
def test_forward_equals_loops_over_tokens(case):
    operands, options = checked(case)
    actual = reference.forward(operands, options)
    expected = _attend_by_loops(case, operands)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def _assert_backward_equals_autograd(case, operands, options, rtol, atol):
    grad_out = make_grad_out(case)
    expected = differentiate(lambda x: reference.forward(x, options), operands, grad_out).grads
    actual = reference.backward(grad_out, operands, options)._asdict()
    assert expected.keys() == {name for name, grad in actual.items() if grad is not None}
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=rtol, atol=atol, msg=name)


@over(*CASES)
def test_written_backward_equals_autograd(case):
    _assert_backward_equals_autograd(case, *checked(case), rtol=1e-11, atol=1e-12)


def test_written_backward_equals_autograd_below_the_norm_clamp():
    case = PLANE.but(cosine=True)
    operands, options = checked(case)
    for x in (operands.query, operands.key, operands.pad_key):
        x[0] = 0
        x[1] *= 1e-13
    _assert_backward_equals_autograd(case, operands, options, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_take_the_dtype_of_their_operands(dtype):
    case = PLANE.but(dtype=dtype, extras_dtype=torch.float32, cosine=True)
    operands, options = checked(case)
    grads = reference.backward(make_grad_out(case), operands, options)
    for x, grad in zip(operands, grads):
        assert (x is None) == (grad is None)
        if x is not None:
            assert (grad.dtype, grad.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            0xD16CFE09,
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, word):
    seed = key[1] << 32 | key[0]
    signed = seed - 2**64 if seed >= 2**63 else seed
    counters = [torch.tensor(c) for c in counter]
    assert int(philox_first_word(*counters, torch.tensor(signed))) == word
    assert _philox(counter, seed) == word


class _NoFloat64(TorchDispatchMode):
    """As on a device that has none, such as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            assert getattr(x, "dtype", None) != torch.float64, f"{func} makes float64"
        return out


@over(*CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_float64_is_made_only_where_asked(case, dtype):
    case = case.but(dtype=dtype)
    (operands, options), grad_out = checked(case), make_grad_out(case)
    with _NoFloat64():
        reference.backward(grad_out, operands, options)
        out = reference.forward(with_grad(operands), options)
        out.backward(grad_out)
    with pytest.raises(AssertionError, match="makes float64"), _NoFloat64():
        torch.zeros(1).double()
