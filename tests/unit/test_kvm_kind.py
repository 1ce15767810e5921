"""kvm_kind: from loaded modules and processor flags to words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.kvm.kind import kvm_kind


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "module").mkdir()
    return tmp_path


def kind(host: Path, modules: list[str], flags: str | None) -> str:
    for name in modules:
        (host / "module" / name).mkdir()
    cpuinfo = host / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t:\n")
    return kvm_kind(str(host / "module"), str(cpuinfo))


def test_bare_metal(host: Path) -> None:
    assert kind(host, ["kvm", "kvm_intel"], "vmx sse2") == "kvm_intel: hardware virtualization, Intel VMX"


def test_nested(host: Path) -> None:
    text = kind(host, ["kvm", "kvm_amd"], "svm hypervisor")
    assert text.startswith("kvm_amd: hardware virtualization, AMD SVM (")
    assert "virtual machine itself" in text


def test_software(host: Path) -> None:
    assert kind(host, ["kvm", "kvm_pvm"], "sse2").startswith("kvm_pvm: software virtualization")


def test_of_two_modules_the_one_the_processor_has(host: Path) -> None:
    assert kind(host, ["kvm_intel", "kvm_amd"], "svm").startswith("kvm_amd")


def test_both_loaded_and_neither_flag(host: Path) -> None:
    assert kind(host, ["kvm_intel", "kvm_pvm"], "hypervisor").startswith("kvm_")


def test_built_in_or_unknown(host: Path) -> None:
    assert kind(host, [], None) == "KVM of an unknown kind"
