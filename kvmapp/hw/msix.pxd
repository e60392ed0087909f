from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.devices cimport Interrupts


cdef class MsixTable:
    cdef readonly uint32_t count
    cdef bint enabled
    cdef bint masked
    cdef uint32_t* entries           # four words a vector
    cdef uint32_t* pending           # a bit a vector
    cdef PyObject** lines            # borrowed from `owned`
    cdef list owned
    cdef Interrupts interrupts

    cdef uint64_t read(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef uint64_t read_pending(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef int write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef int control(self, bint enabled, bint masked) noexcept nogil
    cdef void signal(self, uint32_t vector) noexcept nogil
    cdef int open_fd(self, uint32_t vector) noexcept nogil
    cdef int update(self, uint32_t vector) noexcept nogil
