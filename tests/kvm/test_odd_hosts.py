"""Hosts whose KVM answers as this machine's does not, by a library that comes before the C library's."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).resolve().parents[2]
# `noxsave`: as a CPU without XSAVE. `deaf`: every other signal to a thread comes to nothing.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static int wanted(const char* what) { return strcmp(getenv("SHIM"), what) == 0; }

int ioctl(int fd, unsigned long request, ...)
{
    int (*next)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
    va_list arguments;
    va_start(arguments, request);
    void* argument = va_arg(arguments, void*);
    va_end(arguments);
    if (request == KVM_GET_XCRS && wanted("noxsave"))
        return memset(argument, 0, sizeof(struct kvm_xcrs)), 0;
    if (request == KVM_SET_XCRS && wanted("noxsave"))
        return errno = EINVAL, -1;
    return next(fd, request, argument);
}

int pthread_kill(pthread_t thread, int number)
{
    static int count;
    int (*next)(pthread_t, int) = dlsym(RTLD_NEXT, "pthread_kill");
    return wanted("deaf") && number && ++count % 2 ? 0 : next(thread, number);
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return folder / "shim.so"


def told(shim, host, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(shim), "SHIM": host},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cpu_without_xsave_reboots_and_restores(shim):
    assert told(shim, "noxsave", """if True:
        from tests.kvm.bare import bare_vm, Entry
        vm = bare_vm(b"\\xeb\\xfe")                       # jmp $
        vm.resume()
        vm.pause()
        vm.restore(vm.save())
        vm.reset()
        vm.set_entry(Entry)
        vm.resume()
        vm.close()
        print("fine")
    """) == "fine\n"


def test_a_vcpu_that_missed_its_kick_is_kicked_again(shim):
    assert told(shim, "deaf", """if True:
        from tests.kvm.bare import bare_vm
        from tests.waiting import until
        vm = bare_vm(b"\\xff\\x05\\x00\\x30\\x00\\x00\\xeb\\xf8")     # inc dword [0x3000]; jmp
        for _ in range(5):
            before = vm.memory.read(0x3000, 4)
            vm.resume()
            until(lambda: vm.memory.read(0x3000, 4) != before)
            vm.pause()
        vm.close()
        print("fine")
    """) == "fine\n"
