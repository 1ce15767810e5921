"""Compiles the .pyx files of the package to one shared object, assembles the guests it ships, bundles its modules."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# Setuptools has it by this name only, also for Pythons without a distutils of their own.
from distutils.command.build_scripts import build_scripts  # isort: skip

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import build_facts  # noqa: E402

UNITS = sorted(p.relative_to(HERE) for p in (HERE / "pyvmm").rglob("*.pyx"))


def assemble(source: Path) -> None:
    """guests/x.S -> guests/x.bin: a flat image linked at the address its first comment line states."""
    address = source.read_text().split("linked at ", 1)[1].split(None, 1)[0].rstrip(".,:")
    obj, binary = source.with_suffix(".o"), source.with_suffix(".bin")
    subprocess.run(["as", "--64", "-I", source.parent, "-o", obj, source], check=True)
    flat = ["-m", "elf_x86_64", "--oformat", "binary", "-N", "-e", "0", "-Ttext", address]
    subprocess.run(["ld", *flat, "-o", binary, obj], check=True)
    obj.unlink()


def assemble_guests() -> None:
    # The benchmarks' too, for machines without an assembler; where there is one they are assembled when they run.
    for guests in (HERE / "pyvmm" / "guests", HERE / "benchmarks" / "guests" / "exits"):
        for source in sorted(guests.glob("*.S")):
            assemble(source)


def bundle_modules(directory: Path) -> None:
    """All modules in Python of the package there in one file, beside them."""
    from pyvmm.bundle_build import build

    build(str(directory))


def tell_what_it_is(directory: Path) -> None:
    """For `pyvmm --version`."""
    (directory / "built.txt").write_text(build_facts.text(build_facts.facts()))


class BuildPy(build_py):
    """The guests are data of the package: they must stand there before the files are collected."""

    def run(self) -> None:
        assemble_guests()
        super().run()
        if not self.editable_mode:
            bundle_modules(Path(self.build_lib, "pyvmm"))
            tell_what_it_is(Path(self.build_lib, "pyvmm"))


class BuildExt(build_ext):
    """One shared object of all units (pyvmm/bundle.py says why), whose objects are compiled side by side and only when
    something has changed. A build in place is used where it stands, and wants the guests and the bundle there too.
    """

    def run(self) -> None:
        if self.inplace:
            assemble_guests()
            bundle_modules(HERE / "pyvmm")
            tell_what_it_is(HERE / "pyvmm")
        super().run()
        if self.inplace:
            # Of a build from before: one for each unit.
            for unit in UNITS:
                Path(HERE, unit).with_suffix(sysconfig.get_config_var("EXT_SUFFIX")).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        headers = max((HERE / header).stat().st_mtime_ns for header in ext.depends)

        def compiled(source: str) -> str:
            (made,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
            newest = max(headers, Path(source).stat().st_mtime_ns)
            if self.force or not os.path.exists(made) or os.stat(made).st_mtime_ns < newest:
                self.compiler.compile(
                    [source], self.build_temp, include_dirs=ext.include_dirs, extra_postargs=ext.extra_compile_args
                )
            return made

        workers = os.cpu_count() if self.parallel is True else self.parallel or 1
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compiled, ext.sources))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=ext.extra_link_args, build_temp=self.build_temp
        )


class Wheel(bdist_wheel):
    """With a bill of materials beside the metadata, where PEP 770 wants it."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        sboms = Path(distinfo_path, "sboms")
        sboms.mkdir()
        about = self.distribution
        bill = build_facts.bill(
            build_facts.facts(), about.get_name(), about.get_version(), list(about.install_requires)
        )
        (sboms / "pyvmm.cdx.json").write_text(bill)


class Sdist(sdist):
    """It says what it was made from: there is no repository around it any more."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "SOURCE").write_text(build_facts.source() + "\n")


class BuildScripts(build_scripts):
    """The command is told which Python it is for, and what the package is called."""

    def run(self) -> None:
        super().run()
        words = {
            "@PYTHON@": f"python{sysconfig.get_config_var('LDVERSION')}",
            "@DISTRIBUTION@": self.distribution.get_name().replace("-", "_"),
            "@VERSION@": self.distribution.get_version(),
        }
        for script in self.scripts:
            built = Path(self.build_dir, Path(script).name)
            text = built.read_text()
            for word, value in words.items():
                text = text.replace(word, value)
            built.write_text(text)


def c_sources() -> list[str]:
    """Of each unit: what Cython makes of it, where that is older than it and than what it takes declarations from."""
    translated = cythonize(
        [Extension(".".join(unit.with_suffix("").parts), [str(unit)]) for unit in UNITS],
        # Nothing compiled is pickled: all of it is descriptors, locks and memory of this process.
        compiler_directives={"language_level": "3", "freethreading_compatible": True, "auto_pickle": False},
    )
    # Python finds a module in the shared object by the last part of its name.
    assert len({unit.stem for unit in UNITS}) == len(UNITS)
    return sorted((source for extension in translated for source in extension.sources), key=place_of)


def place_of(source: str) -> tuple[int, str]:
    """What every start runs stands together in the shared object, in its order: the rest of it is not even mapped."""
    from pyvmm.bundle_build import AHEAD

    name = source.removesuffix(".c").replace(os.sep, ".")
    return AHEAD.index(name) if name in AHEAD else len(AHEAD), source


setup(
    cmdclass={
        "bdist_wheel": Wheel,
        "build_ext": BuildExt,
        "build_py": BuildPy,
        "build_scripts": BuildScripts,
        "sdist": Sdist,
    },
    scripts=["pyvmm/launcher/pyvmm"],
    ext_modules=[
        Extension(
            "pyvmm.units",
            c_sources(),
            depends=sorted(str(p.relative_to(HERE)) for p in (HERE / "pyvmm").rglob("*.h")),
            # The run loop must stay small in the caches that an exit leaves cold: no PLT, no stack protector.
            extra_compile_args=["-O2", "-g1", "-fno-plt", "-fno-semantic-interposition", "-Wno-unused-function"],
            extra_link_args=["-Wl,-z,now"],
        )
    ],
)
