"""Linux's relocations: what a kernel's own decompressor does when it gives the kernel another virtual address (KASLR).

The table behind the unpacked ELF file is that of arch/x86/tools/relocs: words of 32 bits, lists that each begin with a zero. The
first names places that hold 64-bit addresses, the last places of 32-bit ones; kernels before 6.15 have a list between them of
32-bit places from which the shift is taken off. A place is named by its virtual address, sign-extended.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmapp.memory cimport GuestMemory


class RelocationError(ValueError):
    """A table that is none, or that names places outside of the kernel."""


cdef enum List:
    WORDS64
    INVERSE32
    WORDS32


def relocate(GuestMemory memory not None, bytes table not None, uint64_t shift, uint64_t gpa, uint64_t size,
             uint64_t virtual_address):
    """Moves the kernel that lies in [gpa, gpa + size), linked to run from `virtual_address`, by `shift` bytes (2^64 wraps).

    Raises RelocationError; then the kernel in memory is of no use.
    """
    cdef uint8_t* base = memory.translate(gpa, size)
    cdef uint64_t place, value64, start, i, count
    cdef uint32_t word, value32
    cdef int kind
    cdef const char* words = table
    if base == NULL or size < 8:
        raise RelocationError("the kernel does not lie in memory")
    for kind, start, count in lists_of(table):
        for i in range(start, start + count):
            memcpy(&word, words + 4 * i, 4)
            place = <uint64_t><int64_t><int32_t>word - virtual_address
            if place > size - (8 if kind == WORDS64 else 4):
                raise RelocationError(f"it names {<uint64_t><int64_t><int32_t>word:#x}, which is not in the kernel")
            if kind == WORDS64:
                memcpy(&value64, base + place, 8)
                value64 += shift
                memcpy(base + place, &value64, 8)
                continue
            memcpy(&value32, base + place, 4)
            value32 = value32 - <uint32_t>shift if kind == INVERSE32 else value32 + <uint32_t>shift
            memcpy(base + place, &value32, 4)


cdef list lists_of(bytes table):
    """[(what it names, index of its first word, words)]"""
    cdef uint64_t words = len(table) // 4, i
    cdef uint32_t word
    cdef const char* content = table
    if len(table) % 4 or not words:
        raise RelocationError(f"its size is odd ({len(table)} bytes)")
    zeroes = []
    for i in range(words):
        memcpy(&word, content + 4 * i, 4)
        if word == 0:
            zeroes.append(i)
            if len(zeroes) > 3:
                break
    if len(zeroes) not in (2, 3) or zeroes[0]:
        raise RelocationError("it is not made of two or three lists")
    kinds = [WORDS64, INVERSE32, WORDS32]
    if len(zeroes) == 2:
        kinds.remove(INVERSE32)
    ends = [*zeroes[1:], words]
    return [(kind, zero + 1, end - zero - 1) for kind, zero, end in zip(kinds, zeroes, ends)]
