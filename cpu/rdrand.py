"""RDRAND and RDSEED that give the same numbers in every run.

Unicorn draws them from a GRand of GLib, one for each thread, which it seeds from the host when the thread first
needs it. Its pointer is the only thread-local variable of the library, so it is found without knowing the build,
and made to point to a generator of ours while an engine runs. GRand is MT19937, as Python's own generator is.
Sources: unicorn's qemu/util/guest-random.c and glib_compat/grand.c.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from random import Random
from typing import Any

from cpu.build import KNOWN_VERSION, EngineError

_MT19937_WORDS = 624
_PT_TLS = 7


class _DlPhdrInfo(ctypes.Structure):
    """struct dl_phdr_info of link.h."""

    _fields_ = (
        ("dlpi_addr", ctypes.c_uint64),
        ("dlpi_name", ctypes.c_char_p),
        ("dlpi_phdr", ctypes.c_void_p),
        ("dlpi_phnum", ctypes.c_uint16),
        ("dlpi_adds", ctypes.c_uint64),
        ("dlpi_subs", ctypes.c_uint64),
        ("dlpi_tls_modid", ctypes.c_size_t),
        ("dlpi_tls_data", ctypes.c_void_p),
    )


_ITERATE_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_DlPhdrInfo), ctypes.c_size_t, ctypes.c_void_p)


class _ElfPhdr(ctypes.Structure):
    """Elf64_Phdr of elf.h."""

    _fields_ = (
        ("p_type", ctypes.c_uint32),
        ("p_flags", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_align")),
    )


class _TlsIndex(ctypes.Structure):
    """tls_index of the x86-64 ABI: a module, and the offset of a variable in its block."""

    _fields_ = (("ti_module", ctypes.c_size_t), ("ti_offset", ctypes.c_size_t))


class RandomNumbers:
    """What RDRAND and RDSEED draw from inside of ``with``; it goes on from there in the next one."""

    def __init__(self, seed: int) -> None:
        _, state, _ = Random(seed).getstate()
        self._grand = (ctypes.c_uint32 * (_MT19937_WORDS + 1))(*state)
        self._module = _tls_module()
        self._outer: int | None = None

    def __enter__(self) -> None:
        variable = self._thread_rand()
        self._outer, variable.value = variable.value, ctypes.addressof(self._grand)

    def __exit__(self, *_: object) -> None:
        self._thread_rand().value = self._outer

    def _thread_rand(self) -> ctypes.c_void_p:
        """The variable, of the thread that asks."""
        address = _c_function("__tls_get_addr")(ctypes.byref(_TlsIndex(self._module, 0)))
        return ctypes.c_void_p.from_address(address)


def first_number(seed: int) -> int:
    """What the first RDRAND of 64 bits gives: two draws of 32 bits, the lower half first."""
    return Random(seed).getrandbits(64)


@lru_cache(maxsize=1)
def _tls_module() -> int:
    """Number of Unicorn's library among those with thread-local variables. It must have a single pointer."""
    from unicorn.unicorn_py3.unicorn import uclib

    found: list[tuple[int, list[int]]] = []

    def look(info: Any, size: int, _: object) -> int:
        library = info.contents
        if library.dlpi_name == uclib._name.encode():
            headers = (_ElfPhdr * library.dlpi_phnum).from_address(library.dlpi_phdr)
            found.append((library.dlpi_tls_modid, [each.p_memsz for each in headers if each.p_type == _PT_TLS]))
        return 0

    _c_function("dl_iterate_phdr")(_ITERATE_CALLBACK(look), None)
    if [sizes for _, sizes in found] != [[ctypes.sizeof(ctypes.c_void_p)]]:
        raise EngineError(f"unicorn: {found} is not the one thread-local pointer of {KNOWN_VERSION}, for RDRAND")
    return found[0][0]


@lru_cache(maxsize=2)
def _c_function(name: str) -> Any:
    try:
        function = ctypes.CDLL(None)[name]
    except AttributeError as error:
        raise EngineError(f"running machine code needs Linux: this C library has no {name}()") from error
    function.restype = ctypes.c_void_p
    return function
