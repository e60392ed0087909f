"""What a domain may come to need, imported by the zygote, so that its process imports nothing, least of all without privileges: the
folder that kvmapp lies in may be root's alone.

Machines import devices when their configuration asks for them; who will make many of them has them all.
"""
import difflib  # noqa: F401
import tty  # noqa: F401

import kvmapp.boot.relocation
import kvmapp.boot.unpacked
import kvmapp.control
import kvmapp.diskcards
import kvmapp.hw.e1000
import kvmapp.hw.i6300esb
import kvmapp.hw.pvpanic
import kvmapp.kvmstats
import kvmapp.net.tap
import kvmapp.net.user
import kvmapp.netcards
import kvmapp.saving
import kvmapp.virtio.balloon
import kvmapp.virtio.console
import kvmapp.virtio.fs
import kvmapp.virtio.mmio
import kvmapp.virtio.net
import kvmapp.virtio.rng
import kvmapp.virtio.vsock  # noqa: F401
