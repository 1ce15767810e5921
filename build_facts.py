"""What a build is made of: `pyvmm --version` tells it, and each wheel has it as a bill of materials.

For setup.py, which puts ``pyvmm/built.txt`` and ``sboms/pyvmm.cdx.json`` (PEP 770; CycloneDX 1.6) into what it builds.
Nothing in them changes from one build of a source to the next, so that wheels can be compared byte by byte.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import uuid
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "SOURCE"  # in a source distribution: what it was made from


def said(*command: str) -> str:
    """The first line of what a program prints; empty where there is none, or it fails."""
    try:
        made = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return made.stdout.partition("\n")[0].strip()


def source() -> str:
    """The commit that is built, with "and changes" where there are some; "unknown" outside of a checkout."""
    if SOURCE.exists():
        return SOURCE.read_text().strip()
    if said("git", "rev-parse", "--show-toplevel") != str(HERE):
        return "unknown"
    changes = said("git", "status", "--porcelain", "--untracked-files=no")
    return said("git", "rev-parse", "--short=12", "HEAD") + (" and changes" if changes else "")


def facts() -> dict[str, str]:
    """By their names, in the order in which they are told."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return {
        "source": source(),
        "python": f"CPython {sys.version.split()[0]}, {sysconfig.get_config_var('SOABI')}",
        "compiler": said(compiler, "--version") or said("cc", "--version") or "unknown",
        "cython": version("Cython"),
        "binutils": said("as", "--version") or "unknown",
        "setuptools": version("setuptools"),
    }


def text(found: dict[str, str]) -> str:
    """As it stands in built.txt."""
    return "".join(f"{name}: {value}\n" for name, value in found.items())


def bill(found: dict[str, str], name: str, release: str, requires: list[str]) -> str:
    """The CycloneDX document of a wheel, as JSON."""
    us = {
        "type": "library",
        "bom-ref": "pyvmm",
        "name": name,
        "version": release,
        "purl": f"pkg:pypi/{name}@{release}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "properties": [{"name": f"pyvmm:build:{key}", "value": value} for key, value in found.items()],
    }
    # Cython's own code stands in the shared object; the rest is asked for when the wheel is installed.
    compiled = component("Cython", found["cython"])
    compiled["licenses"] = [{"license": {"id": "Apache-2.0"}}]
    needed = [required(requirement) for requirement in requires]
    tools = [component("setuptools", found["setuptools"])]
    tools += [
        {"type": "application", "name": kind, "version": found[kind]} for kind in ("compiler", "binutils")
    ]
    parts = [compiled, *needed]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([us, parts]))}",
        "version": 1,
        "metadata": {"component": us, "tools": {"components": tools}},
        "components": parts,
        "dependencies": [
            {"ref": "pyvmm", "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def component(name: str, release: str) -> dict[str, object]:
    purl = f"pkg:pypi/{name.lower()}@{release}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": release, "purl": purl}


def required(requirement: str) -> dict[str, object]:
    """What pip brings: its version is decided then."""
    match = re.match(r"([A-Za-z0-9._-]+)\s*(.*)", requirement)
    assert match, requirement
    purl = f"pkg:pypi/{match[1].lower()}"
    properties = [{"name": "pyvmm:requires", "value": match[2]}]
    return {"type": "library", "bom-ref": purl, "name": match[1], "purl": purl, "properties": properties}
