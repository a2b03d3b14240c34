"""The kernel's log buffer: a larger one from memblock, if ``log_buf_len=`` asks for it.

Source: kernel/printk/printk.c, log_buf_len_setup(), setup_log_buf().
"""

from __future__ import annotations

from guest.units import SZ_2G, SZ_128K
from kernel.kernel import Kernel

LOG_BUF_LEN = SZ_128K
"""CONFIG_LOG_BUF_SHIFT=17."""
_LOG_ALIGN = 8
_PRB_AVGBITS = 5
_PRB_DESC_SIZE, _PRINTK_INFO_SIZE = 24, 88
"""sizeof(struct prb_desc), sizeof(struct printk_info)."""


def setup_log_buf(kernel: Kernel) -> None:
    """Allocate text, descriptors and infos of the buffer; without room the old one stays."""
    size = min(kernel.early.log_buf_len, SZ_2G)
    size = 1 << (size - 1).bit_length() if size else 0
    if size <= LOG_BUF_LEN:
        return
    records = size >> _PRB_AVGBITS
    taken: list[tuple[int, int]] = []
    for part in (size, records * _PRB_DESC_SIZE, records * _PRINTK_INFO_SIZE):
        found = kernel.memblock.alloc_try_nid(part, _LOG_ALIGN, who="setup_log_buf")
        if not found:
            kernel.machine.print(f"log_buf_len: {part} bytes not available")
            for at, length in taken:
                kernel.memblock.phys_free(at, length, who="setup_log_buf")
            return
        taken.append((found, part))
    kernel.machine.print(f"log_buf_len: {size} bytes")
