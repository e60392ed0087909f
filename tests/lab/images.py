"""The images of the lab: the nested host's disk, its kernel and initrd, and the guests that run in it.

Everything is made of Debian packages, nothing is mounted, and each image is cached by what went into it (see cache.py).
"""
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lab import debian, initramfs
from tests.lab.cache import artifact
from tests.lab.debian import run_step

HERE = Path(__file__).parent
HOST_PACKAGES = ["busybox-static", "dnsmasq-base", "e2fsprogs", "iproute2", "iputils-ping", "kmod", "libslirp0", "nftables", "procps",
                 "python3", "qemu-system-x86", "qemu-utils", "socat", "strace"]
INITS = {"sysvinit": ["initscripts", "insserv", "sysv-rc", "sysvinit-core"], "systemd": ["dbus", "systemd-sysv", "udev"]}
GUEST_PACKAGES = ["dbus", "e2fsprogs", "iproute2", "iputils-ping", "kmod", "login", "systemd-sysv", "udev"]
ROOT_MODULES = ["virtio_pci", "virtio_blk", "ext4"]      # what each initrd loads to reach its root disk, in this order
HOST_MODULES = ["kvm-amd", "tun", "bridge", "br_netfilter", "veth", "dummy", "vhost_net", "vhost_vsock", "nf_tables",
                "nft_chain_nat", "nft_masq", "nft_ct", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_nat",
                "nft_fib_ipv4", "nft_fib_ipv6", "nft_compat", "xt_MASQUERADE", "ext4", "loop", "nbd", "dm_snapshot",
                "dm_flakey", "overlay", "fuse", "sch_htb", "sch_ingress", "cls_u32", "act_police", "9p", "9pnet_virtio",
                "virtio_pci", "virtio_blk", "virtio_net",
                "virtio_console", "virtio_rng"]
GUEST_MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon", "autofs4",
                 "button", "evdev"]
LATER_MODULES = ["virtiofs"]                             # there for a test to load, in the initramfs only
DRIVER_MODULES = ["e1000", "pvpanic-mmio", "i6300esb"]   # of the amd64 kernel, the only ones of a second guest in an initramfs
SOCKET_MODULES = ["vmw_vsock_virtio_transport"]          # what initrd-vsock.gz loads besides
MASKED_UNITS = ["apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
                "e2scrub_reap.service", "fstrim.timer", "getty@.service", "modprobe@.service", "systemd-binfmt.service",
                "systemd-firstboot.service", "systemd-machine-id-commit.service", "systemd-network-generator.service",
                "systemd-pstore.service", "systemd-sysusers.service", "systemd-update-utmp.service",
                "systemd-update-utmp-runlevel.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"]
# Before, so that its end comes after theirs: who looks on hears of them to the last.
AGENT_UNIT = """[Unit]
Before=kvmapp.service kvmapp-guests.service
[Service]
ExecStart=/usr/local/lib/lab/agent
[Install]
WantedBy=multi-user.target
"""
HOST_DISK_MIB = 6144
GUEST_DISK_MIB = 1024


@dataclass
class Images:
    kernel: Path            # of the nested host
    initrd: Path
    disk: Path
    guests: Path            # the folder that is /lab there


@dataclass
class Kernel:
    """A Debian kernel package, unpacked: vmlinuz as it is there, vmlinux where the ELF file could be had, modules."""

    folder: Path
    release: str

    def modules(self, names: list[str]) -> list[Path]:
        """The files of the named modules and of all that they need, in the order in which they load."""
        paths: list[str] = []
        for name in names:
            shown = subprocess.run(["/sbin/modprobe", "-d", self.folder, "-S", self.release, "--show-depends", name],
                                   stdout=subprocess.PIPE, text=True, check=True).stdout
            paths += [line.split()[1] for line in shown.splitlines() if line.startswith("insmod")]
        return [Path(path) for path in dict.fromkeys(paths)]


def obtain(packages: list[str] | None = None, other_kernel: str = "", init: str = "sysvinit") -> Images:
    """All images, built where they are missing; the nested host's with this init and these Debian packages more (peers for bench), and
    perhaps with the kernel of another Linux, as "6.12"."""
    debian.install_tools()
    with ThreadPoolExecutor() as pool:                  # each debootstrap waits half its time
        kernels = [pool.submit(_kernel, *arguments) for arguments in _kernels()]
        other = pool.submit(_other_kernel, other_kernel) if other_kernel else None
        guests = pool.submit(lambda: _guests(kernels[0].result(), kernels[1].result()))
        host = _host(kernels[0].result(), packages or [], init)
        kernel = (other or kernels[0]).result()
        boot = _boot(kernel, host, HOST_MODULES if other else [])
        return Images(kernel.folder / "vmlinux", boot / "initrd.gz", host / "host.img", guests.result())


def guests() -> Path:
    """The folder of guests alone, where KVM runs them without a nested host."""
    debian.install_tools()
    return _guests(*(_kernel(*arguments) for arguments in _kernels()))


