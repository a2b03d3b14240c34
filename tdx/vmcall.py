"""The host's side of TDG.VP.VMCALL: sub-functions of the GHCI, and calls of the vendor.

Source: Intel Guest-Host Communication Interface, chapter 3; arch/x86/kvm/vmx/tdx.c (6.16), handle_tdvmcall().
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from guest.memory import PhysicalMemory
from guest.ranges import RangeSet
from guest.registers import Registers
from guest.units import PAGE_SIZE, SZ_2M, U64_MAX
from tdx.instructions import Instructions
from tdx.leaves import SubFunction, VmCallStatus
from tdx.sept import SecureEpt

MAP_GPA_PIECE = SZ_2M
"""What the host does of a MapGPA before it looks for events of the guest."""
QUOTE = b"unaccepted: this quote is not genuine"
"""The reply to GetQuote: no quoting enclave stands behind it."""
KVM_HC_VAPIC_POLL_IRQ = 1
KVM_ENOSYS = 1000
_SETUP_EVENT_NOTIFY_INTERRUPT = 1 << 1
_VECTORS = range(32, 256)
_QUOTE_HEADER = struct.Struct("<QQII")
"""Version, status, bytes of the request, bytes of the reply."""
_QUOTE_VERSION = 1
_NAMES = {int(function): function.spec_name for function in SubFunction}


@dataclass(slots=True)
class VmCallPolicy:
    """How a host answers where it has a choice.

    ``map_gpa``: it does MapGPA at all (KVM: only if user space wants it). ``has_event`` is asked after each 2 MiB of a
    MapGPA with the next address; True ends the call there with RETRY. ``refused`` are addresses, without the shared
    bit, that it does not change; it then answers ``refusal`` (KVM: INVALID_OPERAND; GHCI also knows GPA_INUSE).
    ``quotes``: it answers GetQuote, with a text that is no genuine quote. ``notify_vector`` is what the guest set up.
    """

    map_gpa: bool = True
    has_event: Callable[[int], bool] | None = None
    refused: RangeSet = field(default_factory=RangeSet)
    refusal: VmCallStatus = VmCallStatus.INVALID_OPERAND
    quotes: bool = False
    notify_vector: int | None = None


class VmCallHost(Protocol):
    """The parts of a host that calls are about."""

    physical: PhysicalMemory
    sept: SecureEpt
    shared_mask: int
    shared: RangeSet
    shared_mapped: RangeSet
    instructions: Instructions
    vmcalls: VmCallPolicy


def sub_function_name(regs: Registers) -> str:
    """Name of the call, or its number: R11, or R10 of a vendor's call."""
    if regs.r10:
        return f"vendor {regs.r10:#x}"
    return _NAMES.get(regs.r11, f"{regs.r11:#x}")


def answer(host: VmCallHost, regs: Registers) -> int:
    """Do what the guest asks for, with results in ``regs``; returns R10."""
    if regs.r10:
        return 0 if regs.r10 == KVM_HC_VAPIC_POLL_IRQ else -KVM_ENOSYS & U64_MAX
    match regs.r11:
        case SubFunction.MapGPA:
            status, regs.r11 = _map_gpa(host, regs.r12, regs.r13)
            return status
        case SubFunction.GetTdVmCallInfo:
            return _get_td_vm_call_info(regs)
        case SubFunction.GetQuote:
            return _get_quote(host, regs.r12, regs.r13)
        case SubFunction.ReportFatalError:
            return VmCallStatus.SUCCESS
        case SubFunction.SetupEventNotifyInterrupt:
            return _setup_event_notify_interrupt(host.vmcalls, regs.r12)
        case SubFunction.RequestMMIO if not _is_shared(host, regs.r14, regs.r12):
            return VmCallStatus.INVALID_OPERAND
    status_of_instruction = host.instructions.answer(regs)
    return VmCallStatus.SUBFUNC_UNSUPPORTED if status_of_instruction is None else status_of_instruction


