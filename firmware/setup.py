"""How a firmware is set up: variables, protocols beyond what every one has, and what it accepts itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from firmware.accept_policy import BELOW_4G, AcceptPolicy
from firmware.boot_services import EfiServices
from firmware.memory_accept import install_memory_accept, install_memory_acceptance
from firmware.rng import install_rng, seeded
from firmware.variables import Variable


@dataclass(frozen=True, slots=True)
class Setup:
    """``offers`` are keys of ``OFFERS``; ``seed`` decides what is random; ``accept_cpus`` processors accept memory."""

    variables: tuple[Variable, ...] = ()
    offers: tuple[str, ...] = ("edkii-accept",)
    seed: int = 0
    accept: AcceptPolicy = BELOW_4G
    accept_cpus: int = 1


DEFAULT_SETUP = Setup()

INITRD_FILE = "initrd-file"
"""The device that the kernel came from is a file system, with the initrd as ``initrd``, for a command line with
``initrd=initrd``; nobody offers the initrd by LoadFile2 then. It comes with the kernel's image."""
OFFERS: dict[str, Callable[[EfiServices, Setup], None]] = {
    "edkii-accept": lambda services, setup: install_memory_accept(services),
    "sev-accept": lambda services, setup: install_memory_acceptance(services),
    "rng": lambda services, setup: install_rng(services, seeded(setup.seed)),
    INITRD_FILE: lambda services, setup: None,
}
"""Protocols that a firmware may offer. OVMF has the first in a TD, the second under SEV-SNP, the third with a
virtio-rng device or, since 2024, RDRAND."""


def install_offers(services: EfiServices, setup: Setup) -> None:
    """Install the protocols that ``setup`` names."""
    for name in setup.offers:
        OFFERS[name](services, setup)
