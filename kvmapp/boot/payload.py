"""What a bzImage carries: the kernel proper, compressed, with a table of relocations behind it.

Follows Documentation/arch/x86/boot.rst (payload_offset, payload_length) for where it is, and each compressor's own format for the
rest. Leaves out: LZO, which no distribution chose; such a kernel unpacks itself in the guest.
"""
from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LZ4_MAGIC = b"\x02\x21\x4c\x18"                                  # the "legacy" frame: blocks of 8 MiB, each behind its size
LZ4_BLOCK = 8 << 20
MEMORY_MOST = 256 << 20                                          # bytes that a decompressor may take for itself


class PayloadError(ValueError):
    """The payload is damaged, or packed in a way that is not known here."""


def unpack(data: bytes, most: int) -> bytes:
    """The payload `data`, unpacked; `most` bytes at the most. Raises PayloadError."""
    for magic, work in FORMATS.items():
        if data.startswith(magic):
            try:
                return work(data, most)
            except (OSError, ValueError, EOFError, MemoryError, RuntimeError, ImportError) as failure:
                raise PayloadError(str(failure)) from failure
            except Exception as failure:                         # zlib.error, lzma.LZMAError and the like have no common name
                raise PayloadError(f"{type(failure).__name__}: {failure}") from failure
    raise PayloadError("it is packed in a way that is not known")


def is_known(head: bytes) -> bool:
    """Whether a payload that begins like this can be unpacked here."""
    return head.startswith(tuple(FORMATS))


def _gzip(data: bytes, most: int) -> bytes:
    import zlib
    return _whole(zlib.decompressobj(16 + zlib.MAX_WBITS), data, most)


def _xz(data: bytes, most: int) -> bytes:
    import lzma
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY_MOST), data, most)


def _lzma(data: bytes, most: int) -> bytes:
    import lzma
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_ALONE, MEMORY_MOST), data, most)


def _bzip2(data: bytes, most: int) -> bytes:
    import bz2
    return _whole(bz2.BZ2Decompressor(), data, most)


def _zstd(data: bytes, most: int) -> bytes:
    from backports import zstd
    return _whole(zstd.ZstdDecompressor(), data, most)


def _whole(decompressor, data: bytes, most: int) -> bytes:
    """Kernel builds append the unpacked size to all but gzip; what follows the packed stream is therefore left alone."""
    unpacked = decompressor.decompress(data, most)
    if not decompressor.eof:
        raise PayloadError("the packed kernel is cut short, or larger than its header says")
    return unpacked


def _lz4(data: bytes, most: int) -> bytes:
    from lz4.block import decompress
    parts, at, size = [], len(LZ4_MAGIC), 0
    while at + 4 < len(data):                                    # the last four bytes are the unpacked size
        length = int.from_bytes(data[at:at + 4], "little")
        at += 4
        if length > len(data) - at:
            raise PayloadError("the packed kernel is cut short")
        parts.append(decompress(data[at:at + length], uncompressed_size=LZ4_BLOCK))
        at += length
        size += len(parts[-1])
        if size > most:
            raise PayloadError("the kernel is larger than its header says")
    return b"".join(parts)


FORMATS: dict[bytes, Callable[[bytes, int], bytes]] = {
    b"\x1f\x8b": _gzip, b"\xfd7zXZ\0": _xz, b"\x5d\0\0": _lzma, b"BZh": _bzip2, LZ4_MAGIC: _lz4, b"\x28\xb5\x2f\xfd": _zstd}
