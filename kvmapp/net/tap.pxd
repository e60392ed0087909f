from kvmapp.net.backend cimport FrameDescriptor


cdef class Tap(FrameDescriptor):
    cdef int attach(self, str name) except -1
    cdef int configure(self) except -1
