"""Tables of devices in TOML: the built-in one and the user's, read, checked, merged, and written by calibration."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from spmd_infer.errors import PlanError

VARIABLE = "SPMD_INFER_HARDWARE"
"""Environment variable: the user's table, instead of ``user_file()``'s default place."""

Row = dict[str, Any]


@dataclass(frozen=True)
class _Column:
    """What a key must hold: a number of at least ``least``, and above zero where ``positive``."""

    unit: str
    positive: bool = True
    default: float | None = None
    most: float | None = None


_RATES = {
    "bf16": _Column("TFLOP/s"),
    "f32": _Column("TFLOP/s"),
    "fp8": _Column("TFLOP/s, 0 for none", positive=False),
    "int8": _Column("TOP/s, 0 for none", positive=False),
    "memory_tb_s": _Column("TB/s"),
    "links_gb_s": _Column("GB/s, one direction"),
    "latency_us": _Column("microseconds", positive=False),
    "hop_us": _Column("microseconds a device", positive=False),
    "expert_efficiency": _Column("a part of 1", default=1.0, most=1.0),
}
_NUMBERS = _RATES | {
    "memory_gb": _Column("GB"),
    "network_gb_s": _Column("GB/s a device, one direction"),
    "network_latency_us": _Column("microseconds", positive=False, default=20.0),
    "network_hop_us": _Column("microseconds a host", positive=False, default=4.0),
    "matmul_efficiency": _Column("a part of 1", default=1.0, most=1.0),
    "memory_efficiency": _Column("a part of 1", default=1.0, most=1.0),
    "link_efficiency": _Column("a part of 1", default=1.0, most=1.0),
    "half_size_mb": _Column("MB", positive=False, default=0.0),
}
_COUNTS = {
    "per_host": _Column("devices, 0 for any number", positive=False, default=8),
    "domain": _Column("devices, 0 for those of a host", positive=False, default=0),
    "cores": _Column("CPU cores, 0 for any", positive=False, default=0),
}
_OTHERS = ("match", "aliases", "shared", "source", "at", "like")


def user_file() -> Path:
    """The user's own table: ``$SPMD_INFER_HARDWARE``, else ``spmd-infer/hardware.toml`` below ``~/.config``."""
    said = os.environ.get(VARIABLE)
    if said:
        return Path(said).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "spmd-infer" / "hardware.toml"


def read_rows() -> dict[str, Row]:
    """Every device's checked row: the built-in ones, changed and extended by the user's file.

    Raises:
        PlanError: the user's file cannot be read, or a value is missing or not what its key holds.
    """
    built_in = _parse(files("spmd_infer.planning").joinpath("hardware.toml").read_text("utf-8"), "hardware.toml")
    rows = dict(built_in)
    path = user_file()
    own = read_user_rows(path)
    for name, row in own.items():
        start = rows.get(name, {})
        if "like" in row:
            if row["like"] not in rows:
                raise PlanError(f"{path}: [{name}] is like {row['like']!r}, which no entry before it is called")
            start = {k: v for k, v in rows[row["like"]].items() if k not in ("match", "aliases", "source")}
        rows[name] = start | row
    for name, row in rows.items():
        _complete(row, name, path if name in own else Path("hardware.toml"))
    return rows


def read_user_rows(path: Path) -> dict[str, Row]:
    """The rows of the user's own file, as far as they go; none where there is no such file at its default place.

    Raises:
        PlanError: the file cannot be read, or a value is not what its key holds.
    """
    try:
        return _parse(path.read_text("utf-8"), str(path))
    except FileNotFoundError as error:
        if os.environ.get(VARIABLE) and path == user_file():
            raise PlanError(f"{VARIABLE} names {path}, which does not exist") from error
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the hardware table {path}: {error}") from error


def write_user_row(name: str, row: Mapping[str, Any]) -> Path:
    """Put one entry into the user's table, in place of an older one of that name.

    Returns:
        The file.

    Raises:
        PlanError: what stands in the file already cannot be read.
        OSError: it cannot be written.
    """
    path = user_file()
    rows = read_user_rows(path) if path.exists() else {}
    rows[name] = dict(row)
    _parse(_format(rows), str(path))  # nothing is written that would not be read
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_format(rows), "utf-8")
    part.replace(path)
    return path


def _parse(text: str, where: str) -> dict[str, Row]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{where} is not TOML: {error}") from error
    for name, row in document.items():
        if not isinstance(row, dict):
            raise PlanError(f"{where}: {name!r} stands outside a device; write it under a heading such as [h100]")
        for key, value in row.items():
            _check(f"{where}: [{name}] {key}", key, value)
    return {name.lower(): row for name, row in document.items()}


def _check(where: str, key: str, value: Any) -> None:
    if key in _NUMBERS or key in _COUNTS:
        column = _NUMBERS.get(key) or _COUNTS[key]
        whole = key in _COUNTS
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or value < 0 or (column.positive and not value) or value > (column.most or float("inf")):
            raise PlanError(
                f"{where} = {value!r}: expected {'a whole number' if whole else 'a number'} ({column.unit})"
            )
    elif key in ("match", "aliases"):
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise PlanError(f"{where} = {value!r}: expected a list of names")
    elif key == "shared":
        if not isinstance(value, bool):
            raise PlanError(f"{where} = {value!r}: expected true or false")
    elif key in ("source", "like"):
        if not isinstance(value, str):
            raise PlanError(f"{where} = {value!r}: expected text")
    elif key == "at":
        if not isinstance(value, dict):
            raise PlanError(f"{where} = {value!r}: expected tables of rates by number of simulated devices")
        for count, rates in value.items():
            if not count.isdecimal() or not int(count) or not isinstance(rates, dict):
                raise PlanError(f"{where}.{count}: expected a number of simulated devices, and a table of their rates")
            for rate, number in rates.items():
                if rate not in _RATES:
                    raise PlanError(f"{where}.{count}: there is no rate {rate!r}; rates are {', '.join(_RATES)}")
                _check(f"{where}.{count} {rate}", rate, number)
    else:
        known = ", ".join([*_NUMBERS, *_COUNTS, *_OTHERS])
        raise PlanError(f"{where}: there is no such key; keys are {known}")


def _complete(row: Row, name: str, path: Path) -> None:
    """Fill in defaults in place."""
    for key, column in (_NUMBERS | _COUNTS).items():
        if key in row:
            continue
        if column.default is None:
            raise PlanError(
                f"{path}: [{name}] has no {key} ({column.unit}); give it, or start from a known device with "
                'like = "h100"'
            )
        row[key] = column.default
    row.setdefault("match", [])


def _format(rows: Mapping[str, Row]) -> str:
    lines = ["# Devices of this user, over the built-in ones. Entries are also written by spmd-infer bench --save."]
    for name, row in rows.items():
        lines += ["", f"[{_quoted(name)}]"]
        lines += [f"{key} = {_value(value)}" for key, value in row.items() if not isinstance(value, dict)]
        for count, rates in row.get("at", {}).items():
            lines += ["", f"[{_quoted(name)}.at.{count}]"]
            lines += [f"{key} = {_value(value)}" for key, value in rates.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(_quoted(item) for item in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
