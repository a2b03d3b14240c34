"""Stage ``efi-stub``: from the PE entry point of the kernel image to what runs when boot services are gone.

The classic flow, which v9 builds on, ends at the decompressor's door; since 6.6 the stub unpacks the kernel itself and
ends at the kernel's own. Source: drivers/firmware/efi/libstub/x86-stub.c.
"""

from __future__ import annotations

from bootstub.classic_stub import classic_stub
from bootstub.efi_call import EfiCalls, EfiError
from bootstub.mainline_stub import mainline_stub
from bootstub.protocol import Protocol
from bootstub.stub import Stub
from guest.machine import Machine


def efi_stub(machine: Machine, protocol: Protocol) -> None:
    """Run the stub: RCX = image handle, RDX = system table, RSP = stack.

    It leaves boot_params in RSI and its successor's entry point in RIP; see the two flows for what else.
    """
    regs = machine.regs
    efi = EfiCalls(machine, regs.rdx)
    if not efi.valid():
        raise machine.panic("EFI stub: ERROR: bad system table signature")
    try:
        stub = Stub(machine, efi, regs.rcx, protocol)
        if protocol.unpacks_in_stub:
            mainline_stub(stub)
        else:
            classic_stub(stub)
    except EfiError as error:
        raise machine.panic(f"EFI stub: ERROR: failed, status {error}") from error
