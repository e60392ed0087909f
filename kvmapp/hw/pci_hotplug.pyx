"""Cards that come and go while the guest runs: the registers behind the DSDT's slots (ACPI 6.5, 5.6.6 and 6.3.3; the design is ours).

Three dwords, a bit a slot. +0 INSERTED: a new card stands in the slot. +4 ASKED: the host wants the card back. A one written to either
clears the bit. +8 EJECT, write only: the guest has let go of the card. Either news raises general-purpose event EVENT, whose method
notifies the slots. Only what was asked for is ejected; the control thread then takes it out, woken by `fd`.
Left out: cards in functions other than 0, buses behind bridges, power control, latches.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi cimport posix
from kvmapp.abi.posix cimport EFD_CLOEXEC, EFD_NONBLOCK, close, errno, eventfd, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport Device

import os

from kvmapp.layout import ACPI_HOTPLUG_EVENT
from kvmapp.state import StateReader

cdef enum:
    INSERTED = 0
    ASKED = 4
    EJECT = 8
    SLOTS = 32
    ALL_SLOTS = 0xFFFFFFFE           # slot 0 is the host bridge's

cdef struct PciHotplugState:
    uint32_t inserted
    uint32_t asked
    uint32_t wanted                  # asked for and not yet ejected, whether the guest has looked or not
    uint32_t ejected                 # let go of by the guest, not yet taken out


cdef class PciHotplug(Device):
    """`acpi_pm` raises the event."""
    cdef PciHotplugState state
    cdef object acpi_pm
    cdef readonly int fd             # readable when the guest has let go of a card

    def __cinit__(self, str name not None, acpi_pm not None):
        self.rename(name)
        self.width = 4
        self.acpi_pm = acpi_pm
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def insert(self, uint32_t slot):
        """Tells the guest of the card that was just put into the slot."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.state.inserted |= bit(slot)
            pthread_mutex_unlock(&self.lock)
        self.acpi_pm.raise_event(ACPI_HOTPLUG_EVENT)

    def ask(self, uint32_t slot):
        """Asks the guest for the card; asked again, it is reminded."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.state.asked |= bit(slot)
            self.state.wanted |= bit(slot)
            pthread_mutex_unlock(&self.lock)
        self.acpi_pm.raise_event(ACPI_HOTPLUG_EVENT)

    def take_ejected(self):
        """[slot] of the cards that the guest has let go of since the last call."""
        cdef uint64_t count
        cdef uint32_t ejected
        posix.read(self.fd, &count, sizeof(count))
        with nogil:
            pthread_mutex_lock(&self.lock)
            ejected = self.state.ejected
            self.state.ejected = 0
            pthread_mutex_unlock(&self.lock)
        return [slot for slot in range(SLOTS) if ejected >> slot & 1]

    def wanted(self):
        """[slot] of the cards that the guest was asked for and still has."""
        return [slot for slot in range(SLOTS) if self.state.wanted >> slot & 1]

    def forget(self, uint32_t slot):
        """The slot is empty now: news of its old card are void."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.state.inserted &= ~bit(slot)
            self.state.asked &= ~bit(slot)
            self.state.wanted &= ~bit(slot)
            self.state.ejected &= ~bit(slot)
            pthread_mutex_unlock(&self.lock)

    def reset(self):
        """A guest that starts finds all cards by itself."""
        self.state.inserted = self.state.asked = self.state.wanted = self.state.ejected = 0

    def save(self):
        return {"version": 1, "inserted": self.state.inserted, "asked": self.state.asked, "wanted": self.state.wanted,
                "ejected": self.state.ejected}

    def restore(self, dict saved not None):
        cdef PciHotplugState state
        reader = StateReader(self.name, saved, version=1)
        state.inserted = reader.bits("inserted", <uint32_t>ALL_SLOTS)
        state.asked = reader.bits("asked", <uint32_t>ALL_SLOTS)
        state.wanted = reader.bits("wanted", <uint32_t>ALL_SLOTS)
        state.ejected = reader.bits("ejected", <uint32_t>ALL_SLOTS)
        reader.done()
        self.state = state
        if state.ejected:
            self.wake()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t value = 0
        if offset & ~<uint64_t>3 == INSERTED:
            value = self.state.inserted
        elif offset & ~<uint64_t>3 == ASKED:
            value = self.state.asked
        return value >> 8 * (offset & 3)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t bits = <uint32_t>(value << 8 * (offset & 3))
        if offset & ~<uint64_t>3 == INSERTED:
            self.state.inserted &= ~bits
        elif offset & ~<uint64_t>3 == ASKED:
            self.state.asked &= ~bits
        elif offset & ~<uint64_t>3 == EJECT:
            if bits & ~self.state.wanted:
                self.complain(b"ejects a card that it was not asked for, slots", bits)
            self.state.ejected |= bits & self.state.wanted
            self.state.wanted &= ~bits
            if self.state.ejected:
                self.wake()

    cdef void wake(self) noexcept nogil:
        cdef uint64_t one = 1
        posix.write(self.fd, &one, sizeof(one))


cdef uint32_t bit(uint32_t slot) noexcept nogil:
    return <uint32_t>1 << (slot & (SLOTS - 1)) & <uint32_t>ALL_SLOTS
