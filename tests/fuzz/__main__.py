"""python -m tests.fuzz [SECONDS] [DEVICE ...] [--kind coverage|sanitized] [--keep]

Each device for SECONDS (60) of CPU time, which on a busy machine too are as many inputs, in a process of its own. A finding is
reported, and its input kept in build/fuzz/findings/; run it again with `python -m tests.fuzz --input FILE 0 DEVICE`. The exit status
is 1 when there was one."""
import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from tests.fuzz import build
from tests.fuzz.worker import CORPUS, noted

REPORT_LINES = 40
LIFE_SECONDS = 300                               # beyond its time, for a process that does not end
SLOWEST = 50                                     # times slower than its CPU time, on a busy machine


def fuzz(name: str, seconds: float, kind: str, *, keep: bool = False, folder: Path = build.FOLDER / "corpus") -> str | None:
    """Fuzzes one device; what was found, or None. `folder` has what earlier runs learnt, and takes what this one learns."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(seconds), str(folder), *(["keep"] if keep else [])]
    try:
        result = subprocess.run(command, env=build.environment(kind), cwd=build.ROOT, capture_output=True, text=True, errors="replace",
                                timeout=seconds * SLOWEST + LIFE_SECONDS)
    except subprocess.TimeoutExpired as late:
        return f"{name}: it did not end: {late.stderr!r}"
    if result.returncode == 0:
        print(f"{name}: {result.stdout.strip()}", flush=True)
        return None
    data = noted(folder / f"{name}.now")
    findings = build.FOLDER / "findings"
    findings.mkdir(exist_ok=True)
    path = findings / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}"
    path.write_bytes(data)
    report = "\n".join((result.stdout + result.stderr).splitlines()[-REPORT_LINES:])
    path.with_suffix(".txt").write_text(report)
    return f"{name}: exit status {result.returncode}, input {path.relative_to(build.ROOT)}\n{report}"


def replay(name: str, path: str, kind: str) -> int:
    """Runs one input in this terminal."""
    code = ("import sys; from tests.fuzz.target import Target; from tests.device.profiles import PROFILES; "
            "[p] = [p for p in PROFILES if p.name == sys.argv[1]]; t = Target(p); t.run(open(sys.argv[2], 'rb').read()); t.close()")
    return subprocess.run([sys.executable, "-c", code, name, path], env=build.environment(kind), cwd=build.ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.sh fuzz", description="Fuzz the devices.")
    parser.add_argument("seconds", nargs="?", type=float, default=60)
    parser.add_argument("device", nargs="*")
    parser.add_argument("--kind", choices=sorted(build.KINDS), default="sanitized")
    parser.add_argument("--keep", action="store_true", help="reduce what was found into tests/fuzz/corpus")
    parser.add_argument("--input", help="run this one input instead")
    options = parser.parse_args()
    from tests.device.profiles import PROFILES
    known = [profile.name for profile in PROFILES]
    unknown = set(options.device) - set(known)
    if unknown:
        parser.error(f"no device {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    build.build(options.kind)
    if options.input:
        return replay(options.device[0], str(Path(options.input).resolve()), options.kind)
    CORPUS.mkdir(exist_ok=True)
    reports = [fuzz(name, options.seconds, options.kind, keep=options.keep) for name in options.device or known]
    found = [report for report in reports if report]
    print("\n\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
