"""The errors: what they are, what they say, and that they survive a trip to another process."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from pyvmm.errors import BusError, ConfigError, DeviceError, GuestError, KvmError, StateError, VmmError
from pyvmm.kvm.ioctl import REMEDIES


@pytest.mark.parametrize("kind", [ConfigError, StateError, BusError, KvmError, GuestError, DeviceError])
def test_all_are_vmm_errors(kind: type[Exception]) -> None:
    assert issubclass(kind, VmmError)


def test_kvm_error_is_an_os_error_with_the_ioctls_name() -> None:
    error = KvmError("KVM_CREATE_VCPU", errno.EEXIST)
    assert isinstance(error, OSError)
    assert (error.ioctl, error.errno, error.strerror) == (
        "KVM_CREATE_VCPU",
        errno.EEXIST,
        os.strerror(errno.EEXIST),
    )
    assert error.remedy == ""
    assert str(error) == f"KVM_CREATE_VCPU: {os.strerror(errno.EEXIST)}"


def test_kvm_error_says_the_remedy_last() -> None:
    error = KvmError("open /dev/kvm", errno.EACCES, "join the group kvm")
    assert str(error) == f"open /dev/kvm: {os.strerror(errno.EACCES)}: join the group kvm"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EINTR, errno.ENOTTY, 0, 4095])
def test_kvm_error_stays_itself_for_every_errno(number: int) -> None:
    assert type(KvmError("KVM_RUN", number)) is KvmError


def test_kvm_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(KvmError("KVM_RUN", errno.EFAULT, "none")))
    assert (type(error), error.ioctl, error.errno, error.remedy) == (
        KvmError,
        "KVM_RUN",
        errno.EFAULT,
        "none",
    )
    assert str(error) == f"KVM_RUN: {os.strerror(errno.EFAULT)}: none"


def test_guest_errors_carry_the_dump_and_the_exit_status() -> None:
    error = GuestError("KVM_EXIT_UNKNOWN", "rip 0000")
    assert (str(error), error.dump, error.status) == ("KVM_EXIT_UNKNOWN", "rip 0000", 4)
    assert GuestError("short").dump == ""
    assert isinstance(DeviceError("raised"), GuestError)
    assert DeviceError.status == 8


def test_remedies_are_for_what_a_user_meets() -> None:
    for name, number in REMEDIES:
        assert name.startswith("KVM_") or name == "open /dev/kvm"
        assert number in errno.errorcode
    for number in (errno.ENOENT, errno.EACCES):
        assert REMEDIES["open /dev/kvm", number]
    assert "vCPU" in REMEDIES["KVM_CREATE_VCPU", errno.EINVAL]
