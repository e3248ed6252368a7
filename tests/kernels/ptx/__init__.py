"""Executes compiled PTX on a machine without a card, and refuses what a card would do silently wrong.

============== ============================================================================================
``faults``     what a kernel can do wrong, one exception each
``parser``     PTX text → kernels: parameters, registers, instructions with parsed operands
``values``     the types of PTX as numpy arrays of bits; arithmetic rounded once
``alu``        what every instruction computes that touches registers only
``registers``  the registers of many threads, and which threads have written them
``shadow``     who read and wrote every byte, and whether anybody did
``memory``     allocations of global memory, and the blocks' shared memory
``tensors``    CPU tensors as allocations
``copies``     cp.async: bytes on their way from global to shared memory
``access``     instructions that touch memory
``machine``    the threads of a grid: instructions, branches, barriers
``on_triton``  a driver under Triton's launcher, whose launches come here
``on_native``  the C++ launcher of the native kernels, whose launches come here
============== ============================================================================================

All threads of a launch run in lockstep, as numpy arrays with a mask of those that are active; those furthest
behind in the code go first, so that diverged threads meet again. What the order of threads could change is a
race, and races are errors, so one order shows what all do.
"""
