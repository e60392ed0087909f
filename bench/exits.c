/*
 * The peer of bench/exits.py: the least a VMM can be. One vCPU, a KVM_RUN loop with a switch, one register behind one port and
 * behind one address. Usage: exits CODE LOOP COUNT; prints the nanoseconds of wall clock and of CPU time that the loop took.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (16UL << 20)
#define CODE 0x1000
#define ZEROES 0x2000
#define PORT 0x80
#define ADDRESS 0xC0000000

static uint64_t device_register;

static int must(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static void *map(size_t size, int flags, int fd)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED)
        must(-1, "mmap");
    return at;
}

static int64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int create_vm(int kvm, const char *code_path)
{
    char *memory = map(MEMORY, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    struct kvm_userspace_memory_region region = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory };
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    uint64_t identity_map = 0xFFFBC000;
    int code = must(open(code_path, O_RDONLY), code_path);
    must((int)read(code, memory + CODE, 0x1000), code_path);
    close(code);
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    must(ioctl(vm, KVM_SET_TSS_ADDR, 0xFFFBD000), "KVM_SET_TSS_ADDR");
    must(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    must(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    return vm;
}

static void enter_protected_mode(int vcpu, unsigned loop, unsigned count)
{
    struct kvm_sregs sregs;
    struct kvm_regs regs = { .rip = CODE + loop * 64, .rbx = ZEROES, .rcx = count, .rdx = PORT, .rdi = ADDRESS, .rflags = 2 };
    struct kvm_segment flat = { .limit = 0xFFFFFFFF, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1, .selector = 0x18 };
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.type = 11;
    flat.selector = 0x10;
    sregs.cs = flat;
    sregs.cr0 |= 1;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void set_cpuid(int kvm, int vcpu)
{
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + 256 * sizeof table->entries[0]);
    table->nent = 256;
    must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, table), "KVM_GET_SUPPORTED_CPUID");
    must(ioctl(vcpu, KVM_SET_CPUID2, table), "KVM_SET_CPUID2");
    free(table);
}

static void run(int vcpu, struct kvm_run *shared)
{
    for (;;) {
        int result;
        while ((result = ioctl(vcpu, KVM_RUN, 0)) < 0 && errno == EINTR)        /* of a stop and a continuation */
            ;
        must(result, "KVM_RUN");
        switch (shared->exit_reason) {
        case KVM_EXIT_IO:
            if (shared->io.port != PORT)
                break;
            if (shared->io.direction == KVM_EXIT_IO_OUT)
                memcpy(&device_register, (char *)shared + shared->io.data_offset, shared->io.size);
            else
                memcpy((char *)shared + shared->io.data_offset, &device_register, shared->io.size);
            break;
        case KVM_EXIT_MMIO:
            if (shared->mmio.phys_addr != ADDRESS)
                break;
            if (shared->mmio.is_write)
                memcpy(&device_register, shared->mmio.data, shared->mmio.len);
            else
                memcpy(shared->mmio.data, &device_register, shared->mmio.len);
            break;
        case KVM_EXIT_SHUTDOWN:
            return;
        default:
            fprintf(stderr, "unexpected exit %u\n", shared->exit_reason);
            exit(1);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: exits CODE LOOP COUNT\n");
        return 2;
    }
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = create_vm(kvm, argv[1]);
    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    struct kvm_run *shared = map((size_t)must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "mmap size"), MAP_SHARED, vcpu);
    set_cpuid(kvm, vcpu);
    enter_protected_mode(vcpu, (unsigned)atoi(argv[2]), (unsigned)atoi(argv[3]));
    int64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    run(vcpu, shared);
    printf("%lld %lld\n", (long long)(now(CLOCK_MONOTONIC) - wall), (long long)(now(CLOCK_PROCESS_CPUTIME_ID) - cpu));
    return 0;
}
