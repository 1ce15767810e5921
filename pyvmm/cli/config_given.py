"""What a configuration file gives ``pyvmm run``, beside what is given on the command line."""

from __future__ import annotations

from pyvmm.config import MachineConfig
from pyvmm.config_file import COMMAND, ConfigFile
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.cli.options import Option


def with_file(given: dict[str, Any], options: Sequence[Option]) -> None:
    """Puts into ``given`` what the file has that is named there, and the command line has not. ConfigError."""
    images = given.get("images", [])
    files = [given.pop("config")] if "config" in given else []
    files += [path for path in images if path.endswith(".toml")]
    if len(files) > 1:
        raise ConfigError(f"two configuration files, {files[0]} and {files[1]}: a machine has one, put them together")
    for option, whose in (("restore", "the snapshot"), ("incoming", "the other side")):
        if option in given:
            raise ConfigError(
                f"--{option} beside --config ({files[0]}): {whose} says what the machine is made of, leave one out"
            )
    given["images"] = [path for path in images if path not in files]
    file = ConfigFile(files[0])
    for name, value in {**file.options(MachineConfig.rows), **command_options(file, options)}.items():
        given.setdefault(name, value)


def command_options(file: ConfigFile, options: Sequence[Option]) -> dict[str, Any]:
    """What its table [run] has."""
    table = file.data.get(COMMAND, {})
    file.fits("object", table, (COMMAND,))
    by_key = {option.key: option for option in options if option.file}
    given = {}
    for name, value in table.items():
        option = by_key.get(name)
        if option is None:
            raise file.unknown((COMMAND, name), f"[{COMMAND}] has no option", by_key)
        given[name] = command_option(file, option, value)
    return given


def command_option(file: ConfigFile, option: Option, value: Any) -> Any:
    """As the command line gives it."""
    where = (COMMAND, option.key)
    file.fits("array" if option.many else option.file, value, where)
    if not option.metavar:
        return value
    converted = []
    for n, each in enumerate(value if option.many else [value]):
        at = (*where, n) if option.many else where
        file.fits(option.file, each, at)
        try:
            converted.append(option.convert(str(each)))
        except ValueError:
            raise file.error(at, f"{option.key}={each!r}: that is no {option.metavar} ({option.help})") from None
    return converted if option.many else converted[0]
