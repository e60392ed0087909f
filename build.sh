#!/usr/bin/env bash
# The one way to build, test, show and measure kvmapp:  ./build.sh deps|build|dist|test|fuzz|demo|bench|lab [ARGS...]
#   deps    system packages (apt or dnf, as root) and a Python environment with the pinned dependencies
#   build   compiles every .pyx in place
#   dist    builds, then freezes everything into one file: dist/kvmapp, with its checksum and the list of what is inside
#   test    builds, then lint, types and tests; with arguments: only those tests (paths or pytest options)
#   fuzz    throws coverage-guided input at every device: [SECONDS] [DEVICE ...]; findings go to build/fuzz/findings
#   demo    builds, then shows a guest running under our own VMM
#   bench   builds, then prints the performance tables (ratios against a peer in the same run)
#   lab     runs a command in the nested host (real hardware virtualization on any machine), see tests/lab/README.md
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
CACHE=${KVMAPP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvmapp}
DEB_PACKAGES="gcc libc6-dev linux-libc-dev python3-dev python3-venv liburing-dev libslirp-dev binutils acpica-tools dmidecode"
RPM_PACKAGES="gcc glibc-devel kernel-headers python3-devel liburing-devel libslirp-devel binutils dmidecode"
# What only the tests use: hosts in network namespaces, virsh as the judge of layouts.
DEB_TEST_PACKAGES="busybox-static iproute2 nftables iptables dnsmasq-base e2fsprogs procps libvirt-clients shellcheck groff-base man-db"
RPM_TEST_PACKAGES="busybox iproute nftables iptables dnsmasq e2fsprogs procps-ng libvirt-client ShellCheck groff-base man-db virtiofsd"
# What makes the one file.
DEB_DIST_PACKAGES="patchelf zstd libzstd-dev"
RPM_DIST_PACKAGES="patchelf zstd libzstd-static glibc-static"

say() { printf '== %s\n' "$*"; }
die() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

system_packages() {
    if command -v dpkg-query >/dev/null; then
        missing=$(for p in $DEB_PACKAGES; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || echo "$p"; done)
        install="apt-get install -y -qq --no-install-recommends"
        refresh="apt-get update -qq"
    elif command -v rpm >/dev/null; then
        missing=$(for p in $RPM_PACKAGES; do rpm -q "$p" >/dev/null 2>&1 || echo "$p"; done)
        install="dnf install -y -q"
        refresh=:
    else
        return 0
    fi
    [ -n "$missing" ] || return 0
    # shellcheck disable=SC2086  # the lists are words
    set -- $missing
    [ "$(id -u)" = 0 ] || die "these packages are missing: $*" "as root: $install $*"
    say "installing $*"
    export DEBIAN_FRONTEND=noninteractive
    $refresh >/dev/null && $install "$@" >/dev/null
}

deps() {
    command -v "$PYTHON" >/dev/null || die "no $PYTHON on PATH" "install Python 3.11 or later, or set PYTHON="
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$PYTHON is older than 3.11" "set PYTHON= to a newer one"
    system_packages
    wanted=$("$PYTHON" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["dev"]))')
    tag=$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
    VENV="$CACHE/venv-$tag-$(printf %s "$wanted" | sha256sum | cut -c1-12)"
    if [ ! -e "$VENV/complete" ]; then
        mkdir -p "$CACHE"
        (
            flock 9
            [ ! -e "$VENV/complete" ] || exit 0
            say "making the Python environment in $VENV"
            rm -rf "$VENV"
            "$PYTHON" -m venv "$VENV"
            # shellcheck disable=SC2086  # the list is words
            "$VENV/bin/pip" install -q --disable-pip-version-check $wanted >"$VENV/pip.log" 2>&1 ||
                { cat "$VENV/pip.log"; die "the Python dependencies cannot be installed" "see above; the package index must be reachable"; }
            touch "$VENV/complete"
        ) 9>"$CACHE/venv.lock"
    fi
    [ "$(readlink .venv)" = "$VENV" ] || ln -sfn "$VENV" .venv       # where the lab, and editors, find it
    export PATH="$VENV/bin:$PATH"
}

