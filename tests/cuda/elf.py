"""What a cubin says of itself: the parts of its ELF file that the launcher depends on."""

import struct
from collections.abc import Iterator

_NO_BITS = 8  # a section without bytes in the file


def sections(elf: bytes) -> dict[str, bytes]:
    """Name -> content of a 64-bit little-endian ELF file."""
    return {
        name: b"" if kind == _NO_BITS else elf[start : start + length]
        for name, kind, start, length in _headers(elf)
    }


def section_sizes(elf: bytes) -> dict[str, int]:
    """Name -> bytes in memory, also of sections that have none in the file."""
    return {name: length for name, _, _, length in _headers(elf)}


def _headers(elf: bytes) -> Iterator[tuple[str, int, int, int]]:
    """Name, type, offset and size of every section."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", elf, offset + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, start, length, *_ in headers:
        end = elf.index(b"\0", names + name)
        yield elf[names + name : end].decode(), kind, start, length


def attributes(info: bytes, number: int) -> list[bytes]:
    """The contents of every attribute of that number in an .nv.info section."""
    found, position = [], 0
    while position < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, position)
        if (kind, attribute) == (4, number):
            found.append(info[position + 4 : position + 4 + size])
        position += 4 + (size if kind == 4 else 0)
    return found


def parameter_table(elf: bytes, *, entry: str) -> list[tuple[int, int, int]]:
    """(ordinal, offset, size) of every parameter, from EIATTR_KPARAM_INFO (0x17)."""
    info = sections(elf)[f".nv.info.{entry}"]
    unpacked = [struct.unpack("<IHHI", found) for found in attributes(info, 0x17)]
    return sorted((ordinal, offset, packed >> 18) for _, ordinal, offset, packed in unpacked)
