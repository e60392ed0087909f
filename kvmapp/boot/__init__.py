"""How a guest starts: kernels into memory, and what a guest is told about its machine.

Start with direct.py, the table of contents. Kernels: kernel.py recognises them, linux.py, pvh.py and multiboot.py boot them, on
elf.py, segments.py, image.py and placement.py; entry.py has the registers. The machine: platform.py has the facts, e820.py, acpi.py
(dsdt.py, aml.py), mptable.py, smbios.py and real_mode.py tell them. CPUs: topology.py, cpuid.py. Imports nothing by itself.
"""