build() {
    deps
    if command -v ccache >/dev/null; then export CC="ccache gcc" CCACHE_NOHASHDIR=1; fi
    log=$(mktemp)
    flock . python setup.py -q build_ext --inplace -j "$(nproc)" >"$log" 2>&1 || { cat "$log"; rm -f "$log"; die "the build failed"; }
    grep -E 'warning:' "$log" || true
    python -m compileall -q kvmapp          # also where the environment tells Python not to write bytecode
    rm -f "$log"
}

dist() {
    DEB_PACKAGES="$DEB_PACKAGES $DEB_DIST_PACKAGES" RPM_PACKAGES="$RPM_PACKAGES $RPM_DIST_PACKAGES"
    build
    python -m onefile.build "$@"
}

lint() {
    say "ruff"; ruff check .
    say "cython-lint"; cython-lint kvmapp
    say "mypy"; mypy
}

# virtiofsd is in the same package as QEMU's documents and helpers where it is the old one in C (the lab wants that package, too).
deb_virtiofsd() {
    # shellcheck disable=SC1091  # the host's own
    case $(. /etc/os-release 2>/dev/null; echo "${VERSION_CODENAME:-}") in
        bullseye | bookworm | focal | jammy) echo qemu-system-common ;;
        *) echo virtiofsd ;;
    esac
}

run_tests() {
    if [ $# -gt 0 ]; then build; python -m pytest "$@"; return; fi
    DEB_PACKAGES="$DEB_PACKAGES $DEB_DIST_PACKAGES $DEB_TEST_PACKAGES $(deb_virtiofsd)"
    RPM_PACKAGES="$RPM_PACKAGES $RPM_DIST_PACKAGES $RPM_TEST_PACKAGES"
    build
    lint
    say "tests"; python -m pytest
}

# A guest of our own under the daemon, in a folder of its own, then stock Debian.
demo() {
    build
    kvmapp() { python -m kvmapp "$@"; }
    show() { printf '\n$ %s\n' "$*"; "$@"; }
    say "can this host run guests?"
    show kvmapp check --boot || true

    say "a guest under the daemon (in a folder of its own; nothing on this host is touched)"
    home=$(mktemp -d /tmp/kvmapp-demo-XXXXXX)
    chmod 711 "$home"
    kvmappctl() { python -m kvmapp ctl -c "kvmapp+unix:///system?socket=$home/run/kvmapp/kvmapp.sock" "$@"; }
    trap 'kvmappctl destroy counter >/dev/null 2>&1 || true; kill "$(cat "$home/run/kvmapp/kvmapp.pid")" 2>/dev/null || true; rm -rf "$home"' EXIT
    mkdir -p "$home/etc/kvmapp"
    getent passwd kvmapp >/dev/null || printf 'user = nobody\ngroup = %s\n' "$(id -gn nobody)" >"$home/etc/kvmapp/guest.conf"
    cat >"$home/counter.conf" <<CONF
name = counter
memory = 32 MiB
[boot]
kernel = $PWD/kvmapp/probe/probe.elf
cmdline = steps=none mode=counter report=serial period=500
[serial 0]
CONF
    show cat "$home/counter.conf"
    kvmapp daemon --background --root "$home"
    show kvmappctl define "$home/counter.conf"
    show kvmappctl start counter
    show kvmappctl list
    show kvmappctl dominfo counter
    printf "$ ps -eo user,pid,rss,args | grep 'kvmapp: counter'\n"
    ps -eo user,pid,rss,args | grep '[k]vmapp: counter'
    show kvmappctl domstats --cpu-total --vm counter
    show kvmappctl suspend counter
    show kvmappctl resume counter
    show kvmappctl destroy counter
    show kvmappctl list --all

    say "stock Debian on a virtio disk"
    python -m tests.guest.demo
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    deps | build | demo) "$command" ;;
    dist) dist "$@" ;;
    test) run_tests "$@" ;;
    lint) build; lint ;;
    fuzz) build; exec python -m tests.fuzz "$@" ;;
    bench) build; exec python -m bench "$@" ;;
    lab) build; exec tests/lab/run "$@" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
