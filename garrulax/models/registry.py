"""The families that the library knows, and their presets."""

import dataclasses
from typing import Any

from garrulax.core.config import ModelConfig
from garrulax.core.names import nearest
from garrulax.models import chatglm, falcon, glm, glm130b, gpt, gpt_neox, llama, opt
from garrulax.models.contract import Family, register

#: A new family is a word here and one in the import above.
FAMILIES: tuple[Family, ...] = tuple(
    register(file) for file in (gpt, gpt_neox, opt, glm, glm130b, llama, chatglm, falcon)
)


def family(config: ModelConfig) -> Family:
    """The family of a Config.

    Raises:
        TypeError: It is not the Config of a family.
    """
    for found in FAMILIES:
        if isinstance(config, found.Config):
            return found
    raise TypeError(
        f"{type(config).__name__} is not the Config of a family: take gx.preset(name), or model.config of a loaded one"
    )


def presets() -> list[str]:
    """Names that `preset` knows.

    Example:
        >>> import garrulax as gx
        >>> "llama3.2-1b" in gx.presets()
        True
    """
    return [name for found in FAMILIES for name in found.PRESETS]


def preset(name: str, **changes: Any) -> Any:
    """The Config of a published model, with some fields changed.

    Args:
        name: One of `presets()`.
        **changes: New values of fields of the Config. Where width or heads change, head_dim follows unless it is given.

    Returns:
        A frozen dataclass, the `Config` of the model's family.

    Raises:
        ValueError: An unknown name or field; the message names the nearest known one.

    Example:
        >>> import garrulax as gx
        >>> gx.preset("llama3.2-1b", layers=2).layers
        2
    """
    for found in FAMILIES:
        if name in found.PRESETS:
            config = found.PRESETS[name]
            fields = [field.name for field in dataclasses.fields(config)]
            for field in changes:
                if field not in fields:
                    raise ValueError(f"{name} has no field {field!r}{_hint(field, fields)}")
            if "head_dim" in fields and changes.keys() & {"width", "heads"}:
                changes = {"head_dim": 0, **changes}
            return dataclasses.replace(config, **changes)
    raise ValueError(f"unknown preset {name!r}{_hint(name, presets())}; gx.presets() lists all")


def _hint(name: str, known: list[str]) -> str:
    close = nearest(name, known, cutoff=0.3)
    return f"; did you mean {close!r}?" if close else ""
