"""Where a kernel may lie: what its configuration fixes for every stage before it.

Source: arch/x86/include/asm/boot.h and page_64_types.h; arch/x86/Kconfig for the defaults.
"""

from __future__ import annotations

from guest.units import PMD_SIZE, SZ_1G, SZ_2M, SZ_16M

LOAD_PHYSICAL_ADDR = SZ_16M
"""CONFIG_PHYSICAL_START, aligned to CONFIG_PHYSICAL_ALIGN."""
CONFIG_PHYSICAL_ALIGN = SZ_2M
MIN_KERNEL_ALIGN = PMD_SIZE
START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map: virtual address of the kernel's mapping of physical address 0."""
KERNEL_IMAGE_SIZE = SZ_1G
"""Room for the kernel from the start of its virtual mapping on, with CONFIG_RANDOMIZE_BASE."""
SECTOR = 512
STARTUP_64_OFFSET = 0x200
"""startup_64 lies this far behind startup_32, the start of the protected-mode code (boot.rst)."""
