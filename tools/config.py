"""What a boot can be told: the same options on the command line and in a TOML file.

``--config FILE.toml`` gives defaults; what stands on the command line wins. A key of the file is the option
without its dashes (``host-page-size = "4K"``), an option that can be repeated is an array; an unknown key is refused.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from guest.errors import FormatError
from tools.files import read_text
from tools.options import MAP_OPTIONS, OPTIONS
from tools.pipeline import REAL_KERNEL_CMDLINE, BootConfig, stages_of

if TYPE_CHECKING:
    from tools.kernel_image import KernelImage

_MAX_REAL_MEMORY = 1 << 38
_SOURCE = "unaccepted boot --help"
_RUNS_OF_REAL_STUB = ("stub", "kernel")
_OF_A_TD = {
    "faults": "fault", "efi_map": "efi-map", "run": "run", "accept": "accept-policy", "accept_cpus": "accept-cpus"
}  # fmt: skip
"""What only a TD has: fields, and their options."""


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
    return config_of_texts(texts | {name: text for name, text in given.items() if text is not None}, args.full)


def config_of_texts(texts: dict[str, Any], full: bool = False) -> BootConfig:
    """The boot that options' texts describe, by the options' names. Raises ``FormatError`` and ``OSError``."""
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
        fields["full"] = full
    _read_kernel(fields)
    numa = fields.pop("numa", None)
    config = BootConfig(**fields)
    if numa is not None:
        from tools.numa import numa_distances, numa_nodes

        nodes = numa_nodes(numa, config.machine.ram(config.memory))
        config = replace(config, nodes=nodes, distances=numa_distances(numa, nodes))
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
    """td-shim brings its own sections, has nothing of UEFI, knows no initrd, and hands over as v9 has it."""
    for name in ("efi-map", "firmware", "variable", "offer", "initrd", "run"):
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
    for name, option in _OF_A_TD.items():
        if name in fields and not fields.get("tdx", True):
            raise FormatError(
                "--platform none", found=f"--{option}", expected="none of that without a TD", source=_SOURCE
            )
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
