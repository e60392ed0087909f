cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.abi.kvm cimport kvm_run
from kvmapp.abi.posix cimport pthread_cond_t, pthread_mutex_t, pthread_t
from kvmapp.coalesced cimport CoalescedRing
from kvmapp.devices cimport Bus, Power

cdef enum:
    EXIT_REASONS = 64                # counted apart; later ones are counted together

cdef enum Wanted:
    RUN
    PAUSE
    STOP


cdef class Gate:
    # What the threads are wanted to do, and how many vCPUs are in the guest; guarded by `lock`, announced by `changed`.
    cdef uint32_t wanted
    cdef uint32_t awake
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed

    cdef void want(self, uint32_t wanted) noexcept nogil
    cdef bint await_all(self) noexcept nogil


cdef class Vcpu:
    cdef readonly uint32_t index
    cdef readonly int fd
    cdef readonly int stats_fd       # of KVM's own counters (kvmstats.py); -1 where the host has none
    cdef object vm                   # whose memory and descriptors must outlive the thread
    cdef Gate gate
    cdef Bus pio
    cdef Bus mmio
    cdef Power power
    cdef CoalescedRing coalesced
    cdef kvm_run* shared
    cdef size_t shared_size          # bytes
    cdef pthread_t thread_id
    cdef bint running                # the thread exists; guarded by gate.lock
    cdef bint inside                 # counted in gate.awake; guarded by gate.lock
    cdef bint started                # thread_id is to be joined
    cdef int native                  # the kernel's number of the thread, 0 before it runs
    cdef uint64_t exits[EXIT_REASONS]
    cdef int failure                 # errno of a KVM_RUN that failed for good
    cdef readonly uint64_t first_entry, first_exit       # of the thread, CLOCK_MONOTONIC in ns; 0 before

    cdef void run(self) noexcept nogil
    cdef void loop(self) noexcept nogil
    cdef bint pass_gate(self) noexcept nogil
    cdef bint enter_first(self) noexcept nogil
    cdef void enter(self) noexcept nogil

    @cython.final
    cdef bint handle_exit(self, int result) noexcept nogil

    cdef void handle_io(self) noexcept nogil
    cdef void handle_mmio(self) noexcept nogil
    cdef void handle_rare(self, uint32_t reason) noexcept nogil
    cdef void kick(self) noexcept nogil


cdef object refused(str what)
