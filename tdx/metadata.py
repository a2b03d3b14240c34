"""Metadata: the fields that a guest reads and writes of its TD, of its virtual processor, and of the TDX module.

    field id: 63 NON_ARCH | 61:56 CLASS | 54:52 CONTEXT | 51 WRITE_MASK_VALID | 50 INC_SIZE
              46:38 LAST_FIELD_IN_SEQUENCE | 37:34 LAST_ELEMENT_IN_FIELD | 33:32 ELEMENT_SIZE | 23:0 FIELD

A table has the fields of its context that a guest may read, in the module's order, and EPTP, which it may not. Left
out are the fields of L2 VMs, service TDs and migration, which this TD has not, and CPUID_CONTROL.
Source: Intel TDX Module 1.5, Metadata Access; TDX_1.5.01, tdr_tdcs_fields_lookup.c, tdvps_fields_lookup.c,
global_sys_fields_lookup.c, metadata_generic.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from tdx.config import ATTRIBUTES_SEPT_VE_DISABLE, CONFIG_FLAGS_FLEXIBLE_PENDING_VE, XFAM_X87_SSE, TdConfig
from tdx.cpuid import TSC_HZ
from tdx.measurement import RTMRS, Measurement
from tdx.status import (
    TDX_METADATA_FIELD_ID_INCORRECT,
    TDX_METADATA_FIELD_NOT_READABLE,
    TDX_METADATA_FIELD_NOT_WRITABLE,
    TDX_METADATA_FIELD_VALUE_NOT_VALID,
    TDX_SUCCESS,
)

NULL_FIELD_ID = (1 << 64) - 1
"""In: the field before the first one. Out: there is no next field."""
TD_CTLS_PENDING_VE_DISABLE = 1 << 0
NOTIFY_EPT_FAULTS = 1 << 0
_IDENTITY = 0x3F << 56 | 0xFF_FFFF
"""Class and field: what a field is found by. Context, sizes and the write mask bit are ignored."""
_MUST_BE_ZERO = 1 << 62 | 1 << 55 | 0x7 << 47 | 0x1FFF << 34 | 0xFF << 24
"""Reserved bits, and the two LAST fields, which are for sequences only."""
_FIELD_AND_SEQUENCE_SHIFT = 38
_QWORD, _QWORDS = 8, 6
_TSC_UNIT = 25_000_000
_VENDOR_INTEL, _MAJOR, _MINOR = 0x8086, 1, 5


@dataclass(slots=True)
class Element:
    """An element of a field. ``write_mask``: bits that the guest may change; if ``locked``, they must stay.

    ``value`` is a number, or gives one when it is asked for.
    """

    id: int
    value: int | Callable[[], int]
    write_mask: int = 0
    locked: bool = False
    readable: bool = True

    def read(self) -> int:
        return self.value if isinstance(self.value, int) else self.value()


class Fields:
    """The fields of one context."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._elements = tuple(elements)
        self._numbers = {element.id & _IDENTITY: number for number, element in enumerate(self._elements)}

    def read(self, field_id: int) -> tuple[int, int]:
        """Completion status and value."""
        element = self._find(field_id)
        if element is None:
            return TDX_METADATA_FIELD_ID_INCORRECT, 0
        return (TDX_SUCCESS, element.read()) if element.readable else (TDX_METADATA_FIELD_NOT_READABLE, 0)

    def write(self, field_id: int, value: int, mask: int) -> tuple[int, int]:
        """Put the bits of ``mask`` from ``value`` into a field: completion status and the value before.

        A bit that the guest may not change may stand in the mask if it stays what it is.
        """
        element = self._find(field_id)
        if element is None:
            return TDX_METADATA_FIELD_ID_INCORRECT, 0
        if not element.write_mask & mask:
            return TDX_METADATA_FIELD_NOT_WRITABLE, 0
        before, writable = element.read(), 0 if element.locked else element.write_mask
        if (value ^ before) & mask & ~writable:
            return TDX_METADATA_FIELD_VALUE_NOT_VALID, 0
        element.value = before & ~(mask & writable) | value & mask & writable
        return TDX_SUCCESS, before

    def next_id(self, field_id: int) -> int:
        """Id of the element behind ``field_id`` that the guest may read; null if there is none."""
        start = 0 if field_id == NULL_FIELD_ID else self._numbers[field_id & _IDENTITY] + 1
        return next((element.id for element in self._elements[start:] if element.readable), NULL_FIELD_ID)

    def sequences(self, first: int) -> Iterator[tuple[int, list[int]]]:
        """Header and values of the sequences from ``first`` on, which is there: neighbours of one size are one."""
        start = 0 if first == NULL_FIELD_ID else self._numbers[first & _IDENTITY]
        header = NULL_FIELD_ID
        values: list[int] = []
        for element in self._elements[start:]:
            if values and element.id != header + len(values):
                yield header | len(values) - 1 << _FIELD_AND_SEQUENCE_SHIFT, values
                values = []
            header = header if values else element.id
            values.append(element.read())
        yield header | len(values) - 1 << _FIELD_AND_SEQUENCE_SHIFT, values

    def has(self, field_id: int) -> bool:
        """Whether ``field_id`` names one element."""
        return self._find(field_id) is not None

    def _find(self, field_id: int) -> Element | None:
        number = None if field_id & _MUST_BE_ZERO else self._numbers.get(field_id & _IDENTITY)
        return None if number is None else self._elements[number]


