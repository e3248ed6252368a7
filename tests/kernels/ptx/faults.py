"""What a kernel can do wrong. Every message ends with the line of PTX that did it."""

from __future__ import annotations


class Fault(Exception):
    """Something that a card would do silently wrong, or that is beyond this machine."""


class OutOfBounds(Fault):
    """An access outside of every allocation, or across the end of one; a write to what is read-only."""


class Misaligned(Fault):
    """An address that is no multiple of the bytes accessed there."""


class Race(Fault):
    """Two threads at the same bytes, one of them writing, and nothing that orders them."""


class Divergence(Fault):
    """Threads of a block that should all be at one instruction, and are not."""


class Uninitialised(Fault):
    """A register or memory read before anything was written there; a copy read before it was waited for."""


class Undefined(Fault):
    """A result that PTX leaves open: a division by zero, an endless loop, an operation that may be fused."""


class Unsupported(Fault):
    """An instruction, or a form of one, that this machine does not know: never ignored."""
