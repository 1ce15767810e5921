"""A machine is made whatever signals come meanwhile."""

from __future__ import annotations

import signal

from pyvmm.kvm.system import Kvm


def test_signals_do_not_keep_a_vm_from_being_made() -> None:
    """The kernel gives KVM_CREATE_VM up at a signal; the handlers run, and it is asked again."""
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(True))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        with Kvm() as kvm:
            for _ in range(1000):
                kvm.create_vm().close()
                if len(seen) > 300:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
