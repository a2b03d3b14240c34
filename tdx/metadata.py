"""TD-scope metadata: the fields that TDG.VM.RD and TDG.VM.WR give a guest.

Source: Intel TDX Module 1.5, Metadata Access; TDX_1.5.01, md_td_write_element() and td_scope_metadata.

    field id: 63 NON_ARCH | 61:56 CLASS | 54:52 CONTEXT | 51 WRITE_MASK_VALID | 50 INC_SIZE
              46:38 LAST_FIELD_IN_SEQUENCE | 37:34 LAST_ELEMENT_IN_FIELD | 33:32 ELEMENT_SIZE | 23:0 FIELD
"""

from __future__ import annotations

from enum import IntEnum

from tdx.status import (
    TDX_METADATA_FIELD_ID_INCORRECT,
    TDX_METADATA_FIELD_NOT_WRITABLE,
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_SUCCESS,
)

CONFIG_FLAGS_GPAW = 1 << 0
CONFIG_FLAGS_FLEXIBLE_PENDING_VE = 1 << 1
TD_CTLS_PENDING_VE_DISABLE = 1 << 0
NOTIFY_EPT_FAULTS = 1 << 0
ATTRIBUTES_SEPT_VE_DISABLE = 1 << 28
XFAM_X87_SSE = 0b11

_IDENTITY = 0x3F << 56 | 0xFF_FFFF
"""Class and field: what a field is found by. Context, sizes and the write mask bit are ignored."""
_MUST_BE_ZERO = 1 << 62 | 1 << 55 | 0x7 << 47 | 0x1FFF << 34 | 0xFF << 24
"""Reserved bits, and the two LAST fields, which are for sequences only."""


class Field(IntEnum):
    """Field id, RDX of TDG.VM.RD and TDG.VM.WR."""

    ATTRIBUTES = 0x1110_0003_0000_0000
    XFAM = 0x1110_0003_0000_0001
    NOTIFY_ENABLES = 0x9110_0003_0000_0010
    """Linux calls it 0x9100000000000010, which finds the same field."""
    CONFIG_FLAGS = 0x1110_0003_0000_0016
    TD_CTLS = 0x1110_0003_0000_0017


_FIELDS = {field & _IDENTITY: field for field in Field}
_GUEST_WRITE_MASK = {Field.NOTIFY_ENABLES: NOTIFY_EPT_FAULTS, Field.TD_CTLS: TD_CTLS_PENDING_VE_DISABLE}
"""Bits that the guest may change; of a field that is not here, none."""


class Metadata:
    """The metadata of one TD. PENDING_VE_DISABLE begins as ATTRIBUTES.SEPT_VE_DISABLE says (TDH.MNG.INIT)."""

    def __init__(self, attributes: int, config_flags: int) -> None:
        self._values = {
            Field.ATTRIBUTES: attributes,
            Field.XFAM: XFAM_X87_SSE,
            Field.NOTIFY_ENABLES: 0,
            Field.CONFIG_FLAGS: config_flags,
            Field.TD_CTLS: TD_CTLS_PENDING_VE_DISABLE if attributes & ATTRIBUTES_SEPT_VE_DISABLE else 0,
        }

    @property
    def pending_ve_disable(self) -> bool:
        """A touch of a PENDING page exits to the host; if False, it raises #VE in the guest."""
        return bool(self._values[Field.TD_CTLS] & TD_CTLS_PENDING_VE_DISABLE)

    def read(self, field_id: int) -> tuple[int, int]:
        """Completion status and value."""
        field = _find(field_id)
        return (TDX_METADATA_FIELD_ID_INCORRECT, 0) if field is None else (TDX_SUCCESS, self._values[field])

    def write(self, field_id: int, value: int, mask: int) -> tuple[int, int]:
        """Put the bits of ``mask`` from ``value`` into a field: completion status and the value before.

        A bit that the guest may not change may stand in the mask if it stays what it is.
        """
        field = _find(field_id)
        if field is None:
            return TDX_METADATA_FIELD_ID_INCORRECT, 0
        before, writable = self._values[field], _GUEST_WRITE_MASK.get(field, 0)
        if not writable & mask:
            return TDX_METADATA_FIELD_NOT_WRITABLE, 0
        if field is Field.TD_CTLS and not self._values[Field.CONFIG_FLAGS] & CONFIG_FLAGS_FLEXIBLE_PENDING_VE:
            writable = 0
        if (value ^ before) & mask & ~writable:
            return TDX_METADATA_FIELD_VALUE_NOT_VALID, 0
        self._values[field] = before & ~(mask & writable) | value & mask & writable
        return TDX_SUCCESS, before


def _find(field_id: int) -> Field | None:
    return None if field_id & _MUST_BE_ZERO else _FIELDS.get(field_id & _IDENTITY)
