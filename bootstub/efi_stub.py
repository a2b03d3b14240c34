"""Stage ``efi-stub``: from the PE entry point to the decompressor's door.

The classic flow, which v9 builds on: boot_params from the image and the loaded image protocol, relocation,
initrd, ExitBootServices(); decompression comes later. Source: drivers/firmware/efi/libstub/x86-stub.c (6.3),
efi_pe_entry() and efi_main().
"""

from __future__ import annotations

from bootstub.boot_params import BOOT_PARAMS, BOOT_PARAMS_SIZE
from bootstub.efi_call import EfiCalls, EfiError
from bootstub.exit_boot import ExitBoot
from bootstub.protocol import Protocol
from bootstub.setup_header import BOOT_FLAG, EFI_STUB_LOADER, HEADER_MAGIC, SETUP_HEADER, SETUP_HEADER_OFFSET
from firmware.efi_types import (
    EFI_GLOBAL_VARIABLE_GUID,
    EFI_LOAD_FILE2_PROTOCOL_GUID,
    EFI_LOADED_IMAGE_PROTOCOL_GUID,
    LINUX_EFI_INITRD_MEDIA_GUID,
    EfiMemoryAttribute,
    EfiMemoryType,
    EfiStatus,
    guid_bytes,
)
from firmware.tables import EFI_LOAD_FILE2_PROTOCOL, EFI_LOADED_IMAGE_PROTOCOL
from guest.errors import FormatError
from guest.machine import Machine
from guest.records import GuestRecord, field_extents
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_16M, round_up
from tdx.guest import PlatformAccept

LOAD_PHYSICAL_ADDR = SZ_16M
"""CONFIG_PHYSICAL_START, aligned to CONFIG_PHYSICAL_ALIGN."""
COMMAND_LINE_SIZE = 2048
SECTOR = 512
STARTUP_64_OFFSET = 0x200
"""startup_64 lies this far behind startup_32, the start of the protected-mode code (boot.rst)."""
EFI_SECURE_BOOT_UNKNOWN, EFI_SECURE_BOOT_DISABLED, EFI_SECURE_BOOT_ENABLED = 1, 2, 3

_MAX_PHYSICAL = 1 << 46
_MAX_LOAD_OPTIONS = 1 << 20
_END_OF_DEVICE_PATH = b"\x7f\xff\x04\x00"
_INITRD_PATH = b"\x04\x03\x14\x00" + guid_bytes(LINUX_EFI_INITRD_MEDIA_GUID) + _END_OF_DEVICE_PATH


def efi_stub(machine: Machine, protocol: Protocol) -> None:
    """Run the stub: RCX = image handle, RDX = system table, RSP = stack.

    It leaves boot_params in RSI, startup_64 of the decompressor in RIP, and in RDX the distance from the start of
    the image's memory to startup_32: the variable ``image_offset`` that stub and decompressor share.
    """
    regs = machine.regs
    efi = EfiCalls(machine, regs.rdx)
    if not efi.valid():
        raise machine.panic("EFI stub: ERROR: bad system table signature")
    try:
        _Stub(machine, efi, regs.rcx, protocol).run()
    except EfiError as error:
        raise machine.panic(f"EFI stub: ERROR: failed, status {error}") from error


