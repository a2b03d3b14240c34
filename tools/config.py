"""What a boot can be told: the same options on the command line and in a TOML file.

``--config FILE.toml`` gives defaults; what stands on the command line wins. A key of the file is the option
without its dashes (``host-page-size = "4K"``), an option that can be repeated is an array; an unknown key is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guest.errors import FormatError
from guest.units import PAGE_SIZE, PHYSICAL_ADDRESS_END, SZ_1G, SZ_2M, SZ_16M, memparse
from tdx.backing import MIXED
from tdx.faults import KINDS, Rule, parse_rule
from tools.pipeline import DEFAULT_CMDLINE, REAL_KERNEL_CMDLINE, BootConfig, stages_of

if TYPE_CHECKING:
    from tools.kernel_image import KernelImage

_MAX_FILE = SZ_1G
_MAX_MEMORY = 1 << 50
_MAX_RAM_BELOW_4G = range(SZ_16M, 0xE000_0000 + 1, SZ_2M)
_MAX_TIMEOUT = 1 << 20
_MAX_STRIDE = 4096
_MAX_SEED = (1 << 64) - 1
_VE_NAMES = ("cpuid", "io", "msr", "hlt")
_MAX_REAL_MEMORY = 1 << 38
_SOURCE = "unaccepted boot --help"
_MAX_FAULTS = 1024
_MAX_ACCEPT_CPUS = 4096
_MAX_CPUS = 1024
_RUNS_OF_REAL_STUB = ("stub", "kernel")
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


def file_path(path: str) -> Path:
    """The path, if it can be one."""
    if "\0" in path:
        raise FormatError(repr(path), found="a NUL character", expected="the name of a file", source=_SOURCE)
    return Path(path)


def read_file(path: str) -> bytes:
    """The bytes of a file, up to 1 GiB. ``OSError`` as it comes; a larger file is a ``FormatError``."""
    size = file_path(path).stat().st_size
    if size <= _MAX_FILE:
        with Path(path).open("rb") as file:  # a device has no size of its own
            data = file.read(_MAX_FILE + 1)
        if len(data) <= _MAX_FILE:
            return data
        size = len(data)
    raise FormatError(path, found=f"{size} bytes", expected=f"at most {_MAX_FILE}", source=_SOURCE)


def read_text(path: str) -> str:
    """The text of a file, as UTF-8; bytes that are none become replacement characters."""
    return read_file(path).decode("utf-8", errors="replace")


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
    Option("numa", "NODES", "NUMA nodes: a number, or sizes (1G,3G); ,hotplug=SIZE adds a window", "numa", _numa),
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
        "offer", "LIST", "protocols that the firmware offers: edkii-accept (default), sev-accept, rng; or none",
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
        "reader-filter, strict-devmem, ranges-in-flight, overlap-fix; queued-spinlocks=on", "build", _knobs, many=True,
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` every option of a boot, and ``--config``."""
    group = parser.add_argument_group("the guest")
    for option in OPTIONS:
        action = "append" if option.many else "store"
        group.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help, action=action)
    group.add_argument(
        "--full", action="store_true", help="with --run: run decompression and large memset() too, do not answer them"
    )  # fmt: skip
    group.add_argument("--config", metavar="FILE.toml", help="any of these options, by name, in TOML")


def boot_config(args: argparse.Namespace) -> BootConfig:
    """The boot that the arguments describe. Files are read here; raises ``FormatError`` and ``OSError``."""
    texts = _from_toml(args.config) if args.config is not None else {}
    given = {option.name: getattr(args, option.name.replace("-", "_")) for option in OPTIONS}
    texts |= {name: text for name, text in given.items() if text is not None}
    for name in ("memory", "machine", "numa", "accept-policy", "accept-cpus"):
        if name in texts and "efi-map" in texts:
            raise FormatError(f"--{name}", found="with --efi-map", expected="one of the two", source=_SOURCE)
    if texts.get("profile") == "td-shim":
        _check_td_shim(texts)
    fields = _read_options(texts)
    _read_map(fields)
    _check_platform(fields)
    if "run" in fields:
        _check_run(fields)
        fields["full"] = args.full
    _read_kernel(fields)
    numa = fields.pop("numa", None)
    config = BootConfig(**fields)
    if numa is not None:
        from tools.numa import numa_nodes

        config = replace(config, nodes=numa_nodes(numa, config.machine.ram(config.memory)))
    _check_stages(config)
    return config


def _read_options(texts: dict[str, Any]) -> dict[str, Any]:
    """The fields of what was given, by their names."""
    fields: dict[str, Any] = {}
    for option in OPTIONS:
        if option.name in texts:
            value = option.read(texts[option.name])
            fields[option.field] = fields[option.field] + value if option.field in fields else value
    return fields


def _check_stages(config: BootConfig) -> None:
    """A fault that waits for a stage waits for one of this boot."""
    stages = stages_of(config)
    for rule in config.faults:
        if rule.stage is not None and rule.stage not in stages:
            expected = ", ".join(stages)
            raise FormatError(f"fault {str(rule)!r}", found=f"stage={rule.stage}", expected=expected, source=_SOURCE)


