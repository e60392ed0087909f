"""The checksum of IP, TCP, UDP and ICMP (RFC 1071)."""
import struct


def total(data):
    """The sum before it is turned: 0xFFFF of what bears its right checksum already."""
    words = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while words >> 16:
        words = (words & 0xFFFF) + (words >> 16)
    return words


def checksum(data):
    return ~total(data) & 0xFFFF
