"""The EFI stub at work: what it knows, and the steps that its two generations share.

Sources: drivers/firmware/efi/libstub/efi-stub-helper.c, efi_convert_cmdline() and efi_load_initrd(); secureboot.c.
"""

from __future__ import annotations

import struct

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.cmdline_files import CmdlineFiles
from bootstub.efi_call import ULONG_MAX, EfiCalls, EfiError
from bootstub.exit_boot import ExitBoot
from bootstub.load_options import command_line, optional_data
from bootstub.protocol import Protocol
from bootstub.stub_options import StubOptions, parse_options
from firmware.efi_types import (
    EFI_CC_MEASUREMENT_PROTOCOL_GUID,
    EFI_GLOBAL_VARIABLE_GUID,
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    EFI_SHIM_LOCK_GUID,
    EFI_TCG2_PROTOCOL_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    MEMORY_ONLY_RESET_CONTROL_GUID,
    EfiStatus,
    guid_bytes,
)
from firmware.tables import EFI_LOAD_FILE2_PROTOCOL, EFI_LOADED_IMAGE_PROTOCOL
from firmware.variables import DEFAULT_ATTRIBUTES, VariableAttribute
from guest.machine import Machine
from guest.records import GuestRecord
from tdx.guest import PlatformAccept

EFI_SECURE_BOOT_UNKNOWN, EFI_SECURE_BOOT_DISABLED, EFI_SECURE_BOOT_ENABLED = 1, 2, 3