class Metadata:
    """The fields of one TD with one processor, by context. PENDING_VE_DISABLE begins as SEPT_VE_DISABLE says."""

    def __init__(self, config: TdConfig, measurement: Measurement) -> None:
        pending = TD_CTLS_PENDING_VE_DISABLE if config.attributes & ATTRIBUTES_SEPT_VE_DISABLE else 0
        flexible = config.config_flags & CONFIG_FLAGS_FLEXIBLE_PENDING_VE
        self._td_ctls = Element(0x9110_0003_0000_0017, pending, TD_CTLS_PENDING_VE_DISABLE, locked=not flexible)
        self.cpuid_supervisor_ve = Element(0xA020_0000_0000_0007, 0, 0xFF)
        self.cpuid_user_ve = Element(0xA020_0000_0000_0008, 0, 0xFF)
        self.td = Fields(self._td_fields(config, measurement))
        self.vp = Fields([Element(0xA020_0002_0000_0002, 0), self.cpuid_supervisor_ve, self.cpuid_user_ve])
        self.sys = Fields(_sys_fields())

    @property
    def pending_ve_disable(self) -> bool:
        """A touch of a PENDING page exits to the host; if False, it raises #VE in the guest."""
        return bool(self._td_ctls.read() & TD_CTLS_PENDING_VE_DISABLE)

    def raises_ve_on_cpuid(self, cpl: int) -> bool:
        """Whether the guest wants a #VE for every CPUID at privilege level ``cpl``."""
        return bool((self.cpuid_user_ve if cpl else self.cpuid_supervisor_ve).read())

    def _td_fields(self, config: TdConfig, measurement: Measurement) -> Iterator[Element]:
        """TD_UUID, which is random, is 0 here; so are the identities that an owner can give (MRCONFIGID and so on)."""
        yield from _elements(0x8010_0003_0000_0020, [0] * 4)  # TD_UUID
        yield Element(0x9010_0002_0000_0001, config.vcpus)  # NUM_VCPUS
        yield Element(0x9010_0001_0000_0005, 0)  # NUM_L2_VMS
        yield Element(0x1110_0003_0000_0000, config.attributes)  # ATTRIBUTES
        yield Element(0x1110_0003_0000_0001, XFAM_X87_SSE)  # XFAM
        yield Element(0x1110_0002_0000_0002, config.vcpus)  # MAX_VCPUS
        yield Element(0x1110_0000_0000_0003, int(config.gpaw == 52))  # GPAW
        yield Element(0x1110_0003_0000_0004, 0, readable=False)  # EPTP
        yield Element(0x1110_0001_0000_000C, TSC_HZ // _TSC_UNIT)  # TSC_FREQUENCY
        yield Element(0x9110_0003_0000_0010, 0, NOTIFY_EPT_FAULTS)  # NOTIFY_ENABLES
        yield Element(0x9110_0003_0000_0016, config.config_flags)  # CONFIG_FLAGS
        yield self._td_ctls
        yield from _digest(0x1310_0003_0000_0000, lambda: measurement.mrtd)
        for identity in (0x10, 0x18, 0x20):  # MRCONFIGID, MROWNER, MROWNERCONFIG
            yield from _elements(0x1310_0003_0000_0000 + identity, [0] * _QWORDS)
        for index in range(RTMRS):
            yield from _digest(0x1310_0003_0000_0040 + _QWORDS * index, partial(measurement.rtmr.__getitem__, index))


def _sys_fields() -> Iterator[Element]:
    yield Element(0x0800_0002_0000_0000, _VENDOR_INTEL)  # VENDOR_ID
    yield Element(0x0800_0001_0000_0003, _MINOR)  # MINOR_VERSION
    yield Element(0x0800_0001_0000_0004, _MAJOR)  # MAJOR_VERSION
    yield Element(0x0A00_0002_0000_0000, 0)  # SYS_ATTRIBUTES
    yield Element(0x0A00_0000_0000_0001, 1)  # NUM_TDX_FEATURES
    yield Element(0x0A00_0003_0000_0008, 0)  # TDX_FEATURES0


def _elements(first: int, values: Iterable[int | Callable[[], int]]) -> Iterator[Element]:
    return (Element(first + number, value) for number, value in enumerate(values))


def _digest(first: int, digest: Callable[[], bytes]) -> Iterator[Element]:
    """The six elements of a SHA-384 digest."""

    def qword(at: int) -> Callable[[], int]:
        return lambda: int.from_bytes(digest()[at : at + _QWORD], "little")

    return _elements(first, [qword(at) for at in range(0, _QWORD * _QWORDS, _QWORD)])
