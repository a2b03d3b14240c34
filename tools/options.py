"""Every option of a boot: its name, its help, and how its text is read. All of them are in the table ``OPTIONS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from guest.errors import FormatError
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_2M, SZ_16M, memparse
from tdx.backing import MIXED
from tdx.faults import KINDS, Rule, parse_rule
from tools.files import read_file, read_text

DEFAULT_CMDLINE = "nokaslr efi=debug"
_MAX_MEMORY = 1 << 50
_MAX_RAM_BELOW_4G = range(SZ_16M, 0xE000_0000 + 1, SZ_2M)
_MAX_TIMEOUT = 1 << 20
_MAX_STRIDE = 4096
_MAX_SEED = (1 << 64) - 1
_VE_NAMES = ("cpuid", "io", "msr", "hlt")
_SOURCE = "unaccepted boot --help"
_MAX_FAULTS = 1024
_MAX_ACCEPT_CPUS = 4096
_MAX_CPUS = 1024
_SANITIZE = ("error", "warn", "off")
_HOST_LEVELS = {"4K": 0, "2M": 1, "mixed": MIXED}
_HOST_BACKING = {"demand": False, "ahead": True}


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its name, what its value is called, its help, the field of ``BootConfig`` and how to read it.

    If it can be given more than once (``many``), ``read`` gets all its values. Options of one field add up.
    """

    name: str
    metavar: str
    help: str
    field: str
    read: Callable[[Any], Any]
    many: bool = False


def parse_memory(text: str) -> int:
    """A size of guest memory in bytes, with a suffix K, M, G or T: whole pages, up to 1 PiB."""
    size, rest = memparse(text)
    if rest or not 0 < size <= _MAX_MEMORY or size % PAGE_SIZE:
        raise FormatError("--memory", found=repr(text), expected="whole 4 KiB pages, such as 4G", source=_SOURCE)
    return size


def parse_machine(text: str) -> Any:
    """A machine in QEMU's words: ``q35``, or ``pc,max-ram-below-4g=3G``."""
    from tdx.machine_type import MACHINE_NAMES, MachineType

    name, comma, option = text.partition(",")
    key, _, value = option.partition("=")
    limit, rest = memparse(value)
    given = key == "max-ram-below-4g" and not rest and limit in _MAX_RAM_BELOW_4G
    if name not in MACHINE_NAMES or (comma and not given):
        expected = f"{' or '.join(MACHINE_NAMES)}, and perhaps max-ram-below-4g=SIZE, 16M to 3584M in steps of 2M"
        raise FormatError("--machine", found=repr(text[:60]), expected=expected, source="QEMU -machine")
    return MachineType(name, limit if comma else None)


def _numa(text: str) -> Any:
    from tools.numa import parse_numa

    return parse_numa(text)


