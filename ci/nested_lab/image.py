"""What a lab boots from: Debian's generic kernel, an initial RAM disk, and the saved state of a lab that has booted.

The kernel starts from its uncompressed image by PVH, in half the time of the bzImage. The RAM disk loads the modules,
says "lab: ready" on the console and reads one line from the control line (ttyS1), shell assignments that tell what is
different from lab to lab. Up to there nothing depends on the caller, and no 9p share is mounted (QEMU does not save a
machine that has one mounted): that is the state that is saved, once for each kernel, RAM disk, emulator and size.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import boot_assets  # noqa: E402

CACHE = boot_assets.CACHE.resolve()
LAB = CACHE / "lab"
QEMU = "qemu-system-x86_64"

MODULES = ("kvm-amd", "virtio_pci", "virtio_net", "9pnet_virtio", "9p", "overlay", "tun")
# See docs/lab.md: with virtual VMLOAD/VMSAVE the emulator mixes up the registers of both kernels, with virtual GIF an
# interrupt of the outer kernel can stay pending for ever.
# The emulator's counters are one clock, but it does not say so by CPUID: without tsc=reliable the kernel calls them
# unstable, and its KVM moves the TSC offset of a vCPU at every ioctl.
KERNEL_COMMAND_LINE = "console=ttyS0 panic=-1 tsc=reliable kvm_amd.vls=0 kvm_amd.vgif=0"
READY = b"lab: ready"
STATES_KEPT = 4

SHARE = "trans=virtio,version=9p2000.L,msize=512000"
GUEST_ADDRESS = "10.0.2.15"  # where QEMU's user network forwards to
AGENT_PORT = 5999

# Two views of the host's files: /host remembers what it has once looked at (the system, Python and its packages; /files
# is that with a place for writes, which vanish), live asks each time (the checkout, which changes while a lab is up).
INIT = f"""\
mkdir -p /host /over /files /new
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo '{READY.decode()}' > /dev/ttyS0
read -r settings <&3
eval "$settings"
date -s "@$LAB_TIME" > /dev/null
mount -t 9p -o {SHARE},ro,cache=loose root /host
mount -t tmpfs tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /files
mount --bind /files /new
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t devtmpfs devtmpfs /new/dev
mkdir -p /new/dev/pts /new/dev/shm /new/dev/net
ln -s /proc/self/fd /new/dev/fd
for stream in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${{stream%:*}}" "/new/dev/${{stream#*:}}"; done
mount -t devpts -o mode=600,ptmxmode=666 devpts /new/dev/pts
for place in /new/dev/shm /new/run /new/tmp; do mount -t tmpfs -o mode=1777 tmpfs $place; done
mkdir -p /new/run/lab/live
mount -t 9p -o {SHARE},ro,cache=mmap live /new/run/lab/live
show() {{ # VIEW PATH
    mkdir -p "/new$2"
    mount --bind "$1$2" "/new$2"
}}
# The lab's /tmp is its own; of the host's there is what these lie in, and later what a command names.
for path in "$LAB_CHECKOUT" "$LAB_VENV" "$LAB_CACHE" "$LAB_SCRATCH"; do
    case $path in /tmp/*)
        path=${{path#/tmp/}}
        [ -e "/new/tmp/${{path%%/*}}" ] || show /new/run/lab/live "/tmp/${{path%%/*}}" ;;
    esac
done
show /new/run/lab/live "$LAB_CHECKOUT"
for seldom in "$LAB_VENV" "$LAB_CACHE"; do [ ! -d "/files$seldom" ] || show /files "$seldom"; done
mkdir -p "/new$LAB_SCRATCH"
mount -t 9p -o {SHARE},cache=mmap scratch "/new$LAB_SCRATCH"
chmod 666 /dev/kvm
ip link set lo up
ip link set eth0 up
ip address add {GUEST_ADDRESS}/24 dev eth0
hostname lab
export PYTHONPATH="$LAB_CHECKOUT/ci"
# The root of the mount namespace, and no chroot: there nobody may make a user namespace (unshare(2)), as passt does.
cd /new
mount --move . /
exec chroot . "$LAB_PYTHON" -sS -m nested_lab.agent {AGENT_PORT} "$LAB_TOKEN" "$LAB_SEED" <&3 >&3
"""


def kernel() -> Path:
    return boot_assets.kernel("generic").vmlinux


def initrd() -> Path:
    """Made once for each kernel and version of what it is made from."""
    release = boot_assets.kernel("generic").release
    sources = Path(__file__).read_bytes() + Path(boot_assets.__file__).read_bytes() + release.encode()
    path = LAB / f"initrd-{hashlib.sha256(sources).hexdigest()[:16]}.cpio"
    if not path.exists():
        LAB.mkdir(parents=True, exist_ok=True)
        made = boot_assets.initrd_bytes(INIT, boot_assets.kernel("generic").modules(*MODULES))
        boot_assets.write_whole(path, made)
        _keep_newest("initrd-*.cpio")
    return path


def saved_state(arguments: list[str]) -> Path:
    """Where the state of a lab with these arguments of QEMU is, or is to be, saved."""
    version = subprocess.run([QEMU, "--version"], check=True, capture_output=True).stdout
    what = "\0".join([initrd().name, *arguments]).encode() + version
    return LAB / f"state-{hashlib.sha256(what).hexdigest()[:16]}"


def keep_state(part: Path, path: Path) -> None:
    """A state just written takes its place; of older ones the newest few are kept: each is some 150 MiB."""
    part.replace(path)
    _keep_newest("state-????????????????")


def _keep_newest(pattern: str) -> None:
    by_age = sorted(LAB.glob(pattern), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-STATES_KEPT]:
        old.unlink(missing_ok=True)
