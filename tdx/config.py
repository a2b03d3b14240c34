"""What the host fixed when it created a TD (TDH.MNG.INIT)."""

from __future__ import annotations

from dataclasses import dataclass

ATTRIBUTES_SEPT_VE_DISABLE = 1 << 28
CONFIG_FLAGS_GPAW = 1 << 0
CONFIG_FLAGS_FLEXIBLE_PENDING_VE = 1 << 1
CONFIG_FLAGS_NO_RBP_MOD = 1 << 2
XFAM_X87_SSE = 0b11


@dataclass(frozen=True, slots=True)
class TdConfig:
    """How a TD is configured.

    ``gpaw`` is the guest physical address width, 48 or 52; its highest bit is the shared bit. No module has 53: it is
    for memory above 2^51, where a TD of 52 bits has no private addresses.
    ``sept_ve_disable``: a touch of unaccepted memory exits to the host; if False, it raises #VE in the guest.
    ``flexible_pending_ve``: the guest may change that (KVM up to 6.16 does not let it).
    ``no_rbp_mod``: TDG.VP.VMCALL cannot expose RBP.
    """

    gpaw: int = 52
    sept_ve_disable: bool = True
    vcpus: int = 1
    flexible_pending_ve: bool = False
    no_rbp_mod: bool = False

    @property
    def shared_mask(self) -> int:
        """The shared bit of an address."""
        return 1 << (self.gpaw - 1)

    @property
    def attributes(self) -> int:
        """ATTRIBUTES of the TD."""
        return ATTRIBUTES_SEPT_VE_DISABLE if self.sept_ve_disable else 0

    @property
    def config_flags(self) -> int:
        """CONFIG_FLAGS of the TD."""
        return (
            (CONFIG_FLAGS_GPAW if self.gpaw >= 52 else 0)
            | (CONFIG_FLAGS_FLEXIBLE_PENDING_VE if self.flexible_pending_ve else 0)
            | (CONFIG_FLAGS_NO_RBP_MOD if self.no_rbp_mod else 0)
        )
