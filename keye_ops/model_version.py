"""The versions of Keye-VL, and how a config.json names them."""

from __future__ import annotations

from typing import Any, Literal, get_args

Version = Literal["preview", "1.5"]  # Keye-VL-8B-Preview, Keye-VL-1.5

_VERSION_OF_NAME: dict[str, Version] = {
    "KeyeForConditionalGeneration": "preview",
    "Keye": "preview",
    "KeyeVL1_5ForConditionalGeneration": "1.5",
    "KeyeVL1_5": "1.5",
    "keye_vl_1_5": "1.5",
}


def check_version(caller: str, version: str) -> None:
    """Raise ValueError unless ``version`` is a known one."""
    if version not in get_args(Version):
        raise ValueError(f"{caller}: version must be 'preview' or '1.5', got {version!r}")


def model_names(fields: dict[str, Any], where: str) -> list[str]:
    """The architectures and the model_type of a parsed config.json; ``where`` names it in errors.

    Raises:
        ValueError: neither is given.
    """
    names = list(fields.get("architectures") or [])
    if fields.get("model_type") is not None:
        names.append(fields["model_type"])
    if not names:
        raise ValueError(f"config: neither architectures nor model_type is given in {where}")
    return [str(name) for name in names]


def version_of(fields: dict[str, Any], where: str) -> Version:
    """The version that a parsed config.json names; ``where`` names the file in errors.

    Raises:
        ValueError: no name, an unknown one, or names of different versions.
    """
    names = model_names(fields, where)
    for name in names:
        if name not in _VERSION_OF_NAME:
            raise ValueError(
                f"config: unknown architecture {name!r} in {where}; "
                f"known: {', '.join(_VERSION_OF_NAME)}"
            )
    versions = {_VERSION_OF_NAME[name] for name in names}
    if len(versions) > 1:
        raise ValueError(
            f"config: architectures and model_type name different models {names} in {where}"
        )
    return versions.pop()
