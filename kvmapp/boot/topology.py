"""How the guest's vCPUs sit in sockets, cores and threads, and the APIC ID that follows from it.

Follows Intel SDM 3A, 9.9.1: an APIC ID is socket, core and thread number, each in a bit field just wide enough. So ids have gaps
where a count is no power of two, and KVM_CREATE_VCPU must be given the APIC ID, not the vCPU's index. Leaves out: dies and NUMA.
"""
from kvmapp.errors import KvmappError


class Topology:
    """`vcpus` in all; without further numbers one socket of as many single-threaded cores."""
    __slots__ = ("cores", "package_shift", "sockets", "thread_shift", "threads", "vcpus")

    def __init__(self, vcpus: int, *, sockets: int = 1, cores: int | None = None, threads: int = 1):
        """Raises KvmappError where the product is not `vcpus`."""
        if cores is None:
            cores = vcpus // (sockets * threads)
        if sockets * cores * threads != vcpus or vcpus < 1:
            raise KvmappError(f"Cannot arrange {vcpus} vCPUs as {sockets} sockets x {cores} cores x {threads} threads",
                              "the product of the three must be the number of vCPUs")
        self.vcpus, self.sockets, self.cores, self.threads = vcpus, sockets, cores, threads
        self.thread_shift = (threads - 1).bit_length()
        self.package_shift = self.thread_shift + (cores - 1).bit_length()

    @property
    def threads_per_socket(self) -> int:
        return self.cores * self.threads

    def place(self, vcpu: int) -> tuple[int, int, int]:
        """(socket, core in it, thread in that) of a vCPU."""
        core, thread = divmod(vcpu, self.threads)
        socket, core = divmod(core, self.cores)
        return socket, core, thread

    def apic_id(self, vcpu: int) -> int:
        """The APIC ID, and KVM's vcpu id, of the vCPU with this index."""
        socket, core, thread = self.place(vcpu)
        return socket << self.package_shift | core << self.thread_shift | thread

    def apic_ids(self) -> list[int]:
        return [self.apic_id(vcpu) for vcpu in range(self.vcpus)]
