"""The decompressor in memory: what the real one knows of itself from its linker, read out of its code.

The kernel calls it ZO. It is position independent; its first act is to move itself to the end of the memory that it
unpacks into. Source: arch/x86/boot/compressed/head_64.S, startup_64.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bootstub.kaslr import find_build_string
from guest.memory import GuestMemory
from guest.records import GuestRecord

_HEAD_SIZE = 0x1000
_INIT_SIZE_MINUS_END = re.compile(rb"\x8b\x9e\x60\x02\0\0\x81\xeb(....)\x48\x01\xeb", re.DOTALL)
"""movl init_size(%rsi), %ebx; subl $_end, %ebx; addq %rbp, %rbx."""


@dataclass(frozen=True, slots=True)
class DecompressorImage:
    """An image whose protected-mode code begins at ``startup_32``; ``end`` is its size in memory, with heap and stack.

    ``payload`` is where the compressed kernel lies in it, from offset to offset.
    """

    startup_32: int
    payload: range
    end: int

    @classmethod
    def at(cls, memory: GuestMemory, startup_32: int, params: GuestRecord) -> DecompressorImage:
        """The image at ``startup_32``. Code that does not say where it ends is taken to fill all of ``init_size``."""
        offset, length, init_size = (
            params[f"hdr.{name}"] for name in ("payload_offset", "payload_length", "init_size")
        )  # fmt: skip
        found = _INIT_SIZE_MINUS_END.search(memory.read(startup_32, min(_HEAD_SIZE, offset)))
        end = int.from_bytes(found[1], "little") if found else init_size
        return cls(
            startup_32, range(offset, offset + length), end if offset + length <= end <= init_size else init_size
        )

    def moved(self, memory: GuestMemory, output: int, init_size: int) -> DecompressorImage:
        """Move it so that it ends where the memory from ``output`` on does; returns the image at its new place."""
        target = output + init_size - self.end
        memory.write(target, memory.read(self.startup_32, self.end))
        return DecompressorImage(target, self.payload, self.end)

    @property
    def input_data(self) -> int:
        """Address of the compressed kernel."""
        return self.startup_32 + self.payload.start

    def read_payload(self, memory: GuestMemory) -> bytes:
        """The compressed kernel."""
        return memory.read(self.input_data, len(self.payload))

    def build_string(self, memory: GuestMemory) -> bytes:
        """The build string, as ``bootstub.kaslr.build_string()`` has it."""
        at, payload = self.startup_32, self.payload
        before = find_build_string(memory.read(at, payload.start))
        return before or find_build_string(memory.read(at + payload.stop, self.end - payload.stop))
