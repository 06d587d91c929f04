"""RoPE settings in config.json: in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling`."""

from collections.abc import Mapping
from typing import Any

from garrulax.layers.rope import KINDS, USED, Rope

_FIELDS = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


#: Older names of kinds: files of Phi-3 from its first months say su.
_OLD_NAMES = {"su": "longrope"}
_PINNED = {"partial_rotary_factor": 1}  # further keys, with the one value that is computed anyway
_PINNED_YARN = _PINNED | {"attn_factor": 1, "extrapolation_factor": 1}


def base_in(raw: Mapping[str, Any]) -> Any:
    """The base of the angles in a parsed config.json, under any of its names; 10,000 where it has none."""
    places = (raw, raw.get("rope_parameters"), raw.get("rope_scaling"))
    found = [p["rope_theta"] for p in places if isinstance(p, Mapping) and p.get("rope_theta") is not None]
    return found[0] if found else 10_000


def rope_from_hf(raw: Mapping[str, Any], context: int) -> Rope:
    """The rotary settings in a parsed config.json.

    Args:
        raw: The parsed file.
        context: Its max_position_embeddings.

    Raises:
        ValueError: A kind or key is unknown or missing, or the two notations are both there and disagree.
    """
    found = []
    if raw.get("rope_parameters") is not None:
        found.append(_read(raw["rope_parameters"], raw.get("rope_theta"), context))
    if raw.get("rope_scaling") is not None:
        found.append(_read(raw["rope_scaling"], raw.get("rope_theta"), context))
    if not found:
        return Rope(theta=10_000.0 if raw.get("rope_theta") is None else _theta(raw["rope_theta"]))
    if any(r != found[0] for r in found):
        raise ValueError("config.json: rope_parameters and rope_scaling disagree")
    return found[0]


def _read(settings: Any, theta: float | None, context: int) -> Rope:
    if not isinstance(settings, dict):
        raise ValueError(f"config.json: the RoPE settings must be an object, not {settings!r}")
    named = [settings[name] for name in ("rope_type", "type") if settings.get(name) is not None] or ["default"]
    kinds = [_OLD_NAMES.get(name, name) if isinstance(name, str) else name for name in named]
    kind = kinds[0]
    if kind not in KINDS:
        raise ValueError(f"config.json: RoPE kind {kind!r} is not implemented: only {', '.join(KINDS)}")
    if kinds[-1] != kind:
        raise ValueError(f"config.json: the RoPE settings give two kinds, {kind!r} and {kinds[-1]!r}")
    pinned = _PINNED_YARN if kind == "yarn" else _PINNED
    known = {"rope_type", "type", "rope_theta", "finetuned", *_FIELDS.values()}  # finetuned: bookkeeping
    unknown = sorted(
        key for key, value in settings.items() if key not in known and value is not None and pinned.get(key) != value
    )
    if unknown:
        raise ValueError(
            f"config.json: RoPE settings have unknown keys {', '.join(unknown)}: if they do not change the angles, "
            f'leave them out with ignore=["rope_scaling.{unknown[0]}", ...] or --ignore'
        )
    missing = [key for key in _REQUIRED[kind] if settings.get(key) is None]
    if missing:
        old = f" ({named[0]!r} in the file, its older name)" if named[0] != kind else ""
        raise ValueError(f"config.json: RoPE kind {kind!r}{old} lacks {', '.join(missing)}")
    thetas = {_theta(t) for t in (settings.get("rope_theta"), theta) if t is not None} or {10_000.0}
    if len(thetas) > 1:
        raise ValueError(f"config.json gives two values of rope_theta: {', '.join(map(str, sorted(thetas)))}")
    values = {ours: settings[key] for ours, key in _FIELDS.items() if settings.get(key) is not None}
    for name in ("short_factors", "long_factors"):
        if name in values:
            if not isinstance(values[name], list | tuple):
                raise ValueError(f"config.json: RoPE {_FIELDS[name]} must be a list, not {values[name]!r}")
            values[name] = tuple(values[name])
    if "original_context" in USED[kind]:
        values.setdefault("original_context", context)
    else:
        values.pop("original_context", None)  # bookkeeping: the angles of this kind do not depend on it
    if kind == "dynamic" and values["original_context"] != context:
        raise ValueError("config.json: a dynamic RoPE starts from max_position_embeddings, not from another length")
    if kind == "longrope":
        values.setdefault("factor", context / values["original_context"])
    return Rope(theta=thetas.pop(), kind=kind, **values)


def _theta(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"config.json: rope_theta={value!r} must be a number")
    return float(value)


def partial_rope_from_hf(raw: Mapping[str, Any], context: int, default: float) -> tuple[Rope, float]:
    """The rotary settings in a parsed config.json, and the share of each head that is rotated.

    Args:
        raw: The parsed file. `partial_rotary_factor` is at the top, or among the rotary settings.
        context: Its max_position_embeddings.
        default: The share where the file does not say it.

    Raises:
        ValueError: As `rope_from_hf`, and where the file gives two shares.
    """
    key, cleaned = "partial_rotary_factor", dict(raw)
    found = [raw.get(key)]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(name), dict):
            cleaned[name] = {k: v for k, v in raw[name].items() if k != key}
            found.append(raw[name].get(key))
    shares = [share for share in found if share is not None] or [default]
    if any(share != shares[0] for share in shares):
        raise ValueError(f"config.json gives two values of {key}: {', '.join(map(str, shares))}")
    return rope_from_hf(cleaned, context), shares[0]


def rope_to_hf(rope: Rope, context: int, share: float | None = None) -> dict[str, Any]:
    """The config.json entries of rotary settings, in both notations.

    Args:
        rope: The settings.
        context: max_position_embeddings of the file.
        share: Share of each head that is rotated, for families where it is a setting.

    Raises:
        ValueError: A dynamic RoPE has another original context than `context`: config.json cannot say that.
    """
    settings: dict[str, Any] = {"rope_type": rope.kind}
    for ours, key in _FIELDS.items():
        value = getattr(rope, ours)
        if ours in USED[rope.kind] and value is not None:
            settings[key] = list(value) if isinstance(value, tuple) else value
    if rope.kind == "dynamic" and settings.pop("original_max_position_embeddings") != context:
        raise ValueError(f"dynamic RoPE is stored with original_context = context = {context}")
    old = {"rope_theta": rope.theta, "rope_scaling": None if rope.kind == "default" else settings}
    if share is None:
        return {**old, "rope_parameters": {**settings, "rope_theta": rope.theta}}
    partial = {"partial_rotary_factor": share}
    return {**old, **partial, "rope_parameters": {**settings, "rope_theta": rope.theta, **partial}}
