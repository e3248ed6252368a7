"""What the interpreter of PTX computes is what a card does: compared with Python's numbers and with torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.alu import OPERATIONS
from ptx.values import bits_of, fused, viewed


def numbers(kind: str) -> np.ndarray:
    """Bits of random integers of a type, the extreme ones among them."""
    bits = int(kind[1:])
    generator = np.random.default_rng(bits)
    some = np.frombuffer(generator.bytes(bits // 8 * 400), f"uint{bits}")
    edges = [0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1]
    return np.concatenate([np.array(edges, some.dtype), some, np.arange(100, dtype=some.dtype)])


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": towards_zero,
    "rem": lambda a, b: a - b * towards_zero(a, b),
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "not": lambda a: ~a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, by: a << by if by < 64 else 0,
    "shr": lambda a, by: a >> by,
    "setp.eq": lambda a, b: a == b,
    "setp.ne": lambda a, b: a != b,
    "setp.lt": lambda a, b: a < b,
    "setp.le": lambda a, b: a <= b,
    "setp.gt": lambda a, b: a > b,
    "setp.ge": lambda a, b: a >= b,
    "bfe": lambda a, at, length: a >> (at & 255) & ((1 << (length & 255)) - 1),
    "prmt": lambda a, b, how: sum(
        (byte if not how >> 4 * i & 8 else 255 * (byte >> 7)) << 8 * i
        for i in range(4)
        for byte in [((b << 32 | a) >> 8 * (how >> 4 * i & 7)) & 255]
    ),
}


def integer_operations() -> list[str]:
    integer = lambda kind: kind[0] in "usb" and kind[1:].isdigit()  # noqa: E731
    return [
        name
        for name, operation in OPERATIONS.items()
        if name.rsplit(".", 1)[0] in INTEGERS and all(map(integer, operation.sources))
    ]


def test_every_operation_is_compared():
    compared = {*integer_operations(), *FLOATS, *CASTS}
    trivial = ("mov.", "selp.", "cvta.", "and.pred", "or.pred", "xor.pred", "not.pred")
    left = {n for n in OPERATIONS if not n.startswith(trivial)} - compared
    assert not left


@pytest.mark.parametrize("name", integer_operations())
def test_integers_are_those_of_python(name):
    operation = OPERATIONS[name]
    columns = [np.random.default_rng(i).permutation(numbers(k)) for i, k in enumerate(operation.sources)]
    columns[-1] = np.where(columns[-1] == 0, 3, columns[-1]).astype(columns[-1].dtype)  # a divisor
    with np.errstate(all="ignore"):
        operands = [viewed(c, k) for c, k in zip(columns, operation.sources, strict=True)]
        result = bits_of(operation.compute(*operands), operation.to)
    exact = INTEGERS[name.rsplit(".", 1)[0]]
    mask = 1 if operation.to == "pred" else 2 ** int(operation.to[1:]) - 1
    expected = [exact(*map(int, row)) & mask for row in zip(*operands, strict=True)]
    assert result.tolist() == expected


CASTS = [name for name in OPERATIONS if name.startswith("cvt.") and "f" not in name]


@pytest.mark.parametrize("name", CASTS)
def test_casts_extend_and_cut(name):
    _, to, source = name.split(".")
    given = viewed(numbers(source), source)
    result = viewed(bits_of(OPERATIONS[name].compute(given), to), to)
    wrap = 2 ** int(to[1:])
    expected = [int(v) % wrap for v in given]
    assert [int(v) % wrap for v in result] == expected


def rounded(exact: Fraction, kind: torch.dtype) -> float:
    """To nearest, ties to even: among a float and its neighbours."""
    if exact == 0:
        return 0.0
    near = torch.tensor(float(exact)).to(kind)
    infinite = torch.tensor(float("inf"), dtype=kind)
    around = [near, torch.nextafter(near, infinite), torch.nextafter(near, -infinite)]
    around = [x for x in around if x.isfinite()]
    even = lambda x: int(x.view(torch.int32)) & 1  # noqa: E731
    return min(around, key=lambda x: (abs(Fraction(x.item()) - exact), even(x))).item()


def test_a_fused_product_is_rounded_once():
    """Where the sum is a tie but for a bit far below, rounding in float64 first would lose that bit."""
    generator = np.random.default_rng(0)
    a = np.ldexp(1 + generator.integers(0, 2**23, 3000) / 2**23, generator.integers(-30, 30, 3000))
    b = np.ldexp(1 + generator.integers(0, 2**23, 3000) / 2**23, generator.integers(-30, 30, 3000))
    shift = generator.integers(-60, 60, 3000)
    c = np.ldexp((1 + generator.integers(0, 2**23, 3000) / 2**23) * generator.choice([-1, 1], 3000), shift)
    tie = 1 + 2.0**-23
    hard = np.array([[tie, 1 + 2.0**-22, 2.0**-80], [1 + 2.0**-12, 1 + 2.0**-12, 2.0**-70]])
    hard = np.concatenate(
        [hard, hard * [1, 1, -1], [[2.0**-75, 2.0**-75, 0], [3 * 2.0**-75, 2.0**-75, 1e-45]]]
    )
    a, b, c = (np.concatenate([x, hard[:, i]]).astype(np.float32) for i, x in enumerate((a, b, c)))
    result = fused(a, b, c)
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), torch.float32)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert result.tolist() == expected
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != result).any()  # the numbers are hard enough


def test_special_numbers_go_through_a_fused_product():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    a, b, c = (
        np.array(x, np.float32) for x in ([inf, inf, 1, 1e30, nan], [1, 0, inf, 1e30, 1], [1, 1, -inf, 1, 1])
    )
    with np.errstate(all="ignore"):
        result = fused(a, b, c)
    np.testing.assert_array_equal(result, np.array([inf, nan, nan, inf, nan], np.float32))


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    1e-45,
    -1e-40,
    3.4e38,
    65504.0,
    65519.9,
    65520.0,
    6e-8,
    2.9e-8,
    float("inf"),
    float("nan"),
]
FLOATS = {
    **{
        f"{name}.rn.{kind}": getattr(torch, name)
        for name in ("add", "sub", "mul")
        for kind in ("f32", "f64", "f32x2")
    },
    **{f"{name}.rn.f32.{low}": getattr(torch, name) for name in ("add", "sub") for low in ("bf16", "f16")},
    **{f"fma.rn.{kind}": None for kind in ("f32", "f32x2", "f32.bf16", "f32.f16")},  # the tests above
    **{f"cvt.f32.{low}": lambda a: a for low in ("bf16", "f16")},
    **{f"cvt.rn.{low}.f32": lambda a: a for low in ("bf16", "f16")},
    **{f"cvt.rn.{low}x2.f32": None for low in ("bf16", "f16")},  # the test below
    "cvt.rn.f32.f64": lambda a: a,
    "cvt.f64.f32": lambda a: a,
}
DTYPES = {
    "f32": torch.float32,
    "f32x2": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


def same(result: np.ndarray, kind: str, expected: torch.Tensor) -> bool:
    """Bit for bit; every nan is alike, and a card's."""
    bits = torch.from_numpy(result.view(f"int{8 * expected.itemsize}").copy()).view(expected.dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    return bool(((bits.view(whole) == expected.view(whole)) | (bits.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("name", [name for name, exact in FLOATS.items() if exact is not None])
def test_floats_are_those_of_torch(name):
    operation = OPERATIONS[name]
    columns = []
    for seed, kind in enumerate(operation.sources):
        torch.manual_seed(seed)
        spread = torch.randn(4000, dtype=torch.float64) * 2.0 ** torch.randint(-40, 40, (4000,))
        column = torch.cat([spread, torch.tensor(SPECIAL, dtype=torch.float64)]).to(DTYPES[kind])
        if len(column) % 2:
            column = torch.cat([column, column[:1]])
        columns.append(column[torch.randperm(len(column))])
    with np.errstate(all="ignore"):
        operands = []
        for column, kind in zip(columns, operation.sources, strict=True):
            carrier = {"f32x2": torch.int64, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            whole = column.view(carrier.get(kind, carrier[column.itemsize])).numpy()
            operands.append(viewed(whole.view(f"uint{8 * whole.itemsize}"), kind))
        result = bits_of(operation.compute(*operands), operation.to)
    high = torch.float64 if "f64" in name else torch.float32
    expected = FLOATS[name](*(column.to(high) for column in columns)).to(DTYPES[operation.to])
    assert same(result, operation.to, expected)


@pytest.mark.parametrize("low", ["bf16", "f16"])
def test_every_number_of_low_precision_and_every_tie(low):
    """All 65,536, halfway to the next, and a bit to either side."""
    whole = np.arange(2**16, dtype=np.uint16)
    high = viewed(whole, low)
    assert same(high.view(np.uint32), "f32", torch.from_numpy(whole.view(np.int16)).view(DTYPES[low]).float())
    between = high.view(np.uint32)[:, None] + np.array(
        [0, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], np.uint32
    )
    given = between.reshape(-1).view(np.float32)
    with np.errstate(all="ignore"):
        result = bits_of(given, low)
        pair = OPERATIONS[f"cvt.rn.{low}x2.f32"].compute(given, given[::-1])
    expected = torch.from_numpy(given.copy()).to(DTYPES[low])
    assert same(result, low, expected)
    assert (result[np.isnan(given)] & 0x7FFF == 0x7FFF).all() or low == "f16"
    assert (pair == result.astype(np.uint32) << 16 | result[::-1]).all()
