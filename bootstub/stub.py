"""The EFI stub at work: what it knows, and the steps that its two generations share.

Sources: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_convert_cmdline() and efi_load_initrd(); secureboot.c.
"""

from __future__ import annotations

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.efi_call import EfiCalls, EfiError
from bootstub.exit_boot import ExitBoot
from bootstub.protocol import Protocol
from bootstub.stub_options import StubOptions, parse_options
from firmware.efi_types import (
    EFI_GLOBAL_VARIABLE_GUID,
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    EFI_SHIM_LOCK_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    EfiStatus,
    guid_bytes,
)
from firmware.tables import EFI_LOAD_FILE2_PROTOCOL, EFI_LOADED_IMAGE_PROTOCOL
from firmware.variables import VariableAttribute
from guest.machine import Machine
from guest.records import GuestRecord
from tdx.guest import PlatformAccept

COMMAND_LINE_SIZE = 2048
EFI_SECURE_BOOT_UNKNOWN, EFI_SECURE_BOOT_DISABLED, EFI_SECURE_BOOT_ENABLED = 1, 2, 3

_MAX_LOAD_OPTIONS = 1 << 20
_END_OF_DEVICE_PATH = b"\x7f\xff\x04\x00"
_INITRD_PATH = b"\x04\x03\x14\x00" + guid_bytes(LINUX_EFI_INITRD_MEDIA_GUID) + _END_OF_DEVICE_PATH


class Stub:
    """A stub that was entered with ``image_handle``: its image, and boot_params in a zeroed page of its own."""

    def __init__(self, machine: Machine, efi: EfiCalls, image_handle: int, protocol: Protocol) -> None:
        self.machine, self.memory, self.efi, self.handle, self.protocol = (
            machine, machine.memory, efi, image_handle, protocol,
        )  # fmt: skip
        interface = efi.handle_protocol(image_handle, EFI_LOADED_IMAGE_PROTOCOL_GUID)
        self.image = GuestRecord(machine.memory, interface, EFI_LOADED_IMAGE_PROTOCOL)
        gpa = efi.allocate_pages(BOOT_PARAMS_SIZE)
        machine.memory.clear(gpa, gpa + BOOT_PARAMS_SIZE)
        self.params = GuestRecord(machine.memory, gpa, BOOT_PARAMS)
        self.options = StubOptions()

    def info(self, text: str) -> None:
        """efi_info(): a line on the console, unless ``quiet`` was asked for."""
        if not self.options.quiet:
            self.efi.print(text)

    def convert_command_line(self) -> int:
        """efi_convert_cmdline(): load options from UTF-16 to UTF-8, up to a NUL or a line end; returns the length.

        A line of 2048 bytes or more is cut at its last white space outside quotes.
        """
        size = min(self.image["LoadOptionsSize"], _MAX_LOAD_OPTIONS)
        options = self.memory.read(self.image["LoadOptions"], size // 2 * 2) if size else b""
        text = options.decode("utf-16-le", errors="replace").split("\0")[0].split("\n")[0]
        line = text.encode()
        if len(line) >= COMMAND_LINE_SIZE:
            line = line[: _last_space(line[:COMMAND_LINE_SIZE])]
            self.efi.print_error(f"Command line is too long: truncated to {len(line)} bytes")
        at = self.efi.allocate_pool(len(line) + 1)
        self.memory.write(at, line + b"\0")
        self.params["hdr.cmd_line_ptr"] = at & 0xFFFF_FFFF
        self.params["ext_cmd_line_ptr"] = at >> 32
        self.options = parse_options(line.decode(errors="replace"))
        return len(line)

    def load_initrd(self) -> None:
        """efi_load_initrd_dev_path(): the initrd by LoadFile2 on Linux's initrd media path; none is no error."""
        found = self._initrd_protocol()
        if found is None:
            return
        load_file, path = found
        args = (load_file.gpa, path, 0, self.efi.slot(1, 0))
        status = self.machine.call(load_file["LoadFile"], *args, 0)
        if status != EfiStatus.EFI_BUFFER_TOO_SMALL:
            raise EfiError(status)
        size = self.efi.load(1)
        at = self.efi.allocate_pages(size)
        status = self.machine.call(load_file["LoadFile"], *args, at)
        if status != EfiStatus.EFI_SUCCESS:
            raise EfiError(status)
        self.info("Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path")
        for name, value in (("image", at), ("size", size)):
            self.params[f"hdr.ramdisk_{name}"] = value & 0xFFFF_FFFF
            self.params[f"ext_ramdisk_{name}"] = value >> 32

    def secure_boot(self) -> int:
        """efi_get_secureboot(): by SecureBoot and SetupMode, and shim's MokSBStateRT, which can switch it off.

        MokSBStateRT counts only if it is volatile: nobody but shim can have written it then.
        """
        status, secure_boot = self.efi.get_variable("SecureBoot", EFI_GLOBAL_VARIABLE_GUID)
        if status == EfiStatus.EFI_NOT_FOUND:
            return EFI_SECURE_BOOT_DISABLED
        if status != EfiStatus.EFI_SUCCESS:
            self.efi.print_error("Could not determine UEFI Secure Boot status.")
            return EFI_SECURE_BOOT_UNKNOWN
        status, setup_mode = self.efi.get_variable("SetupMode", EFI_GLOBAL_VARIABLE_GUID)
        if secure_boot == 0 or (status == EfiStatus.EFI_SUCCESS and setup_mode == 1):
            return EFI_SECURE_BOOT_DISABLED
        status, insecure = self.efi.get_variable("MokSBStateRT", EFI_SHIM_LOCK_GUID, attributes=True)
        volatile = not self.efi.load(3) & VariableAttribute.EFI_VARIABLE_NON_VOLATILE
        if status == EfiStatus.EFI_SUCCESS and volatile and insecure == 1:
            return EFI_SECURE_BOOT_DISABLED
        self.info("UEFI Secure Boot is enabled.")
        return EFI_SECURE_BOOT_ENABLED

    def exit_boot(self) -> None:
        """exit_boot(): boot services end, and boot_params gets its e820 table. Raises ``EfiError``."""
        accept = PlatformAccept(self.machine, self.protocol.accept)
        exit_boot = ExitBoot(self.machine, self.efi, self.params.gpa, accept, self.protocol, self.options.soft_reserve)
        status = exit_boot.run(self.handle)
        if status != EfiStatus.EFI_SUCCESS:
            raise EfiError(status)

    def _initrd_protocol(self) -> tuple[GuestRecord, int] | None:
        """The LoadFile2 protocol of the initrd and the rest of its device path, or None."""
        path = self.efi.bytes_at_scratch(_INITRD_PATH)
        guid = self.efi.bytes_at_scratch(guid_bytes(EFI_LOAD_FILE2_PROTOCOL_GUID), behind=len(_INITRD_PATH))
        path_at, device = self.efi.slot(1, path), self.efi.slot(2)
        if self.efi.boot("LocateDevicePath", guid, path_at, device) != EfiStatus.EFI_SUCCESS:
            return None
        rest, handle = self.efi.load(1), self.efi.load(2)
        interface = self.efi.handle_protocol(handle, EFI_LOAD_FILE2_PROTOCOL_GUID)
        return GuestRecord(self.memory, interface, EFI_LOAD_FILE2_PROTOCOL), rest


def _last_space(line: bytes) -> int:
    """Offset of the last white space outside double quotes; 0 if there is none."""
    last, quoted = 0, False
    for at, byte in enumerate(line):
        quoted ^= byte == ord('"')
        if not quoted and byte in b" \t\v\f\r":
            last = at
    return last
