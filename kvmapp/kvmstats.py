"""What the kernel itself counts of a vCPU: KVM's binary statistics (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD), and its time.

    read_counters(fd) -> {"exits.sum": 1204, "blocking.cur": 0, ...}

The names are the kernel's, with virsh domstats' ending: sum for what only grows, cur for what is now, max for a peak.

A host without them (Linux before 5.14) has no such descriptor, and so no counters. Left out: histograms.
"""
from __future__ import annotations

import os
import struct

HEADER = struct.Struct("=6I")           # flags, name size, number of descriptors, offsets of the id, the descriptors, the data
DESCRIPTOR = struct.Struct("=IhHII")    # flags, exponent, size, offset, bucket size; then the name
TYPE_MASK = 0xF
ENDINGS = ("sum", "cur", "max")         # of the types 0, 1 and 2; those after them are histograms
BYTES_MOST = 1 << 20                    # of all; some 3,000 are usual


def read_counters(fd: int) -> dict[str, int]:
    """The single values behind a descriptor of KVM_GET_STATS_FD; {} for -1. Their units are in their names, as the kernel has them."""
    if fd < 0:
        return {}
    _, name_size, count, _, descriptors, data = HEADER.unpack(os.pread(fd, HEADER.size, 0))
    table = os.pread(fd, min(count * (DESCRIPTOR.size + name_size), BYTES_MOST), descriptors)
    values = os.pread(fd, BYTES_MOST, data)
    counters = {}
    for start in range(0, len(table) - DESCRIPTOR.size - name_size + 1, DESCRIPTOR.size + name_size):
        flags, _, size, offset, _ = DESCRIPTOR.unpack_from(table, start)
        if flags & TYPE_MASK < len(ENDINGS) and size == 1 and offset + 8 <= len(values):
            name = table[start + DESCRIPTOR.size:][:name_size].partition(b"\0")[0].decode()
            counters[f"{name}.{ENDINGS[flags & TYPE_MASK]}"] = int.from_bytes(values[offset:offset + 8], "little")
    return counters


def thread_time(number: int) -> int:
    """CPU time of one of our threads, ns (proc(5), schedstat)."""
    try:
        with open(f"/proc/self/task/{number}/schedstat") as file:
            return int(file.read().split()[0])
    except OSError:
        return 0
