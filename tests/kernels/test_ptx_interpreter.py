"""The interpreter of PTX does what a card does, and says so when a card would do something silently wrong."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx.faults import (
    Divergence,
    Fault,
    Misaligned,
    OutOfBounds,
    Race,
    Undefined,
    Uninitialised,
    Unsupported,
)
from ptx.machine import launch
from ptx.memory import Allocation, Global
from ptx.parser import parse

THREADS = 64
SOURCE, TARGET = 0x10000, 0x40000  # addresses on the device
TEMPLATE = """
.version 8.7
.target sm_90a
.address_size 64
.shared .align 16 .b8 memory[{shared}];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<32>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r4, %r3, {threads}, %r2;   // the thread's number in the grid
    mul.wide.u32 %rd3, %r4, 4;
    add.s64 %rd4, %rd1, %rd3;              // its number of the source
    add.s64 %rd5, %rd2, %rd3;              // and of the target
    mov.u32 %r5, memory;
    shl.b32 %r6, %r2, 2;
    add.s32 %r7, %r5, %r6;                 // its bytes of shared memory
{body}
    ret;
}}
"""
# of its neighbour in the block: %r12, and the bytes of shared memory at %r13
NEIGHBOUR = """
    add.s32 %r10, %r2, 1;
    rem.s32 %r12, %r10, 64;
    shl.b32 %r11, %r12, 2;
    add.s32 %r13, %r5, %r11;
"""


def run(body: str, blocks: int = 1, scalar: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Run threads on as many uint32 as there are threads: source and target."""
    return execute(TEMPLATE.format(body=body, shared=4 * THREADS, threads=THREADS), blocks, scalar)


def execute(text: str, blocks: int = 1, scalar: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same, of whole PTX."""
    source = np.arange(100, 100 + blocks * THREADS, dtype=np.uint32)
    target = np.zeros_like(source)
    memory = Global(
        [
            Allocation("source", SOURCE, source.view(np.uint8)),
            Allocation("target", TARGET, target.view(np.uint8), holds=False, writable=True),
        ]
    )
    [kernel] = parse(text).values()
    launch(kernel, (blocks, 1, 1), struct.pack("<QQI", SOURCE, TARGET, scalar), memory)
    return source, target


def test_a_kernel_runs():
    source, target = run(
        """
        setp.lt.u32 %p1, %r4, %r1;
        mov.u32 %r20, 0x7;
        @%p1 ld.global.b32 { %r20 }, [ %rd4 + 0 ];
        add.s32 %r21, %r20, 1;
        st.global.b32 [%rd5], %r21;
        """,
        blocks=3,
        scalar=150,
    )
    assert (target[:150] == source[:150] + 1).all()
    assert (target[150:] == 8).all()


def test_more_threads_than_run_at_a_time():
    source, target = run("ld.global.u32 %r20, [%rd4];\nst.global.u32 [%rd5], %r20;", blocks=300)
    assert (source == target).all()


def test_diverged_threads_meet_again():
    """Each goes around as often as its number says; then all are at the barrier."""
    _, target = run(
        """
        mov.b32 %r20, 0;
        mov.b32 %r21, 0;
        setp.eq.s32 %p1, %r2, 0;
        @%p1 bra $L_done;
        $L_loop:
        add.s32 %r20, %r20, %r2;
        add.s32 %r21, %r21, 1;
        setp.lt.s32 %p2, %r21, %r2;
        @%p2 bra $L_loop;
        $L_done:
        bar.sync 0;
        st.global.u32 [%rd5], %r20;
        """
    )
    assert target.tolist() == [i * i for i in range(THREADS)]


def test_threads_exchange_through_shared_memory():
    source, target = run(
        NEIGHBOUR
        + """
        ld.global.u32 %r20, [%rd4];
        st.shared.u32 [%r7], %r20;
        bar.sync 0;
        ld.shared.u32 %r21, [%r13];
        st.global.u32 [%rd5], %r21;
        """,
        blocks=2,
    )
    assert target.tolist() == np.roll(source.reshape(2, -1), -1, axis=1).reshape(-1).tolist()


def test_vectors_and_narrow_numbers():
    source, target = run(
        """
        setp.ge.s32 %p1, %r4, 16;
        @%p1 bra $L_end;
        mul.wide.u32 %rd10, %r4, 16;
        add.s64 %rd11, %rd1, %rd10;
        add.s64 %rd12, %rd2, %rd10;
        ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%rd11];
        mov.b32 {%rs1, %rs2}, %r20;
        mov.b32 %r24, {%rs2, %rs1};
        mov.b64 %rd13, {%r21, %r22};
        mov.b64 {%r25, _}, %rd13;
        mov.b64 {_, %r26}, %rd13;
        cvt.u32.u16 %r27, %rs1;
        st.global.v4.b32 [%rd12], {%r24, %r25, %r26, %r27};
        $L_end:
        """
    )
    expected = source.copy().reshape(16, 4)
    first = expected[:, 0].copy()
    expected[:, 3] = first & 0xFFFF
    expected[:, 0] = first << 16 | first >> 16
    assert (target.reshape(16, 4) == expected).all()


COPY = """
    cp.async.ca.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x4;
    cp.async.commit_group;