_MAX_LOAD_OPTIONS = 1 << 20
_INITRD_TABLE = struct.Struct("<QQ")
"""struct linux_efi_initrd: base, size."""
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
        self._warned = False

    def convert_command_line(self) -> int:
        """efi_convert_cmdline(): load options in UTF-8, for boot_params; returns the length of the line."""
        if self.image["LoadOptionsSize"]:
            self.find_measurement()
        line, counted, cut = command_line(self.load_options())
        if cut:
            self.efi.error(f"Command line is too long: truncated to {counted} bytes")
        at = self.efi.allocate_pool(counted + 1)
        self.memory.write(at, line + b"\0")
        self.params["hdr.cmd_line_ptr"] = at & 0xFFFF_FFFF
        self.params["ext_cmd_line_ptr"] = at >> 32
        self.options = parse_options(line)
        return len(line)

    def load_options(self) -> bytes:
        """What the image was started with, without what a firmware put around it by mistake: of that it warns once."""
        size, at = min(self.image["LoadOptionsSize"], _MAX_LOAD_OPTIONS), self.image["LoadOptions"]
        options = self.memory.read(at, size) if at and size else b""
        found = optional_data(options)
        if found is None:
            return options
        if not self._warned:
            self.efi.warn("[Firmware Bug]: LoadOptions is an EFI_LOAD_OPTION descriptor")
            self.efi.warn("[Firmware Bug]: Using OptionalData as a workaround")
        self._warned = True
        return found

    def load_initrd(self) -> None:
        """efi_load_initrd(): the initrd by LoadFile2, else by ``initrd=``; none is no error.

        The kernel finds it in boot_params, and in a configuration table. Raises ``EfiError``.
        """
        if self.options.noinitrd:
            return
        try:
            found = self._load_initrd_dev_path() or self._load_initrd_cmdline()
            if found is None:
                return
            table = self.efi.allocate_pool(_INITRD_TABLE.size)
            self.memory.write(table, _INITRD_TABLE.pack(*found))
            self.efi.install_configuration_table(LINUX_EFI_INITRD_MEDIA_GUID, table)
        except EfiError as error:
            self.efi.error(f"Failed to load initrd: {error}")
            raise
        for name, value in zip(("image", "size"), found, strict=True):
            if found[1]:
                self.params[f"hdr.ramdisk_{name}"] = value & 0xFFFF_FFFF
                self.params[f"ext_ramdisk_{name}"] = value >> 32

    def _load_initrd_dev_path(self) -> tuple[int, int] | None:
        """efi_load_initrd_dev_path(): address and size, None if nobody has an initrd on Linux's initrd media path."""
        found = self._initrd_protocol()
        if found is None:
            return None
        load_file, path = found
        args = (load_file.gpa, path, 0, self.efi.slot(1, 0))
        if self.machine.call(load_file["LoadFile"], *args, 0) != EfiStatus.EFI_BUFFER_TOO_SMALL:
            raise EfiError(EfiStatus.EFI_LOAD_ERROR)
        size = self.efi.load(1)
        at = self.efi.allocate_pages(size)
        if self.machine.call(load_file["LoadFile"], *args, at) != EfiStatus.EFI_SUCCESS:
            self.efi.free_pages(at, size)
            raise EfiError(EfiStatus.EFI_LOAD_ERROR)
        self.efi.info("Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path")
        if size:
            self.find_measurement()
        return at, self.efi.load(1)

    def _load_initrd_cmdline(self) -> tuple[int, int] | None:
        """efi_load_initrd_cmdline(): all files of ``initrd=`` in one piece, None without any or a file system."""
        files = CmdlineFiles(self.efi, self.image["DeviceHandle"], self.params["hdr.initrd_addr_max"])
        if self.options.nochunk:
            files.chunk = ULONG_MAX
        if not files.load(self.load_options(), "initrd="):
            return None
        self.efi.info("Loaded initrd from command line option")
        return files.at, files.size

    def find_measurement(self) -> None:
        """Look for somebody who measures: a TPM, or confidential computing's registers. This firmware has neither."""
        self.efi.locate_protocol(EFI_TCG2_PROTOCOL_GUID)
        if self.protocol.cc_measurement:
            self.efi.locate_protocol(EFI_CC_MEASUREMENT_PROTOCOL_GUID)

    def enable_reset_attack_mitigation(self) -> None:
        """efi_enable_reset_attack_mitigation(): a firmware that can wipes memory at the next start (tpm.c)."""
        name, vendor = "MemoryOverwriteRequestControl", MEMORY_ONLY_RESET_CONTROL_GUID
        status, _ = self.efi.get_variable(name, vendor, size=0)
        if status != EfiStatus.EFI_NOT_FOUND:
            self.efi.set_variable(name, vendor, DEFAULT_ATTRIBUTES, b"\1")

    def secure_boot(self) -> int:
        """efi_get_secureboot(): by SecureBoot and SetupMode, and shim's MokSBStateRT, which can switch it off.

        MokSBStateRT counts only if it is volatile: nobody but shim can have written it then.
        """
        status, secure_boot = self.efi.get_variable("SecureBoot", EFI_GLOBAL_VARIABLE_GUID)
        if status == EfiStatus.EFI_NOT_FOUND:
            return EFI_SECURE_BOOT_DISABLED
        if status != EfiStatus.EFI_SUCCESS:
            self.efi.error("Could not determine UEFI Secure Boot status.")
            return EFI_SECURE_BOOT_UNKNOWN
        status, setup_mode = self.efi.get_variable("SetupMode", EFI_GLOBAL_VARIABLE_GUID)
        if secure_boot == 0 or (status == EfiStatus.EFI_SUCCESS and setup_mode == 1):
            return EFI_SECURE_BOOT_DISABLED
        status, insecure = self.efi.get_variable("MokSBStateRT", EFI_SHIM_LOCK_GUID, attributes=True)
        volatile = not self.efi.load(3) & VariableAttribute.EFI_VARIABLE_NON_VOLATILE
        if status == EfiStatus.EFI_SUCCESS and volatile and insecure == 1:
            return EFI_SECURE_BOOT_DISABLED
        self.efi.info("UEFI Secure Boot is enabled.")
        return EFI_SECURE_BOOT_ENABLED

    def exit_boot(self) -> None:
        """exit_boot(): boot services end, and boot_params gets its e820 table. Raises ``EfiError``."""
        accept = PlatformAccept(self.machine, self.protocol.accept)
        options = self.options.soft_reserve, self.options.disable_pci_dma
        exit_boot = ExitBoot(self.machine, self.efi, self.params.gpa, accept, self.protocol, *options)
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
