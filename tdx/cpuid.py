"""CPUID as a TD sees it: a table of leaves, the same on every machine, so that runs repeat.

The TDX module answers CPUID natively for most leaves, from what the host configured when it built the TD. For the
others it raises #VE, and the guest may ask the host. The features here are those of a plain 64-bit processor without
AVX, PCIDs, LA57 and performance monitoring.
Sources: SDM volume 2, CPUID; Intel TDX Module 1.5, CPUID virtualization; Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

Leaf = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


def _text(text: str) -> tuple[int, ...]:
    return tuple(int.from_bytes(text[at : at + 4].encode(), "little") for at in range(0, len(text), 4))


def _bits(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


_GENU, _INEI, _NTEL = _text("GenuineIntel")
_INTE, _LTDX, _BLANK = _text("IntelTDX    ")
_KVMK, _VMKV, _M = _text("KVMKVMKVM\0\0\0")
_BRAND = _text("Intel(R) TD on an emulated processor".ljust(48, "\0"))
_FAMILY_6_MODEL_94 = 0x000506E3
_SSE3, _PCLMUL, _MWAIT, _SSSE3, _CX16, _SSE41, _SSE42, _MOVBE, _POPCNT, _AES, _RDRAND, _HYPERVISOR = (
    0, 1, 3, 9, 13, 19, 20, 22, 23, 25, 30, 31,
)  # fmt: skip
_X2APIC, _TSC_DEADLINE = 21, 24
_FPU_TO_MSR, _PAE_TO_APIC = range(6), range(6, 10)  # FPU VME DE PSE TSC MSR; PAE MCE CX8 APIC
_SEP_TO_PSE36, _CLFLUSH, _MMX_TO_SSE2 = (11, 12, 13, 14, 15, 16, 17), 19, (23, 24, 25, 26)
TSC_HZ = 1_000_000_000
CRYSTAL_HZ = TSC_HZ // 40
"""What the local APIC's timer counts."""
_USE_ECX = frozenset({7, 0x21})
"""Leaves of the table that look at ECX."""


def native_leaf(table: dict[tuple[int, int], Leaf], leaf: int, subleaf: int) -> Leaf | None:
    """The module's own answer from ``table``; None where it raises #VE."""
    return table.get((leaf, subleaf if leaf in _USE_ECX else 0))


def host_cpuid(leaf: int) -> Leaf:
    """The host's answer for a leaf that is not native: KVM's own leaves and the brand string; zero for others."""
    return _HOST_LEAVES.get(leaf, (0, 0, 0, 0))


def td_cpuid(gpaw: int) -> dict[tuple[int, int], Leaf]:
    """Native leaves by (EAX, ECX) in; a leaf without sub-leaves stands under 0.

    ``gpaw`` is the physical address width.
    """
    return {
        (0, 0): (0x21, _GENU, _NTEL, _INEI),
        (1, 0): (
            _FAMILY_6_MODEL_94,
            1 << 16 | 8 << 8,  # one logical processor, CLFLUSH of 64 bytes
            _bits(_SSE3, _SSSE3, _CX16, _SSE41, _SSE42, _X2APIC, _MOVBE, _POPCNT, _TSC_DEADLINE, _RDRAND, _HYPERVISOR),
            _bits(*_FPU_TO_MSR, *_PAE_TO_APIC, *_SEP_TO_PSE36, _CLFLUSH, *_MMX_TO_SSE2),
        ),
        (7, 0): (
            0,
            _bits(0, 7, 9, 18, 19, 20, 23),
            0,
            0,
        ),  # FSGSBASE SMEP ERMS RDSEED ADX SMAP CLFLUSHOPT; BMI needs VEX, which unicorn has only in part
        (0x15, 0): (1, TSC_HZ // CRYSTAL_HZ, CRYSTAL_HZ, 0),
        (0x21, 0): (0, _INTE, _BLANK, _LTDX),
        (0x8000_0000, 0): (0x8000_0008, 0, 0, 0),
        (0x8000_0001, 0): (0, 0, _bits(0, 5), _bits(11, 20, 26, 27, 29)),  # LAHF LZCNT; SYSCALL NX 1G RDTSCP LM
        (0x8000_0007, 0): (0, 0, 0, _bits(8)),  # invariant TSC
        (0x8000_0008, 0): (48 << 8 | min(gpaw, 52), 0, 0, 0),
    }


_HOST_LEAVES: dict[int, Leaf] = {
    0x4000_0000: (0x4000_0001, _KVMK, _VMKV, _M),
    0x8000_0002: _BRAND[0:4],  # type: ignore[dict-item]  # four words
    0x8000_0003: _BRAND[4:8],  # type: ignore[dict-item]
    0x8000_0004: _BRAND[8:12],  # type: ignore[dict-item]
}
