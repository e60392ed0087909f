"""Coverage-guided fuzzing of every device: hostile guests, hostile peers, hostile saved states.

    python -m tests.fuzz [SECONDS] [DEVICE]      # or ./build.sh fuzz; one process a device, findings in build/fuzz/findings

`build.py` compiles the devices with instrumentation, `coverage.c` is what that calls, `target.py` turns bytes into what a
guest does to a device, `worker.py` is the loop of one process, `__main__.py` starts such processes and keeps what they find.
"""
