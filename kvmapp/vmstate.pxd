cpdef list msr_indexes(int kvm_fd)
cpdef dict save_vcpu(int fd, list indexes)
cpdef int restore_vcpu(int fd, dict state) except -1
cpdef dict save_vm(int fd)
cpdef int restore_vm(int fd, dict state) except -1