def _choice(option: str, choices: dict[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in choices:
            raise FormatError(option, found=repr(text), expected=" or ".join(choices), source=_SOURCE)
        return choices[text]

    return read


def _firmware(path: str) -> Any:
    from firmware.tdvf import parse_tdvf

    return parse_tdvf(read_file(path))


def _accept_policy(text: str) -> Any:
    from firmware.accept_policy import ALL, BELOW_4G, AcceptPolicy

    policies = {"below-4g": BELOW_4G, "all": ALL}
    if text in policies:
        return policies[text]
    size, rest = memparse(text.removeprefix("size="))
    if not text.startswith("size=") or rest or not 0 < size <= _MAX_MEMORY or size % PAGE_SIZE:
        expected = "below-4g, all, or size=N in whole 4 KiB pages, such as size=512M"
        raise FormatError("--accept-policy", found=repr(text[:60]), expected=expected, source=_SOURCE)
    return AcceptPolicy(size=size)


def _accept_cpus(text: str) -> int:
    return _number("--accept-cpus", text, 1, _MAX_ACCEPT_CPUS)


def _kernel_config(path: str) -> str:
    from tools.kernel_image import read_config_text

    return read_config_text(path)


def _address(text: str) -> int:
    """An address of whole pages below 2^52, such as ``4G`` or ``0x100000000``."""
    address, rest = memparse(text)
    if rest or not text or address % PAGE_SIZE or address >= PHYSICAL_ADDRESS_END:
        expected = "an address of whole pages below 2^52"
        raise FormatError("--unaccepted-from", found=repr(text[:40]), expected=expected, source=_SOURCE)
    return address


def _boot_params(text: str) -> int | bytes:
    """Where boot_params is: an address in guest memory, if the text reads as a number; else a file of its own."""
    address, rest = memparse(text)
    return read_file(text) if rest or not text else address


def _stride(text: str) -> int:
    stride, rest = memparse(text)
    if rest or not text or stride > _MAX_STRIDE:
        raise FormatError("--stride", found=repr(text[:40]), expected=f"40 to {_MAX_STRIDE}", source="UEFI 2.10, 7.2.3")
    return stride


def _cmdline(text: str) -> str:
    """The command line; bytes of the shell's that are no UTF-8 reach Python as lone surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise FormatError("--cmdline", found=repr(text), expected="UTF-8", source=_SOURCE)
    return text


def _protocol(text: str) -> Any:
    from bootstub.protocol import PROTOCOLS

    return _choice("--protocol", dict(PROTOCOLS))(text)


def _profile(text: str) -> Any:
    from tools.pipeline import PROFILES

    return _choice("--profile", {name: name for name in PROFILES})(text)


def _run(text: str) -> Any:
    from tools.pipeline import RUNS

    return _choice("--run", {name: name for name in RUNS})(text)


def _ve(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(_VE_NAMES):
        raise FormatError("--ve", found=repr(text), expected=f"some of {','.join(_VE_NAMES)}", source=_SOURCE)
    return names


def _number(option: str, text: str, low: int, high: int) -> int:
    """A decimal number within limits, with no more digits than these have."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high):
        raise FormatError(option, found=repr(text[:80]), expected=f"a number from {low} to {high}", source=_SOURCE)
    return int(text)


def _timeout(text: str) -> int:
    return _number("--timeout", text, 1, _MAX_TIMEOUT) * 1_000_000


def _seed(text: str) -> int:
    return _number("--seed", text, 0, _MAX_SEED)


def _variables(texts: Iterable[str]) -> Any:
    from tools.variables import parse_variables

    return parse_variables(texts)


def _offers(text: str) -> tuple[str, ...]:
    from firmware.setup import OFFERS

    names = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(OFFERS):
        expected = f"some of {','.join(OFFERS)}, or none"
        raise FormatError("--offer", found=repr(text[:80]), expected=expected, source=_SOURCE)
    return names


def _script(path: str) -> Any:
    from kernel.runtime import parse_script

    return tuple(parse_script(read_text(path), path))


def _cpus(text: str) -> int:
    return _number("--cpus", text, 1, _MAX_CPUS)


def _knobs(texts: Iterable[str]) -> Any:
    """Protections of our kernel that are switched off or on: fields of ``KernelBuild``."""
    from kernel.build import KernelBuild

    names = {name.replace("_", "-"): name for name in KernelBuild.__slots__}
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or value not in ("on", "off"):
            expected = f"{', '.join(names)} with =on or =off"
            raise FormatError("--knob", found=repr(text[:60]), expected=expected, source=_SOURCE)
        found[names[name]] = value == "on"
    return KernelBuild(**found)


def _faults(texts: Iterable[str]) -> tuple[Rule, ...]:
    rules = tuple(map(parse_rule, texts))
    if len(rules) > _MAX_FAULTS:
        raise FormatError("--fault", found=f"{len(rules)} faults", expected=f"at most {_MAX_FAULTS}", source=_SOURCE)
    return rules


def _fault_script(path: str) -> tuple[Rule, ...]:
    """One rule a line; ``#`` starts a comment."""
    lines = (line.split("#")[0].strip() for line in read_text(path).splitlines())
    return _faults([line for line in lines if line])


MAP_OPTIONS = (
    Option(
        "unaccepted-from", "ADDRESS", "of a map: conventional memory from there on is unaccepted",
        "unaccepted_from", _address,
    ),
    Option("boot-params", "FILE|ADDRESS", "the map is in a file of guest memory", "boot_params", _boot_params),
    Option("stride", "N", "the map is raw EFI descriptors, N bytes each", "stride", _stride),
)  # fmt: skip
"""What a source of a memory map may need: fields of ``tools.maps.source.SourceOptions``."""

OPTIONS = (
    Option("memory", "SIZE", "guest memory, split as the machine splits it (default 4G)", "memory", parse_memory),
    Option("machine", "TYPE", "q35 (default) or pc; ,max-ram-below-4g=SIZE moves the split", "machine", parse_machine),
    Option(
        "numa", "NODES", "NUMA nodes: a number, or sizes (1G,3G); ,hotplug=SIZE adds a window, ,dist=21 and "
        ",dist=0-1:31 distances (SLIT)", "numa", _numa,
    ),
    Option("efi-map", "SOURCE", "memory map instead: all that `unaccepted map` reads", "efi_map", str),
    *MAP_OPTIONS,
    Option("firmware", "IMAGE", "image with TDX metadata (default: OVMF's sections)", "firmware", _firmware),
    Option("profile", "NAME", "how the firmware works: ovmf (default), or td-shim, without UEFI", "profile", _profile),
    Option(
        "accept-policy", "WHAT", "what the firmware accepts: below-4g (ovmf), all, or size=N (td-shim: 256M)",
        "accept", _accept_policy,
    ),
    Option("accept-cpus", "N", "processors that accept for the firmware (default 1)", "accept_cpus", _accept_cpus),
    Option("kernel", "FILE", "bzImage or bare vmlinux (default: a small one of our own)", "kernel", read_file),
    Option(
        "kernel-config", "FILE", "the kernel's configuration: does it know unaccepted memory? (default: what its image "
        "tells)", "kernel_config", _kernel_config,
    ),
    Option("initrd", "FILE", "initrd (default with --run kernel: one that touches memory)", "initrd", read_file),
    Option("cmdline", "TEXT", f"command line [hdr.cmd_line_ptr] (default: {DEFAULT_CMDLINE!r})", "cmdline", _cmdline),
    Option("protocol", "NAME", "version of the boot code: v9 (default) or mainline", "protocol", _protocol),
    Option(
        "variable", "NAME[-GUID][:ATTRIBUTES]=VALUE",
        "a variable of the firmware, can be repeated; VALUE: hexadecimal bytes, text:TEXT, utf16:TEXT or @FILE; "
        "ATTRIBUTES: some of nv,bs,rt; GUID and attributes of well-known variables, such as SecureBoot, are known",
        "variables", _variables, many=True,
    ),
    Option(
        "offer", "LIST",
        "protocols that the firmware offers: edkii-accept (default), sev-accept, rng, initrd-file (for "
        "initrd=initrd on the command line); or none",
        "offers", _offers,
    ),
    Option(
        "host-page-size", "SIZE", "largest page the host backs private memory with: 2M (default), 4K or mixed",
        "host_level", _choice("--host-page-size", _HOST_LEVELS),
    ),
    Option(
        "host-backing", "WHEN", "when the host backs private memory: on demand (default) or ahead",
        "host_ahead", _choice("--host-backing", _HOST_BACKING),
    ),
    Option("run", "DEPTH", "run the kernel image's own code: stub, decompressor or kernel", "run", _run),
    Option("ve", "LIST", "instructions that raise #VE in real code: cpuid,io,msr,hlt", "ve", _ve),
    Option("seed", "N", "seed of RDRAND, the start of the TSC and the firmware's generator (default 0)", "seed", _seed),
    Option("timeout", "N", "end real code after N million instructions", "timeout", _timeout),
    Option("script", "FILE", "commands of stage runtime; `--script help` lists them", "script", _script),
    Option("cpus", "N", "processors of the guest, which `on cpus` in a script uses (default 1)", "cpus", _cpus),
    Option(
        "platform", "NAME", "what the guest is: tdx (default), or none: no TD, all memory accepted", "tdx",
        _choice("--platform", {"tdx": True, "none": False}),
    ),
    Option(
        "knob", "NAME=off", "leave a protection out of our kernel, can be repeated: zeropad-guard, accept-exclusion, "
        "reader-filter, strict-devmem, ranges-in-flight, overlap-fix, early-accept; queued-spinlocks=on",
        "build", _knobs, many=True,
    ),
    Option(
        "fault", "KIND[:ARG][@WHEN,...]",
        f"a fault of the host, can be repeated; KIND: {', '.join(KINDS)}; WHEN: accept=N, mapgpa=N, tdvmcall=N, "
        "gpa=A-B, stage=NAME, p=P, seed=S, n=TIMES",
        "faults", _faults, many=True,
    ),
    Option("fault-script", "FILE", "faults, one a line", "faults", _fault_script),
    Option(
        "sanitize", "MODE", "a finding of the acceptance sanitizer ends the boot (error), is told (warn, default), off",
        "sanitize", _choice("--sanitize", {mode: mode for mode in _SANITIZE}),
    ),
)  # fmt: skip
