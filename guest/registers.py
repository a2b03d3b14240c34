"""General purpose registers of the boot processor."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Registers:
    """The registers that stages hand to each other and that TDCALL uses. Every value is 64 bits, unsigned."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    cr3: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name and value of each register, in the order of their encoding."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