# -- kernels

def _kernels() -> list[tuple[str, str]]:
    return list(zip(["kernel", "cloud-kernel"], debian.kernels(["linux-image-amd64", "linux-image-cloud-amd64"]), strict=True))


def _other_kernel(version: str) -> Kernel:
    """Debian 12 has kernels of later releases besides its own, each under a metapackage of its own."""
    [dependency] = debian.kernels([f"linux-image-{version}-amd64"])
    return _kernel(f"other-kernel-{version}", dependency)


def _kernel(name: str, dependency: str) -> Kernel:
    """The kernel that "linux-image-6.1.0-56-amd64 (= 6.1.192-2)" names."""
    package = dependency.split()[0]
    release = package.removeprefix("linux-image-")

    def build(folder: Path) -> None:
        debian.unpack(package, folder)
        (folder / "boot" / f"vmlinuz-{release}").rename(folder / "vmlinuz")
        elf = _vmlinux((folder / "vmlinuz").read_bytes())
        if elf:
            (folder / "vmlinux").write_bytes(elf)
        for unused in ("boot", "usr"):
            shutil.rmtree(folder / unused)
        subprocess.run(["/sbin/depmod", "-b", folder, release], check=True)

    return Kernel(artifact(name, [dependency, build, _vmlinux], build), release)