class _Stub:
    """The stub at work: what it found out so far."""

    def __init__(self, machine: Machine, efi: EfiCalls, image_handle: int, protocol: Protocol) -> None:
        self._machine, self._efi, self._handle, self._protocol = machine, efi, image_handle, protocol
        self._memory = machine.memory
        interface = efi.handle_protocol(image_handle, EFI_LOADED_IMAGE_PROTOCOL_GUID)
        self._image = GuestRecord(machine.memory, interface, EFI_LOADED_IMAGE_PROTOCOL)
        self._params = self._allocate_boot_params()
        self._soft_reserve = True

    def run(self) -> None:
        """efi_pe_entry() and efi_main()."""
        params, regs = self._params, self._machine.regs
        self._soft_reserve = "nosoftreserve" not in _efi_options(self._command_line())
        startup_32, image_offset = self._relocate()
        params["hdr.code32_start"] = startup_32 & 0xFFFF_FFFF
        self._load_initrd()
        params["secure_boot"] = self._secure_boot()
        accept = PlatformAccept(self._machine)
        exit_boot = ExitBoot(self._machine, self._efi, params.gpa, accept, self._protocol, self._soft_reserve)
        status = exit_boot.run(self._handle)
        if status != EfiStatus.EFI_SUCCESS:
            raise EfiError(status)
        regs.rsi, regs.rip, regs.rdx = params.gpa, startup_32 + STARTUP_64_OFFSET, image_offset

    def _allocate_boot_params(self) -> GuestRecord:
        """A zeroed page with the image's setup header, from ``jump`` on, and what the stub fills in itself.

        Initrd and setup_data of the image's own header are dropped: they were meant for another boot loader.
        """
        gpa = self._efi.allocate_pages(BOOT_PARAMS_SIZE)
        self._memory.clear(gpa, gpa + BOOT_PARAMS_SIZE)
        offset, _ = field_extents(BOOT_PARAMS)["hdr.jump"]
        size = SETUP_HEADER_OFFSET + SETUP_HEADER.sizeof() - offset
        header = self._memory.read(self._image["ImageBase"] + offset, size)
        self._memory.write(gpa + offset, header)
        params = GuestRecord(self._memory, gpa, BOOT_PARAMS)
        if params["hdr.header"] != HEADER_MAGIC:
            raise FormatError(
                "setup_header.header", at=self._image["ImageBase"] + 0x202, found=f"{params['hdr.header']:#x}",
                expected="HdrS", source="Documentation/arch/x86/boot.rst",
            )  # fmt: skip
        params["hdr.root_flags"] = 1
        params["hdr.vid_mode"] = 0xFFFF
        params["hdr.boot_flag"] = BOOT_FLAG
        params["hdr.type_of_loader"] = EFI_STUB_LOADER
        for name in ("ramdisk_image", "ramdisk_size", "setup_data"):
            params[f"hdr.{name}"] = 0
        return params

    def _command_line(self) -> str:
        """efi_convert_cmdline(): load options from UTF-16 to UTF-8, up to a NUL or a line end.

        A line of 2048 bytes or more is cut at its last white space outside quotes.
        """
        size = min(self._image["LoadOptionsSize"], _MAX_LOAD_OPTIONS)
        options = self._memory.read(self._image["LoadOptions"], size // 2 * 2) if size else b""
        text = options.decode("utf-16-le", errors="replace").split("\0")[0].split("\n")[0]
        line = text.encode()
        if len(line) >= COMMAND_LINE_SIZE:
            line = line[: _last_space(line[:COMMAND_LINE_SIZE])]
            self._machine.print(f"EFI stub: ERROR: Command line is too long: truncated to {len(line)} bytes")
        at = self._efi.allocate_pool(len(line) + 1)
        self._memory.write(at, line + b"\0")
        self._params["hdr.cmd_line_ptr"] = at & 0xFFFF_FFFF
        self._params["ext_cmd_line_ptr"] = at >> 32
        return line.decode(errors="replace")

    def _relocate(self) -> tuple[int, int]:
        """Address of startup_32 and its distance from the memory that the kernel can be unpacked into.

        The image is moved, as the kernel does, if it lies below LOAD_PHYSICAL_ADDR or ends above 64 TiB. It is
        moved also if its memory is smaller than ``init_size``: newer kernels declare only the size of their file,
        since they are unpacked elsewhere.
        """
        params, base, size = self._params, self._image["ImageBase"], self._image["ImageSize"]
        setup_size = (self._memory.read_uint(base + SETUP_HEADER_OFFSET, 1) + 1) * SECTOR
        if setup_size > size:
            raise FormatError(
                "setup_header.setup_sects", at=base + SETUP_HEADER_OFFSET, found=f"{setup_size} bytes of setup",
                expected=f"at most the image, {size} bytes", source="Documentation/arch/x86/boot.rst",
            )  # fmt: skip
        init_size = params["hdr.init_size"]
        if base >= LOAD_PHYSICAL_ADDR and base + size <= _MAX_PHYSICAL and size >= init_size:
            return base + setup_size, setup_size
        startup_32 = base + setup_size
        target = self._efi_relocate_kernel(init_size)
        self._memory.write(target, self._memory.read(startup_32, min(size - setup_size, init_size)))
        self._machine.note(f"kernel image moved from {startup_32:#x} to {target:#x}, {init_size:#x} bytes")
        return target, 0

    def _efi_relocate_kernel(self, init_size: int) -> int:
        """Memory for the kernel: at its preferred address, else the lowest that is free above it."""
        preferred, align = self._params["hdr.pref_address"], self._params["hdr.kernel_alignment"]
        if self._efi.allocate_pages_at(preferred, init_size):
            return preferred
        memmap = self._efi.get_memory_map(self._protocol.efi_mmap_nr_slack_slots, EfiMemoryType.EfiLoaderData)
        descriptors = self._efi.descriptors(memmap)
        self._efi.free_pool(memmap.gpa)
        for d in sorted(descriptors, key=lambda d: d.start):
            start = round_up(max(d.start, LOAD_PHYSICAL_ADDR), max(align, PAGE_SIZE))
            soft_reserved = self._soft_reserve and d.attribute & EfiMemoryAttribute.EFI_MEMORY_SP
            if d.type != EfiMemoryType.EfiConventionalMemory or soft_reserved:
                continue
            if start + init_size > min(d.end, PHYSICAL_ADDRESS_END):
                continue
            if self._efi.allocate_pages_at(start, init_size):
                return start
        raise EfiError(EfiStatus.EFI_NOT_FOUND)

    def _load_initrd(self) -> None:
        """efi_load_initrd_dev_path(): the initrd by LoadFile2 on Linux's initrd media path; none is no error."""
        found = self._initrd_protocol()
        if found is None:
            return
        load_file, path = found
        args = (load_file.gpa, path, 0, self._efi.slot(1, 0))
        status = self._machine.call(load_file["LoadFile"], *args, 0)
        if status != EfiStatus.EFI_BUFFER_TOO_SMALL:
            raise EfiError(status)
        size = self._efi.load(1)
        at = self._efi.allocate_pages(size)
        status = self._machine.call(load_file["LoadFile"], *args, at)
        if status != EfiStatus.EFI_SUCCESS:
            raise EfiError(status)
        for name, value in (("image", at), ("size", size)):
            self._params[f"hdr.ramdisk_{name}"] = value & 0xFFFF_FFFF
            self._params[f"ext_ramdisk_{name}"] = value >> 32
        self._machine.print("EFI stub: Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path")

    def _initrd_protocol(self) -> tuple[GuestRecord, int] | None:
        """The LoadFile2 protocol of the initrd and the rest of its device path, or None."""
        path = self._efi.bytes_at_scratch(_INITRD_PATH)
        guid = self._efi.bytes_at_scratch(guid_bytes(EFI_LOAD_FILE2_PROTOCOL_GUID), behind=len(_INITRD_PATH))
        path_at, device = self._efi.slot(1, path), self._efi.slot(2)
        if self._efi.boot("LocateDevicePath", guid, path_at, device) != EfiStatus.EFI_SUCCESS:
            return None
        rest, handle = self._efi.load(1), self._efi.load(2)
        interface = self._efi.handle_protocol(handle, EFI_LOAD_FILE2_PROTOCOL_GUID)
        return GuestRecord(self._memory, interface, EFI_LOAD_FILE2_PROTOCOL), rest

    def _secure_boot(self) -> int:
        """efi_get_secureboot(): by the variables SecureBoot and SetupMode; a missing variable means disabled."""
        status, secure_boot = self._variable("SecureBoot")
        if status == EfiStatus.EFI_SUCCESS:
            status, setup_mode = self._variable("SetupMode")
        if status == EfiStatus.EFI_NOT_FOUND:
            return EFI_SECURE_BOOT_DISABLED
        if status != EfiStatus.EFI_SUCCESS:
            return EFI_SECURE_BOOT_UNKNOWN
        return EFI_SECURE_BOOT_ENABLED if secure_boot and not setup_mode else EFI_SECURE_BOOT_DISABLED

    def _variable(self, name: str) -> tuple[int, int]:
        """Status and value of a global variable of one byte."""
        text = (name + "\0").encode("utf-16-le")
        name_at = self._efi.bytes_at_scratch(text)
        vendor = self._efi.bytes_at_scratch(guid_bytes(EFI_GLOBAL_VARIABLE_GUID), behind=len(text))
        size, data = self._efi.slot(1, 1), self._efi.slot(2)
        return self._efi.runtime("GetVariable", name_at, vendor, 0, size, data), self._efi.load(2) & 0xFF


def _last_space(line: bytes) -> int:
    """Offset of the last white space outside double quotes; 0 if there is none."""
    last, quoted = 0, False
    for at, byte in enumerate(line):
        quoted ^= byte == ord('"')
        if not quoted and byte in b" \t\v\f\r":
            last = at
    return last


def _efi_options(line: str) -> set[str]:
    """The words of all ``efi=`` parameters of a command line (efi_parse_options())."""
    return {option for word in line.split() if word.startswith("efi=") for option in word[4:].split(",")}
