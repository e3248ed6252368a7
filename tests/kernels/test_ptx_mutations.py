"""Compiled kernels with one thing wrong in their PTX: each is found, by the check that is there for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from op_cases import Case
from ptx.faults import Divergence, Fault, Misaligned, OutOfBounds, Race, Undefined, Uninitialised

from hicache_kernels.tiles import Tile

F32, BF16 = torch.float32, torch.bfloat16
FLAT, WIDE = (2504,), (2, 6, 320)  # ends inside of a block, or a tile
SETTLED = Case("gated_sum", BF16, WIDE)


@dataclass(frozen=True)
class Mutation:
    """What is changed in the PTX of a case: one place, of those a pattern finds, or all of them."""

    pattern: str
    replacement: str
    fault: type[Exception]
    case: Case = SETTLED
    tile: Tile | None = None
    place: int | None = 0

    def edit(self, ptx: str) -> str:
        found = list(re.finditer(self.pattern, ptx, re.M))
        assert found, "nothing to change"
        chosen = found if self.place is None else [found[self.place]]
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        return ptx


SOME = "setp.lt.u32 %p1, %tid.x, 5; @%p1 "
PENDING = Case("gated_sum", BF16, WIDE, pending=True)
PIPE = Tile(num_stages=2)
# Loaded in vectors and stored in single numbers: values change threads on their way, in shared memory.
CROSSING = Case("update_", F32, (1001,), num_orders=5, used=2, padding=1)
MIXED = Case("gated_sum", BF16, WIDE, F32, num_features=5)
MUTATIONS = {
    "a load without its mask": Mutation(r"@%p\d+ (ld\.global\.v4)", r"\1", OutOfBounds),
    "a store without its mask": Mutation(r"@%p\d+ (st\.global\.v4)", r"\1", OutOfBounds),
    "an update's store without its mask": Mutation(r"@%p\d+ (st\.global\.v4)", r"\1", Race, PENDING),
    "a mask that is one too long": Mutation(
        r"setp\.lt\.s64", "setp.le.s64", OutOfBounds, Case("forecast", BF16, FLAT), place=None
    ),
    "a load of half a vector further": Mutation(
        r"(ld\.global\.v4\.b32 .*, \[ %rd\d+ \+) 0 \]", r"\1 8 ]", Misaligned
    ),
    "a store of a vector further": Mutation(
        r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0 \]", r"\1 16 ]", OutOfBounds
    ),
    "a load of a scalar further": Mutation(
        r"(ld\.global\.b32 .*, \[ %rd\d+ \+) 0 \]", r"\1 12 ]", OutOfBounds
    ),
    "all blocks at one tile": Mutation(r"%ctaid\.x", "0", Race),
    "two threads at one place": Mutation(r"(mov\.u32\s+%r\d+, )%tid\.x", r"\1 5", Race, PENDING),
    "a difference that is a sum": Mutation(r"sub\.rn", "add.rn", AssertionError, PENDING),
    "a sum that may be fused": Mutation(r"add\.rn", "add", Undefined),
    "a store in place of another": Mutation(r"cvt\.rn\.bf16x2", "cvt.rn.f16x2", AssertionError),
    "no barrier before threads read": Mutation(r"^\s*bar\.sync.*$", "", Race, CROSSING, place=0),
    "no barrier before threads write": Mutation(r"^\s*bar\.sync.*$", "", Race, CROSSING, place=1),
    "a barrier for some": Mutation(r"bar\.sync", SOME + "bar.sync", Divergence, CROSSING),
    "an exchange in a part of a warp": Mutation(r"ldmatrix", SOME + "ldmatrix", Divergence, CROSSING),
    "no barrier among copies": Mutation(r"^\s*bar\.sync.*$", "", Race, MIXED, PIPE, place=-1),
    "copies not waited for": Mutation(
        r"^\s*cp\.async\.wait_group.*$", "", Uninitialised, tile=PIPE, place=None
    ),
    "the last copies not waited for": Mutation(
        r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 9", Uninitialised, tile=PIPE
    ),
    "copies in no group": Mutation(
        r"^\s*cp\.async\.commit_group;$", "", Uninitialised, tile=PIPE, place=None
    ),
    "copies without their mask": Mutation(
        r"selp\.b32(\s+%r\d+), 16, 0, %p\d+", r"mov.b32\1, 16", OutOfBounds, tile=PIPE, place=None
    ),
    "copies to each other's place": Mutation(
        r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+) 0", r"\1 16", Fault, tile=PIPE
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_mutations_of_triton_s_kernels_are_found(on_card, what):
    mutation = MUTATIONS[what]
    with pytest.raises(mutation.fault) as raised:
        on_card(mutation.case, 90, mutation.tile, mutation.edit)
    if mutation.fault is AssertionError:
        assert "numbers differ" in str(raised.value)


SUM = Case("gated_sum", BF16, (2, 19, 320))
NATIVE_MUTATIONS = {
    "a pack too many": Mutation(
        r"setp\.ge\.s64", "setp.gt.s64", OutOfBounds, Case("forecast", BF16, (8 * 255,))
    ),
    "a row too many": Mutation(r"setp\.ge\.s64", "setp.gt.s64", Race, SUM, place=-1),
    "all blocks at one place": Mutation(r"%ctaid\.x", "0", Race, Case("update_", F32, (8008,))),
    "a vector at a number's place": Mutation(
        r"(ld\.global\.v4\.\w+\s+\{.*\}, \[%rd\d+)\]", r"\1+8]", Misaligned, SUM
    ),
    "an argument past the last": Mutation(
        r"(ld\.param\.u64\s+%rd\d+, \[[^\]+]+)\]", r"\1+800]", OutOfBounds, SUM
    ),
    "a product of other numbers": Mutation(r"mul\.rn", "add.rn", AssertionError, SUM),
}


@pytest.mark.parametrize("what", NATIVE_MUTATIONS)
def test_mutations_of_native_kernels_are_found(on_native_card, extension, what):
    mutation = NATIVE_MUTATIONS[what]
    with pytest.raises(mutation.fault) as raised:
        on_native_card(mutation.case, extension, mutation.edit)
    if mutation.fault is AssertionError:
        assert "numbers differ" in str(raised.value)
