"""The reader of machine code sees what it is there to see."""

from __future__ import annotations

import pytest
from sass import late_loads, parse

# what nvdisasm prints of a loop of two loads, the second of which is late, and a store of four registers
LISTING = """
        .headerflags    @"EF_CUDA_SM90"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R12.64] ;
        /*0020*/                   FMUL R20, R5, R21.reuse ;
        /*0030*/                   LDG.E.128 R8, desc[UR6][R14.64+0x10] ;
        /*0040*/                   LDG.E R30, desc[UR6][R16.64] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   STS.128 [R31], R8 ;
        /*0070*/              @!P0 STG.E.128 desc[UR6][R12.64], R20 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_a_listing_is_read():
    kernel = parse(LISTING)
    assert len(kernel.instructions) == 11
    [body] = kernel.loading_loops()  # not the endless branch behind the end
    assert [i.opcode for i in body if i.is_load] == ["LDG.E.128", "LDG.E.128", "LDG.E"]
    assert body[0].writes == {4, 5, 6, 7}
    assert body[0].reads == {12, 13}
    assert body[1].reads == {5, 21}
    assert [i.opcode for i in body if i.is_barrier] == ["BAR.SYNC.DEFER_BLOCKING"]
    assert [i.opcode for i in body if i.is_shared] == ["STS.128"]
    [store] = [i for i in body if i.opcode.startswith("STG")]
    assert store.reads == {12, 13, 20, 21, 22, 23}
    assert store.writes == set()


def test_a_late_load_is_found():
    [body] = parse(LISTING).loading_loops()
    assert late_loads(body) == [body[2]]
    assert late_loads(body, narrow=True) == [body[2], body[3]]
    in_order = LISTING.replace("R20, R5, R21.reuse", "R20, R19, R21.reuse")
    [body] = parse(in_order).loading_loops()
    assert late_loads(body) == []


@pytest.mark.parametrize("text", ["", "cuobjdump fatal", LISTING.replace(".L_x_1:", "")])
def test_what_is_no_listing_is_refused(text):
    with pytest.raises(ValueError, match="expected what nvdisasm -c prints"):
        parse(text)
