"""adapter_config.json of the library PEFT: what is understood, what is refused, and the rank and scale of a module."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from garrulax.core.lora import check_size, scale_of
from garrulax.hub.files import is_file
from garrulax.hub.json_files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: Keys that do not change what an adapter computes, or that say what the tensors say themselves.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
#: Keys that are read.
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
#: Ways to begin that leave the weights of the model as they are.
_PLAIN_INITS = (None, True, False, "gaussian")
_UNSET: tuple[Any, ...] = (None, False, [], {}, "")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        FileNotFoundError: There is none, or no adapter_model.safetensors beside it.
        ValueError: It is damaged, or its kind of adapter is not implemented.
    """
    if not is_file(folder / CONFIG):
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is not the folder of an adapter")
    if not is_file(folder / WEIGHTS):
        pickled = (folder / "adapter_model.bin").exists()
        reason = ", only adapter_model.bin, a pickle: save it again with safe_serialization=True" if pickled else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{reason}")
    raw = read_object(folder / CONFIG)
    kind = raw.get("peft_type", "LORA")
    if kind not in ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        raise ValueError(f"{folder / CONFIG}: peft_type {kind!r} is not implemented: LORA is, and PREFIX_TUNING, "
                         "PROMPT_TUNING and P_TUNING")  # fmt: skip
    return raw


def check_lora(raw: Mapping[str, Any], label: str) -> None:
    """Checks that every key of a LoRA adapter that is set is understood.

    Args:
        raw: Content of adapter_config.json.
        label: Name of the file in errors.

    Raises:
        ValueError: It names the key.
    """
    init = raw.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"{label}: init_lora_weights={init!r} changes the weights of the model too, so the file alone "
            "is no adapter of the original: convert it in PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    for key, value in raw.items():
        if key not in _NEUTRAL and key not in _READ and value not in _UNSET:
            raise ValueError(f"{label}: {key}={str(value)[:60]!r} is not implemented")
    if raw.get("bias", "none") not in ("none", "lora_only", "all"):
        raise ValueError(f"{label}: bias={raw['bias']!r} must be none, lora_only or all")
    try:
        check_size(raw.get("r", 8), raw.get("lora_alpha", 8))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise ValueError(f"{label}: {key} is not a table of modules and numbers")


def scale_for(raw: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of a module's product, from its rank in the file and the config."""
    return scale_of(rank, alpha_for(raw, module), bool(raw.get("use_rslora")))


def alpha_for(raw: Mapping[str, Any], module: str) -> float:
    """alpha of a module."""
    return _by_pattern(raw.get("alpha_pattern"), module, raw.get("lora_alpha", 8))


def rank_for(raw: Mapping[str, Any], module: str) -> int:
    """The rank that the config gives to a module."""
    return _by_pattern(raw.get("rank_pattern"), module, raw.get("r", 8))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or an end of it after a dot, as PEFT decides."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def whole_names(raw: Mapping[str, Any], names: Iterable[str], paired: Iterable[str]) -> dict[str, str]:
    """The tensors of the model that the adapter has as a whole.

    Args:
        raw: Content of adapter_config.json.
        names: All tensors of the model, such as "lm_head.weight".
        paired: The modules with pairs.

    Returns:
        Name in the model -> name in the adapter's file, without the prefix.
    """
    saved, kind, paired = tuple(raw.get("modules_to_save") or ()), raw.get("bias", "none"), set(paired)
    found = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if saved and module.endswith(saved):
            found[name] = name
        elif last == "bias" and kind != "none" and (module in paired or kind == "all"):
            found[name] = f"{module}.base_layer.bias" if module in paired else name
    return found


def written_config(
    raw: Mapping[str, Any],
    pairs: Mapping[str, tuple[int, float]],
    modules: Iterable[str],
    transposed: bool,
) -> dict[str, Any]:
    """The adapter_config.json of pairs.

    Args:
        raw: That of the adapter as loaded or made; it is kept where it fits the pairs.
        pairs: Module -> (rank, alpha).
        modules: All modules of the model that have a weight.
        transposed: Whether the checkpoint stores the matrices as [inputs, outputs].
    """
    made = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "bias": "none", "lora_dropout": 0.0, "init_lora_weights": True, "modules_to_save": None,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": transposed,
        **raw,
    }  # fmt: skip
    fits = all((rank_for(raw, m), alpha_for(raw, m)) == pair for m, pair in pairs.items())
    if raw.get("target_modules") and fits:
        return made
    ranks, alphas = ([pair[i] for pair in pairs.values()] for i in (0, 1))
    r, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    return made | {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(m)}": rank for m, (rank, _) in pairs.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(m)}": a for m, (_, a) in pairs.items() if a != alpha},
        "target_modules": _targets(pairs, modules),
    }


def _targets(pairs: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The modules with pairs: the last parts of their names if these name no others, else the whole names."""
    paired = set(pairs)
    short = {module.rpartition(".")[2] for module in paired}
    named = {module for module in modules if module.rpartition(".")[2] in short}
    return sorted(short if named == paired else paired)
