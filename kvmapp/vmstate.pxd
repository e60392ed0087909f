from libc.stdint cimport uint32_t, uint64_t


cpdef list msr_indexes(int kvm_fd)
cpdef dict save_vcpu(int fd, list indexes, uint64_t moment=*)
cpdef int restore_vcpu(int fd, dict state, uint64_t moment=*, uint64_t components=*) except -1
cpdef int tell_stopped(int fd) except -1
cpdef uint32_t tsc_khz(int fd)
cpdef int set_level_triggered(int fd, lines) except -1
cpdef dict save_vm(int fd, uint64_t moment=*)
cpdef int restore_vm(int fd, dict state, uint64_t moment=*) except -1
