"""KvmError and ConfigError from real calls: the ioctl's name, errno, and what to do, in one sentence."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator

import pytest
from boot_assets import LeftOutError
from guests import Guest

import pyvmm
from pyvmm.errors import ConfigError, KvmError
from pyvmm.guest_memory import RamRegion
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vm import Vm


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm() as kvm:
        made = kvm.create_vm()
    yield made
    made.close()


def check(error: KvmError, ioctl: str, number: int, *words: str) -> None:
    assert (error.ioctl, error.errno) == (ioctl, number)
    text = str(error)
    assert text.startswith(f"{ioctl}: {os.strerror(number)}")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_no_dev_kvm() -> None:
    with pytest.raises(KvmError) as caught:
        Kvm("/dev/no-such-kvm")
    check(caught.value, "open /dev/kvm", errno.ENOENT, "kvm_intel")
    assert isinstance(caught.value, OSError)


NOBODY, SOME_GROUP = 65534, 4  # a user and a group that every Linux has (nogroup and adm on Debian)


@pytest.fixture
def node() -> Iterator[str]:
    """A device file of KVM of our own, in /dev: other file systems may forbid devices."""
    if os.geteuid() != 0:
        raise LeftOutError("only root may make a device file and become another user")
    path = f"/dev/kvm-of-a-test-{os.getpid()}"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.stat("/dev/kvm").st_rdev)
    yield path
    os.unlink(path)


def open_as_nobody(path: str, groups: list[int]) -> str:
    """What Kvm(path) says in a process of another user; "opened" where it may."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups(groups)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            Kvm(path)
            os.write(writer, b"opened")
        except KvmError as error:
            os.write(writer, f"{error.ioctl}|{error.errno}|{error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


@pytest.mark.parametrize(("owner", "mode"), [(0, 0o600), (0, 0o660), (SOME_GROUP, 0o600), (SOME_GROUP, 0o640)])
def test_a_kvm_that_lets_no_group_in(node: str, owner: int, mode: int) -> None:
    """Joining a group would not help: the sentence has a command that does."""
    os.chown(node, 0, owner)
    os.chmod(node, mode)
    name, number, text = open_as_nobody(node, []).split("|")
    assert (name, int(number)) == ("open /dev/kvm", errno.EACCES)
    assert f"with mode {mode:04o}" in text and "usermod" not in text
    command = text.split("`")[1].split()
    assert command[0] == "sudo"
    subprocess.run(command[1:], check=True)
    assert open_as_nobody(node, []) == "opened"


def test_a_kvm_of_a_group(node: str) -> None:
    """The group that owns it is named, whatever it is called; and its members get in."""
    os.chown(node, 0, SOME_GROUP)
    os.chmod(node, 0o660)
    text = open_as_nobody(node, []).split("|")[2]
    name = grp.getgrgid(SOME_GROUP).gr_name
    assert f"usermod -aG {name} {pwd.getpwuid(NOBODY).pw_name}" in text
    assert open_as_nobody(node, [SOME_GROUP]) == "opened"


def test_a_file_that_is_no_kvm() -> None:
    with pytest.raises(KvmError) as caught:
        Kvm("/dev/null")
    assert caught.value.ioctl == "KVM_GET_API_VERSION"


def test_two_vcpus_of_one_id(vm: Vm) -> None:
    vm.create_vcpu(0)
    with pytest.raises(KvmError) as caught:
        vm.create_vcpu(0)
    check(caught.value, "KVM_CREATE_VCPU", errno.EEXIST, "already")


def test_a_vcpu_id_past_the_limit(vm: Vm) -> None:
    with pytest.raises(KvmError) as caught:
        vm.create_vcpu(1 << 20)
    check(caught.value, "KVM_CREATE_VCPU", errno.EINVAL, "too many vCPUs", "fewer")


def test_more_vcpus_than_kvm_takes() -> None:
    with pytest.raises(ConfigError, match="ask for fewer"):
        pyvmm.Machine(flat=b"\xf4", cpus=100_000, memory_mib=4)


def test_a_second_irqchip(vm: Vm) -> None:
    vm.create_irqchip()
    with pytest.raises(KvmError) as caught:
        vm.create_irqchip()
    check(caught.value, "KVM_CREATE_IRQCHIP", errno.EEXIST, "already")


def test_an_irqchip_after_the_vcpus(vm: Vm) -> None:
    vm.create_vcpu(0)
    with pytest.raises(KvmError) as caught:
        vm.create_irqchip()
    check(caught.value, "KVM_CREATE_IRQCHIP", errno.EINVAL, "before")


def test_bad_slots(vm: Vm) -> None:
    ram = RamRegion(0, 8192)
    with pytest.raises(KvmError) as caught:
        vm.set_memory_slot(0, 0x123, 4096, ram.host_address)
    check(caught.value, "KVM_SET_USER_MEMORY_REGION", errno.EINVAL, "page-aligned")
    vm.set_memory_slot(0, 0, 8192, ram.host_address)
    with pytest.raises(KvmError) as caught:
        vm.set_memory_slot(1, 4096, 4096, ram.host_address)
    check(caught.value, "KVM_SET_USER_MEMORY_REGION", errno.EEXIST, "overlaps")
    with pytest.raises(KvmError) as caught:
        vm.set_memory_slot(0xFFFF, 0x10_0000, 4096, ram.host_address)
    check(caught.value, "KVM_SET_USER_MEMORY_REGION", errno.EINVAL, "slot number")


def test_a_line_without_an_irqchip(vm: Vm) -> None:
    with pytest.raises(KvmError) as caught:
        vm.irq_line(4, 1)
    assert caught.value.ioctl == "KVM_IRQ_LINE"
    assert caught.value.remedy


def test_a_full_bus(vm: Vm) -> None:
    """KVM takes 1000 devices on a bus."""
    with pytest.raises(KvmError) as caught:
        for n in range(1100):
            vm.coalesce(0x1000 + n, 1, pio=True)
    check(caught.value, "KVM_REGISTER_COALESCED_MMIO", errno.ENOSPC, "1000")


def test_an_eventfd_address_taken_twice(vm: Vm) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        vm.ioeventfd(fd, 0x1000, 1, pio=True)
        with pytest.raises(KvmError) as caught:
            vm.ioeventfd(fd, 0x1000, 1, pio=True)
        check(caught.value, "KVM_IOEVENTFD", errno.EEXIST, "already")
    finally:
        os.close(fd)


def test_too_many_open_files(vm: Vm) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(KvmError) as caught:
            vm.create_vcpu(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check(caught.value, "KVM_CREATE_VCPU", errno.EMFILE, "ulimit -n")


def test_cpuid_after_the_first_run(boot: Callable[..., Guest]) -> None:
    """Linux 5.16 and later refuse another table once the vCPU has run; the same one is taken."""
    guest = boot("finish")
    guest.run()
    vcpu = guest.machine.cpus[0].vcpu
    table = vcpu.cpuid
    other = [(*entry[:3], entry[3] ^ 0x10, *entry[4:]) if entry[0] == 1 else entry for entry in table]
    with pytest.raises(KvmError) as caught:
        vcpu.cpuid = other
    check(caught.value, "KVM_SET_CPUID2", errno.EINVAL, "has run already")


def test_closed_objects() -> None:
    from pyvmm.errors import StateError

    kvm = Kvm()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for thing in (vcpu, vm, kvm):
        thing.close()
        thing.close()
    for call in (kvm.create_vm, lambda: vm.create_vcpu(1), lambda: vcpu.regs):
        with pytest.raises(StateError, match="closed"):
            call()


def test_the_command_says_one_sentence(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm import platform
    from pyvmm.cli import main

    monkeypatch.setattr(platform, "Kvm", lambda: Kvm("/dev/no-such-kvm"))
    assert main(["demo"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("pyvmm: open /dev/kvm: No such file or directory: ")
    assert len(error.splitlines()) == 1
