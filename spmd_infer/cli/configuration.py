"""Option values from a YAML file.

Keys are option names without their dashes. At the top they hold for every verb that has such an option; under a verb's
name they hold for that verb alone, and win:

    mesh: data=2,model=4
    generate:
      max-tokens: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def read_configuration(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """Defaults for each verb's parameters, as Click's ``default_map``.

    Raises:
        typer.BadParameter: the file cannot be read, or names an option that does not exist.
    """
    import msgspec

    try:
        document = msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any] | None) or {}
    except (OSError, msgspec.DecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--config") from error

    verbs = {name: _parameters(command) for name, command in ctx.command.commands.items()}  # type: ignore[attr-defined]  # a group
    shared = {_key(key): value for key, value in document.items() if key not in verbs}
    known = set().union(*verbs.values())
    for key in shared:
        if key not in known:
            raise typer.BadParameter(f"{path}: no verb has an option {key!r}", param_hint="--config")

    defaults: dict[str, Any] = {}
    for verb, parameters in verbs.items():
        section = document.get(verb) or {}
        if not isinstance(section, Mapping):
            raise typer.BadParameter(f"{path}: {verb!r} must hold options, not {section!r}", param_hint="--config")
        own = {_key(key): value for key, value in section.items()}
        for key in own:
            if key not in parameters:
                choices = ", ".join(sorted(parameters))
                raise typer.BadParameter(
                    f"{path}: {verb!r} has no option {key!r}; it has {choices}", param_hint="--config"
                )
        merged = {key: value for key, value in shared.items() if key in parameters} | own
        defaults[verb] = {parameters[key]: value for key, value in merged.items()}
    return defaults


def _parameters(command: Any) -> dict[str, str]:
    """Parameter name by option name."""
    return {
        _key(option.removeprefix("--")): parameter.name
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }


def _key(name: str) -> str:
    return str(name).replace("_", "-")