def _map_gpa(host: VmCallHost, gpa: int, size: int) -> tuple[VmCallStatus, int]:
    """MapGPA: status and the GPA at which it stopped. It changes the host's view only; it accepts nothing."""
    start = gpa & ~host.shared_mask
    end = start + size
    if not host.vmcalls.map_gpa:
        return VmCallStatus.SUBFUNC_UNSUPPORTED, gpa
    if size == 0 or end > host.shared_mask:
        return VmCallStatus.INVALID_OPERAND, gpa
    if gpa % PAGE_SIZE or size % PAGE_SIZE:
        return VmCallStatus.ALIGN_ERROR, gpa
    status, stop = _how_far(host.vmcalls, start, end, gpa & host.shared_mask)
    if gpa & host.shared_mask:
        host.shared.add(start, stop)
    else:
        host.shared.remove(start, stop)
        host.shared_mapped.remove(start, stop)
        host.sept.revoke(start | host.shared_mask, stop | host.shared_mask)
    return status, stop | gpa & host.shared_mask if status else 0


def _how_far(policy: VmCallPolicy, start: int, end: int, shared: int) -> tuple[VmCallStatus, int]:
    """Status of a MapGPA of ``[start, end)`` and where it stops. ``shared`` is the shared bit, if it is set."""
    status, stop = VmCallStatus.SUCCESS, end
    bad = next(iter(policy.refused.within(start, end)), None)
    if bad is not None:  # the piece that holds it is refused as a whole
        status, stop = policy.refusal, bad.start - (bad.start - start) % MAP_GPA_PIECE
    if policy.has_event is not None:
        for at in range(start + MAP_GPA_PIECE, min(stop + 1, end), MAP_GPA_PIECE):
            if policy.has_event(at | shared):
                return VmCallStatus.RETRY, at
    return status, stop


def _get_td_vm_call_info(regs: Registers) -> VmCallStatus:
    if regs.r12 > 1:
        return VmCallStatus.INVALID_OPERAND
    regs.r11 = _SETUP_EVENT_NOTIFY_INTERRUPT if regs.r12 else 0
    regs.r12 = regs.r13 = regs.r14 = 0
    return VmCallStatus.SUCCESS


def _get_quote(host: VmCallHost, gpa: int, size: int) -> VmCallStatus:
    """A reply in the guest's shared buffer, or none where nobody answers."""
    if not gpa & host.shared_mask:
        return VmCallStatus.INVALID_OPERAND
    if not host.vmcalls.quotes:
        return VmCallStatus.SUBFUNC_UNSUPPORTED
    start = gpa & ~host.shared_mask
    if gpa % PAGE_SIZE or size % PAGE_SIZE:
        return VmCallStatus.ALIGN_ERROR
    if size == 0 or not host.shared.covers(start, start + size):
        return VmCallStatus.INVALID_OPERAND
    version, _, in_len, _ = _QUOTE_HEADER.unpack(host.physical.read(gpa, _QUOTE_HEADER.size))
    if version != _QUOTE_VERSION or in_len > size - _QUOTE_HEADER.size:
        return VmCallStatus.INVALID_OPERAND
    host.physical.write(gpa, _QUOTE_HEADER.pack(version, 0, in_len, len(QUOTE)) + QUOTE)
    return VmCallStatus.SUCCESS


def _setup_event_notify_interrupt(policy: VmCallPolicy, vector: int) -> VmCallStatus:
    if vector not in _VECTORS:
        return VmCallStatus.INVALID_OPERAND
    policy.notify_vector = vector
    return VmCallStatus.SUCCESS


def _is_shared(host: VmCallHost, gpa: int, size: int) -> bool:
    """Whether the first and the last byte are shared; a size that is none is left to who does the access."""
    last = gpa + (size if size in (1, 2, 4, 8) else 1) - 1
    return bool(gpa & host.shared_mask and last & host.shared_mask)