"""


def test_a_copy_arrives():
    source, target = run(
        NEIGHBOUR
        + COPY
        + """
        cp.async.wait_group 0;
        bar.sync 0;
        ld.shared.u32 %r21, [%r13];
        st.global.u32 [%rd5], %r21;
        """
    )
    assert target.tolist() == np.roll(source, -1).tolist()


def test_a_copy_of_nothing_is_zeros():
    """It may come from anywhere: the address is not used."""
    source, target = run(
        """
        setp.lt.s32 %p1, %r2, 5;
        selp.b32 %r20, 4, 0, %p1;
        selp.b64 %rd10, %rd4, 0, %p1;
        cp.async.ca.shared.global [ %r7 + 0 ], [ %rd10 + 0 ], 0x4, %r20;
        cp.async.wait_all;
        ld.shared.u32 %r21, [%r7];
        st.global.u32 [%rd5], %r21;
        """
    )
    assert target.tolist() == source[:5].tolist() + [0] * (THREADS - 5)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_handed_around_a_warp(trans):
    """Thread t of a warp gets the numbers 2 t and 2 t + 1 of every matrix, or of it turned around."""
    source, target = run(
        f"""
        ld.global.u32 %r20, [%rd4];
        st.shared.u32 [%r7], %r20;
        bar.sync 0;
        shl.b32 %r21, %r2, 4;
        and.b32 %r22, %r21, 240;
        add.s32 %r23, %r5, %r22;
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r24, %r25}}, [%r23];
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r23], {{%r24}};
        ld.global.u32 %r26, [%rd4];
        setp.lt.s32 %p1, %r2, 32;
        selp.b32 %r27, %r24, %r25, %p1;
        st.global.u32 [%rd5], %r27;
        """.replace("stmatrix", "setp.lt.s32 %p2, %r2, 32;\n@%p2 stmatrix")
    )
    matrices = source.view(np.uint16).reshape(2, 8, 8)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    assert target.view(np.uint16).tolist() == expected.reshape(-1).tolist()


# What is wrong → body, the fault, and what its message names.
WRONG = {
    "a load past the end": (
        "ld.global.u32 %r20, [%rd4+4];", OutOfBounds, "reads 4 bytes at 0x10100, 256 bytes into source"
    ),
    "a load before the begin": ("ld.global.u32 %r20, [%rd4+-4];", OutOfBounds, "4 bytes before source"),
    "a load across the end": (
        "add.s64 %rd10, %rd1, 248;\nld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%rd10+8];",
        OutOfBounds, "ld.global.v4.u32",
    ),
    "a store to what is read": (
        "st.global.u32 [%rd4], %r2;", OutOfBounds, "writes 4 bytes .* source .read-only"
    ),
    "a store past the end": ("st.global.u32 [%rd5+4], %r2;", OutOfBounds, "into target"),
    "a load in between": ("ld.global.u32 %r20, [%rd4+2];", Misaligned, "reads 4 bytes at 0x10002"),
    "a vector at a number's place": (
        "setp.eq.s32 %p1, %r2, 1;\n@%p1 ld.global.v2.u32 {%r20, %r21}, [%rd4];", Misaligned, "reads 8 bytes"
    ),
    "a store in between": ("st.global.u32 [%rd5+1], %r2;", Misaligned, "writes 4 bytes"),
    "shared memory past the end": (
        "st.shared.u32 [%r7+4], %r2;", OutOfBounds, "shared memory: 4 bytes at 0x100"
    ),
    "shared memory before the begin": ("st.shared.u32 [%r7+-4], %r2;", OutOfBounds, "shared memory"),
    "shared memory in between": ("st.shared.u32 [%r7+2], %r2;", Misaligned, "shared memory"),
    "a parameter past the end": ("ld.param.b64 %rd10, [kernel_param_2+4];", OutOfBounds, "parameters"),
    "a store of two threads": ("st.global.u32 [%rd2], %r2;", Race, "of block 0 writes what"),
    "a store of two threads, of the same number": (
        "st.global.u32 [%rd2], 5;", Race, "of block 0 writes what"
    ),
    "a load of what another stored": (
        NEIGHBOUR + "st.shared.u32 [%r7], %r2;\nld.shared.u32 %r21, [%r13];",
        Race, "reads what thread 1 of block 0 wrote",
    ),
    "a store of what another loaded": (
        NEIGHBOUR + "st.shared.u32 [%r7], %r2;\nbar.sync 0;\n"
        "ld.shared.u32 %r21, [%r13];\nst.shared.u32 [%r7], %r21;",
        Race, "writes what thread .* read",
    ),
    "a store of what all loaded": (
        "st.shared.u32 [%r7], %r2;\nbar.sync 0;\nld.shared.u32 %r21, [%r5];\nst.shared.u32 [%r7], %r21;",
        Race, "writes what several threads of block 0 read",
    ),
    "a barrier for some": (
        "setp.lt.s32 %p1, %r2, 5;\n@%p1 bra $L_a;\nbar.sync 0;\n$L_a:",
        Divergence, "59 of 64 threads of block 0 at a barrier",
    ),
    "a barrier for some, by its predicate": (
        "setp.lt.s32 %p1, %r2, 5;\n@%p1 bar.sync 0;", Divergence, "5 of 64 threads"
    ),
    "a barrier after some returned": (
        "setp.lt.s32 %p1, %r2, 5;\n@%p1 ret;\nbar.sync 0;", Divergence, "59 of 64 threads"
    ),
    "matrices for a part of a warp": (
        "st.shared.u32 [%r7], %r2;\nbar.sync 0;\nsetp.lt.s32 %p1, %r2, 33;\n"
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5];",
        Divergence, "matrices by a part of a warp",
    ),
    "matrices of another's bytes": (
        "st.shared.u32 [%r7], %r2;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5];",
        Race, "reads what",
    ),
    "a row of a matrix in between": (
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r7];", Misaligned, "16 bytes"
    ),
    "a register nobody wrote": ("add.s32 %r20, %r21, 1;", Uninitialised, "reads %r21"),
    "a register some wrote": (
        "setp.lt.s32 %p1, %r2, 5;\n@%p1 mov.u32 %r20, 5;\nadd.s32 %r21, %r20, 1;", Uninitialised, "reads %r20"
    ),
    "a predicate nobody wrote": ("@%p1 mov.u32 %r20, 5;", Uninitialised, "reads %p1"),
    "shared memory nobody wrote": ("ld.shared.u32 %r20, [%r7];", Uninitialised, "nobody wrote"),
    "memory nobody wrote": ("ld.global.u32 %r20, [%rd5];", Uninitialised, "nobody wrote"),
    "a copy not waited for": (
        COPY + "ld.shared.u32 %r20, [%r7];",
        Uninitialised, "being copied: byte 0 of shared memory, not waited for",
    ),
    "a copy of the last group not waited for": (
        COPY + "cp.async.wait_group 1;\nld.shared.u32 %r20, [%r7];",
        Uninitialised, "not waited for",
    ),
    "a copy in no group": (
        COPY.splitlines()[1] + "\ncp.async.wait_group 0;\nld.shared.u32 %r20, [%r7];",
        Uninitialised, "not waited for",
    ),
    "a copy others did not wait for": (
        NEIGHBOUR + COPY + "cp.async.wait_group 0;\nld.shared.u32 %r20, [%r13];",
        Race, "reads what thread 1 of block 0 wrote",
    ),
    "a copy onto a copy": (COPY + COPY, Uninitialised, "still on its way"),
    "a copy onto what another reads": (
        NEIGHBOUR + "st.shared.u32 [%r7], %r2;\nbar.sync 0;\nld.shared.u32 %r20, [%r13];" + COPY,
        Race, "writes what",
    ),
    "a store to what is being copied": (COPY + "st.shared.u32 [%r7], %r2;", Uninitialised, "being copied"),
    "a copy of what changes under way": (
        """
        st.global.u32 [%rd5], 1;
        cp.async.ca.shared.global [ %r7 + 0 ], [ %rd5 + 0 ], 0x4;
        st.global.u32 [%rd5], 2;
        cp.async.wait_all;
        """, Race, "changed under way",
    ),
    "a copy past the end": (
        "cp.async.ca.shared.global [ %r7 + 0 ], [ %rd4 + 4 ], 0x4;", OutOfBounds, "into source"
    ),
    "a copy in between": (
        "cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10;", Misaligned, "16 bytes"
    ),
    "a division by zero": ("div.s32 %r20, %r2, %r2;", Undefined, "div.s32"),
    "a product that may be fused": (
        "mov.b32 %r20, 0f3F800000;\nmul.f32 %r21, %r20, %r20;", Undefined, "mul.f32 has no rounding"
    ),
    "a register that is not declared": ("mov.u32 %r99, 1;", Unsupported, "%r99 is not declared"),
    "a register of another width": ("mov.u32 %r20, %rd1;", Unsupported, "%rd1 has 64 bits"),
    "an unknown symbol": ("mov.u32 %r20, elsewhere;", Unsupported, "elsewhere"),
}  # fmt: skip
WRONG |= {
    text: (text, Unsupported, text.split()[0])
    for text in (
        "shfl.sync.bfly.b32 %r20, %r2, 1, 31, -1;",
        "elect.sync %r20, -1;",
        "bar.arrive 0, 64;",
        "bar.sync 1;",
        "ld.global.nc.u32 %r20, [%rd4];",
        "ld.volatile.global.u32 %r20, [%rd4];",
        "atom.global.add.u32 %r20, [%rd5], 1;",
        "add.rz.f32 %r20, %r2, %r2;",
        "mul.rn.ftz.f32 %r20, %r2, %r2;",
        "fma.rn.f64 %rd20, %rd1, %rd1, %rd1;",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r20, %r21}, [%r5];",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r20}, {%r2}, {%r2}, {%r2};",
        "cp.async.bulk.commit_group;",
        "cp.async.ca.shared.global [%r7], [%rd4], 0x3;",
        "membar.gl;",
        "brx.idx %r2, $L_a;",
        "call foo;",
        "trap;",
    )
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told(what):
    """By the fault it is, with the instruction and its line."""
    body, fault, message = WRONG[what]
    with pytest.raises(fault, match=message) as raised:
        run(body)
    assert "kernel" in str(raised.value) or "line " in str(raised.value)


def test_blocks_are_never_ordered():
    """Neither by a barrier, nor where they run one after the other."""
    first = "setp.eq.s32 %p1, %r2, 0;\nbar.sync 0;\n@%p1 "
    for blocks in (2, 300):
        with pytest.raises(Race, match=r"thread 0 of block \d+ writes what thread 0 of block"):
            run(first + "st.global.u32 [%rd2], %r2;", blocks=blocks)
    with pytest.raises(Race, match="reads what thread 0 of block 0 wrote"):
        run(first + "st.global.u32 [%rd5], %r2;\n@%p1 ld.global.u32 %r20, [%rd2];", blocks=2)
    for both in (2, 300):
        run("ld.global.u32 %r20, [%rd1];", blocks=both)  # what all read


def test_what_is_unknown_is_told_where_no_thread_comes():
    with pytest.raises(Unsupported, match=r"the instruction membar\.gl"):
        run("bra.uni $L_end;\nmembar.gl;\n$L_end:")


def test_a_loop_without_an_end(monkeypatch):
    monkeypatch.setattr("ptx.machine.MAX_STEPS", 1000)
    with pytest.raises(Undefined, match="no end after 1000 instructions"):
        run("$L_a:\nbra.uni $L_a;")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".visible .entry", ".visible .func", ".func"),
        (".reqntid 64", "", "how many threads"),
        (".reqntid 64", ".reqntid 64, 2", "one dimension"),
        (".reqntid 64", ".reqnctapercluster 2", "reqnctapercluster"),
        (".reg .pred", ".local .align 8 .b8", ".local"),
        ("ret;", "{ .reg .b32 %q<2>; }\nret;", "line "),
        ("ret;", "ret", "line "),
        ("ret;", "add.s32 %r20, %r2, 1;", "ends without ret"),
        ("%r2, %tid.x", "%r2, %laneid", "laneid"),
        ("%r2, %tid.x", "%r2, -%tid.x", "-%tid.x"),
        ("mov.u32 %r2", "mov.u32 %tid.y", "tid.y"),
    ],
)
def test_ptx_that_is_not_understood_is_refused(old, new, message):
    text = TEMPLATE.format(body="", shared=4, threads=64)
    assert text.count(old) >= 1
    with pytest.raises(Unsupported, match=message):
        execute(text.replace(old, new))


def test_launches_a_card_refuses():
    kernel = parse(TEMPLATE.format(body="", shared=4, threads=64))["kernel"]
    memory = Global([Allocation("source", SOURCE, np.zeros(4, np.uint8))])
    for grid in ((0, 1, 1), (2**31, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        with pytest.raises(Fault, match="a grid of"):
            launch(kernel, grid, bytes(20), memory)
    with pytest.raises(Fault, match="16 bytes of arguments for 20"):
        launch(kernel, (1, 1, 1), bytes(16), memory)


def test_allocations_do_not_overlap():
    for other in (SOURCE - 4, SOURCE, SOURCE + 4):
        with pytest.raises(ValueError, match="overlap"):
            Global([Allocation(n, at, np.zeros(8, np.uint8)) for n, at in (("a", SOURCE), ("b", other))])
    with pytest.raises(ValueError, match="expected an allocation"):
        Global([])
