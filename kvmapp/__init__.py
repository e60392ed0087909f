"""kvmapp: a virtual-machine host in one file. Importing the package imports nothing else."""
__version__ = "0.1.0"
