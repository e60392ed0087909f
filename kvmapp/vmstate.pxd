from libc.stdint cimport uint32_t, uint64_t


cpdef list msr_indexes(int kvm_fd)
cpdef dict save_vcpu(int fd, list indexes)
cpdef int restore_vcpu(int fd, dict state, uint64_t elapsed=*) except -1
cpdef int tell_stopped(int fd) except -1
cpdef uint32_t tsc_khz(int fd)
cpdef dict save_vm(int fd)
cpdef int restore_vm(int fd, dict state, uint64_t elapsed=*) except -1
