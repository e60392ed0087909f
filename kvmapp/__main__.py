"""kvmapp is one file with several names and verbs: `kvmapp run`, `kvmapp check`, `kvmapp daemon`, and `kvmappctl` by its name.

Nothing is imported here that the verb does not need: kvmappctl answers in milliseconds.
"""
import os
import sys

USAGE = """usage: kvmapp VERB ...

  run [FILE] [OPTIONS]   one guest in the foreground (kvmapp run --help)
  ctl ...                the same as kvmappctl: what virsh is to libvirt (kvmapp ctl --help)
  check [--boot]         whether this host can run guests, and what to mend
  setup [--remove]       lays kvmapp down on this host, or takes it away (kvmapp setup --help)
  licenses [PART]        what is inside, with versions and licences; a part's licence
  daemon [OPTIONS]       what kvmappctl speaks to (kvmapp daemon --help)
  --version              the version
"""


def main() -> int:
    """The exit status of the process."""
    words = sys.argv[1:]
    if os.path.basename(sys.argv[0]).startswith("kvmappctl"):
        words.insert(0, "ctl")
    return guarded_main(lambda: dispatch(words))


def guarded_main(work) -> int:
    """Runs `work() -> exit status`; an error of ours is shown as error and hint, never as a traceback."""
    from kvmapp.errors import KvmappError
    try:
        return work()
    except KvmappError as error:
        sys.stdout.flush()
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None                               # whoever read us has gone; nothing is left to flush
        return 141


def dispatch(words: list[str]) -> int:
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb == "run":
        return run(rest)
    if verb == "ctl":
        from kvmapp.cli.main import run as ctl
        return ctl(rest)
    if verb == "check":
        from kvmapp.check import run_check
        return run_check(rest, boot_probe)
    if verb == "daemon":
        from kvmapp.daemon.main import main as daemon
        return daemon(rest)
    if verb == "setup":
        from kvmapp.install import main as setup
        return setup(rest)
    if verb == "licenses":
        from kvmapp.licences import main as licences
        return licences(rest)
    if verb == "zygote":                                # not for people: the daemon starts it
        from kvmapp.zygote import main as zygote
        return zygote([verb, *rest])
    if verb == "quick":                                 # so is this
        from kvmapp.cli.quick import main as quick
        return quick(rest)
    if verb in ("--version", "-V", "version"):
        from kvmapp import __version__
        print(f"kvmapp {__version__}")
        return 0
    if verb in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    from kvmapp.errors import UsageError
    raise UsageError(f"unknown verb '{verb}'", "kvmapp --help lists them")


def boot_probe() -> str:
    """For `check --boot`: the probe guest under our own VMM."""
    from kvmapp.probe import boot
    return boot()


def run(words: list[str]) -> int:
    from kvmapp.errors import UsageError
    from kvmapp.options import RUN_EXTRAS, part_arguments, run_options
    options = run_options()
    takes_value = {flag: bool(option.metavar) for flag, option in options.items()} | {"--help": False}
    pairs, files = part_arguments(words, takes_value | {flag: bool(metavar) for flag, metavar, _ in RUN_EXTRAS})
    if ("--help", None) in pairs:
        from kvmapp.options import run_help
        print(run_help(), end="")
        return 0
    if len(files) > 1:
        raise UsageError(f"one domain file at a time, got {' '.join(files)}")
    extras = {flag: value or "" for flag, value in pairs if flag not in options}
    pairs = [pair for pair in pairs if pair[0] in options]
    from kvmapp import foreground
    saved = foreground.open_saved(extras["--restore"]) if "--restore" in extras else None
    if saved and not pairs and not files:
        from kvmapp.snapshot import configuration
        config = configuration(saved)
    else:
        from kvmapp.config import config_from_options
        config = config_from_options(pairs, files[0] if files else None)
    return foreground.run(config, foreground.Extras(extras.get("--save"), saved, "--timing" in extras))


def entry() -> None:
    """The whole process: taking the interpreter apart at the end would cost a guest's boot some milliseconds for nothing."""
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            status = status or 1                        # a full disk behind our standard output
    os._exit(status)


if __name__ == "__main__":
    entry()
