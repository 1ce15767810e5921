"""A test that boots a kernel and looks at what it says: `KERNEL=bzImage python -m pytest docs/examples/test_dmesg.py`.

Without KERNEL it is the host's own. There is no disk and no initrd: the kernel gets as far as looking for its root, and
has said most of what it has to say by then. Needs a KVM on which stock kernels boot (`pyvmm doctor`).
"""

import os
import re

import pytest

import pyvmm

KERNEL = os.environ.get("KERNEL", f"/boot/vmlinuz-{os.uname().release}")
MORE = os.environ.get("APPEND", "")  # for the kernel's command line
LIMIT_S = float(os.environ.get("LIMIT_S", "60"))


@pytest.fixture(scope="module")
def dmesg():
    """All that the kernel says, until it finds no root and panics; `panic=-1` makes a reboot of that, which ends it."""
    said = []
    options = {"append": f"console=ttyS0 panic=-1 {MORE}", "memory_mib": 512, "cpus": 2, "no_reboot": True}
    with pyvmm.Machine(kernel=KERNEL, serial=said.append, **options) as m:
        m.run(timeout_s=LIMIT_S)
    return b"".join(said).decode(errors="replace").replace("\r", "")


def test_it_gets_to_its_root(dmesg):
    assert "Linux version" in dmesg
    assert "VFS: Unable to mount root fs" in dmesg


def test_it_knows_where_it_is(dmesg):
    assert "Hypervisor detected: KVM" in dmesg


def test_it_has_both_processors(dmesg):
    assert re.search(r"smp: Brought up 1 node, 2 CPUs", dmesg)


def test_it_complains_of_nothing(dmesg):
    before_the_panic = dmesg.partition("VFS: Unable to mount root fs")[0]
    assert not re.findall(r".*(?:WARNING:|BUG:|Oops|Call Trace).*", before_the_panic)