def _check_td_shim(texts: dict[str, Any]) -> None:
    """td-shim brings its own sections, knows no EFI map and no initrd, and hands over as v9 has it."""
    for name in ("efi-map", "firmware", "initrd", "run"):
        if name in texts:
            raise FormatError(f"--{name}", found="with --profile td-shim", expected="one of the two", source=_SOURCE)
    if texts.get("protocol", "v9") != "v9":
        expected = "v9: boot_params+0x78 is its, and mainline finds its table by EFI"
        raise FormatError("--protocol", found="with --profile td-shim", expected=expected, source=_SOURCE)


def _read_map(fields: dict[str, Any]) -> None:
    """Put the map that was brought along in the place of its name."""
    given = {option.field: fields.pop(option.field) for option in MAP_OPTIONS if option.field in fields}
    if "efi_map" in fields:
        from tools.maps.source import SourceOptions, boot_descriptors, read_map
        from tools.numa import check_nodes

        platform = read_map(fields["efi_map"], SourceOptions(**given))
        fields["efi_map"] = boot_descriptors(platform)
        fields["nodes"] = check_nodes(platform.nodes, platform.name)
    elif given:
        name = next(iter(given)).replace("_", "-")
        raise FormatError(f"--{name}", found="no --efi-map", expected="a map to read", source=_SOURCE)


def _read_kernel(fields: dict[str, Any]) -> None:
    """Put the image that boots in the place of the kernel file, and our stub's support in that of the configuration.

    What a user would not expect of the file is told on standard error. Real code knows itself what it supports.
    """
    given = fields.pop("kernel_config", None)
    if "kernel" not in fields:
        from bootstub.sample_kernel import sample_bzimage

        fields["kernel"] = sample_bzimage()
        if given is None:
            return
    from tools.kernel_image import KernelImage

    image = KernelImage(fields["kernel"], given)
    run = fields.get("run")
    if run is not None and image.bzimage is None:
        raise FormatError("--run", found="a bare vmlinux", expected="a bzImage with code of its own", source=_SOURCE)
    fields["kernel"], note = image.bootable()
    notes = [note] if note is not None else []
    if run not in _RUNS_OF_REAL_STUB and (reason := _lacks_support(image)) is not None:
        from bootstub.protocol import V9

        fields["protocol"] = fields.get("protocol", V9).without_support()
        notes.append(f"the kernel does not know unaccepted memory and will lose it: {reason}")
    for line in notes:
        print(f"unaccepted: note: {line}", file=sys.stderr)


def _lacks_support(image: KernelImage) -> str | None:
    """What says that a kernel does not know unaccepted memory; None if it knows it, or nothing tells.

    A payload that does not unpack tells nothing here: the boot itself will come to it.
    """
    try:
        support = image.support
    except FormatError:
        if image.given_config is not None:
            raise
        return None
    return support.reason if support.known is False else None


def _check_run(fields: dict[str, Any]) -> None:
    """Real code needs a real kernel, and a console to print to; and its processor has 40 bits of address."""
    if "kernel" not in fields:
        raise FormatError("--run", found="no --kernel", expected="the bzImage to run", source=_SOURCE)
    if fields["run"] == "kernel":
        fields.setdefault("cmdline", REAL_KERNEL_CMDLINE)
        if "initrd" not in fields:
            from cpu.initrd import build_initrd

            fields["initrd"] = build_initrd()
    if fields.get("memory", 0) > _MAX_REAL_MEMORY:
        raise FormatError(
            "--memory", found=f"{fields['memory']} bytes", expected="at most 256G with --run", source=_SOURCE
        )


def _check_platform(fields: dict[str, Any]) -> None:
    """What needs a TD, and what needs our own kernel."""
    for name in ("faults", "efi_map", "run"):
        if name in fields and not fields.get("tdx", True):
            raise FormatError(
                "--platform none", found=f"--{name.replace('_', '-').removesuffix('s')}",
                expected="none of that without a TD", source=_SOURCE,
            )  # fmt: skip
    if fields.get("run") == "kernel" and fields.get("cpus", 1) > 1:
        raise FormatError("--cpus", found="--run kernel", expected="1 with real code", source=_SOURCE)


def _from_toml(path: str) -> dict[str, Any]:
    """Option texts by name from a TOML file."""
    import tomllib

    try:
        data = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError also for a number that Python will not read
        raise FormatError(path, found=str(error), expected="TOML", source="toml.io") from error
    known = {option.name: option for option in OPTIONS}
    for key, value in data.items():
        if key not in known:
            raise FormatError(path, found=f"key {key!r}", expected=", ".join(sorted(known)), source=_SOURCE)
        many = known[key].many
        strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not (strings if many else isinstance(value, str)):
            expected = "an array of strings" if many else "a string"
            raise FormatError(f"{path}, {key}", found=type(value).__name__, expected=expected, source=_SOURCE)
    return data