def _vmlinux(bzimage: bytes) -> bytes | None:
    """The ELF kernel inside (Documentation/arch/x86/boot.rst, payload_offset), if it is packed as Debian 6.1 (XZ) or 6.12 (zstd) is."""
    start = (bzimage[0x1f1] + 1) * 512 + int.from_bytes(bzimage[0x248:0x24c], "little")
    payload = bzimage[start:start + int.from_bytes(bzimage[0x24c:0x250], "little") - 4]
    for magic, unpacker in ((b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if payload.startswith(magic):
            return subprocess.run([unpacker, "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    return None


# -- the nested host

def _host(kernel: Kernel, more: list[str], init: str) -> Path:
    """The root disk of the nested host."""
    packages = [*HOST_PACKAGES, *INITS[init], *more]

    def build(folder: Path) -> None:
        root = folder / "root"
        debian.bootstrap("debootstrap of the nested host", packages, root)
        _install_modules(kernel, HOST_MODULES, root)
        _furnish_host(root)
        _make_disk("the nested host's disk", root, folder / "host.img", HOST_DISK_MIB)
        shutil.copy(root / "usr/bin/busybox", folder / "busybox")
        shutil.rmtree(root)

    name = "host-with-more" if more else "host" if init == "sysvinit" else f"host-{init}"    # each is kept when another is made anew
    return artifact(name, [debian.SUITE, kernel.folder.name, *packages, *HOST_MODULES, str(HOST_DISK_MIB),
                             build, _furnish_host, AGENT_UNIT, *SHARED], build)


def _furnish_host(root: Path) -> None:
    """kvmapp and kvmappctl on PATH, running from the checkout; nothing to log in on; the agent runs last at boot."""
    for name in ("kvmapp", "kvmappctl"):
        program = root / "usr/sbin" / name
        program.write_text("#!/usr/bin/python3\nimport sys\n\nfrom kvmapp.__main__ import main\n\nsys.exit(main())\n")
        program.chmod(0o755)
    (root / "usr/lib/python3/dist-packages/checkout.pth").write_text("/src\n/usr/local/lib/lab-python\n")
    inittab = root / "etc/inittab"
    if inittab.exists():
        lines = [line for line in inittab.read_text().splitlines() if "getty" not in line]
        inittab.write_text("\n".join([*lines, "lab:2345:once:/usr/local/lib/lab/agent", ""]))
    else:
        (root / "etc/systemd/system/lab-agent.service").write_text(AGENT_UNIT)
        wants = root / "etc/systemd/system/multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / "lab-agent.service").symlink_to("../lab-agent.service")
    (root / "etc/fstab").write_text("/dev/vda / ext4 noatime,errors=remount-ro 0 1\n")
    (root / "etc/hostname").write_text("nested\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost nested\n::1 localhost\n")
    for folder in ("src", "out", "lab", "usr/local/lib/lab-python"):
        (root / folder).mkdir(exist_ok=True)


def _boot(kernel: Kernel, host: Path, modules: list[str]) -> Path:
    """The nested host's initrd, with the lab's own scripts, and with what modules its root disk does not have."""
    scripts = {path.name: path for path in (HERE / "host").iterdir()}

    def build(folder: Path) -> None:
        entries = _initrd(host / "busybox", scripts["initrd-init"], kernel.modules(ROOT_MODULES))
        entries |= {f"lab/{name}": initramfs.program(path) for name, path in scripts.items() if name != "initrd-init"}
        if modules:
            _install_modules(kernel, modules, folder)
            entries |= {str(path.relative_to(folder)): (0o100644, path.read_bytes())
                        for path in (folder / "lib").rglob("*") if path.is_file()}
            shutil.rmtree(folder / "lib")
        (folder / "initrd.gz").write_bytes(initramfs.archive(entries))

    name = "other-boot" if modules else "boot"           # either is kept when the other is made anew
    return artifact(name, [kernel.folder.name, host.name, *ROOT_MODULES, *modules, build, _initrd, _install_modules,
                           Path(initramfs.__file__), *sorted(scripts.values())], build)


# -- the guests

def _guests(amd64: Kernel, cloud: Kernel) -> Path:
    """What guests boot from: stock kernels, an initramfs that is a guest by itself, a Debian disk and initrds for it."""
    root = _guest_root(cloud)
    scripts = init, initrd_init, dhcp = [HERE / "guest" / name for name in ("init", "initrd-init", "dhcp-script")]

    def build(folder: Path) -> None:
        entries = _initrd(root / "busybox", init, cloud.modules([*GUEST_MODULES, "virtio_mmio"]))
        entries |= {f"modules/{path.name}": initramfs.program(path) for path in cloud.modules(LATER_MODULES)}
        entries["bin/dhcp-script"] = initramfs.program(dhcp)
        (folder / "initramfs.gz").write_bytes(initramfs.archive(entries))
        entries = _initrd(root / "busybox", init, amd64.modules(DRIVER_MODULES))
        (folder / "initramfs-amd64.gz").write_bytes(initramfs.archive(entries))
        for name, kernel, modules in (("initrd.gz", cloud, []), ("initrd-amd64.gz", amd64, []), ("initrd-vsock.gz", cloud, SOCKET_MODULES)):
            entries = _initrd(root / "busybox", initrd_init, kernel.modules([*ROOT_MODULES, *modules]))
            (folder / name).write_bytes(initramfs.archive(entries))
        for name, file in (("vmlinuz", cloud.folder / "vmlinuz"), ("vmlinuz-amd64", amd64.folder / "vmlinuz"),
                           ("vmlinux-amd64", amd64.folder / "vmlinux"), ("root.img", root / "root.img")):
            (folder / name).hardlink_to(file)

    return artifact("guests", [root.name, amd64.folder.name, *ROOT_MODULES, *DRIVER_MODULES, *SOCKET_MODULES, *LATER_MODULES, build,
                               _initrd, Path(initramfs.__file__), *scripts], build)


def _guest_root(kernel: Kernel) -> Path:
    """Stock Debian with systemd, a login on ttyS0 and hvc0, root without a password."""
    def build(folder: Path) -> None:
        root = folder / "root"
        debian.unpack("busybox-static", folder / "package")
        shutil.move(folder / "package/bin/busybox", folder / "busybox")
        debian.bootstrap("debootstrap of the guest", GUEST_PACKAGES, root)
        _install_modules(kernel, GUEST_MODULES, root)
        _furnish_guest(root)
        _make_disk("the guest's disk", root, folder / "root.img", GUEST_DISK_MIB)
        for name in ("package", "root"):
            shutil.rmtree(folder / name)

    return artifact("guest-root", [debian.SUITE, kernel.folder.name, *GUEST_PACKAGES, *GUEST_MODULES, *MASKED_UNITS,
                                   str(GUEST_DISK_MIB), build, _furnish_guest, *SHARED], build)


def _furnish_guest(root: Path) -> None:
    """What an administrator sets up before the first boot; and no unit that only makes the boot longer."""
    (root / "etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/machine-id").write_text("d340f42e86115c49953c8013181e73d4\n")
    shadow = root / "etc/shadow"
    shadow.write_text(shadow.read_text().replace("root:*:", "root::", 1))
    units = root / "etc/systemd/system"
    for masked in MASKED_UNITS:
        (units / masked).symlink_to("/dev/null")


# -- shared

def _install_modules(kernel: Kernel, names: list[str], root: Path) -> None:
    """The named modules with all they need, and their index."""
    source, target = kernel.folder / "lib/modules" / kernel.release, root / "lib/modules" / kernel.release
    for path in kernel.modules(names):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(source / name, target / name)
    subprocess.run(["/sbin/depmod", "-b", root, kernel.release], check=True)


def _initrd(busybox: Path, init: Path, modules: list[Path]) -> initramfs.Entries:
    """busybox, an init, and modules with the list of their order."""
    entries = {f"modules/{path.name}": initramfs.program(path) for path in modules}
    entries["modules/order"] = (0o100644, "".join(f"{path.name}\n" for path in modules).encode())
    entries["bin/busybox"] = initramfs.program(busybox)
    entries["bin/sh"] = initramfs.symlink("busybox")
    entries["init"] = initramfs.program(init)
    return entries


def _make_disk(title: str, root: Path, image: Path, mebibytes: int) -> None:
    run_step(title, ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", str(root), str(image), f"{mebibytes}M"])


SHARED: list[Callable[..., object]] = [Kernel.modules, _install_modules, _make_disk, debian.bootstrap]
