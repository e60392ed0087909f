"""Where the frozen program begins: what PyInstaller's bootloader tells itself by the environment is nothing for our children."""
import os

for name in [name for name in os.environ if name.startswith("_PYI_")]:
    del os.environ[name]

from kvmapp.__main__ import entry  # noqa: E402 (posix.environ, which the CLI reads, is from the process's start in any case)

entry()
