"""Keys of config.json that no table names: which change nothing, which are read with a warning, which are refused.

Every tool that writes a model folder adds keys of its own to config.json, so no list of harmless ones is ever complete;
and a key that is skipped wrongly makes a model that runs and writes nonsense. `check_unknown` sorts them by this rule,
whose first line that fits decides:

1. a key of quantisation with a value: refused as quantised (`check_quantised`);
2. a key in a table of pinned keys: only the value that the family computes anyway;
3. a name in the form of bookkeeping, such as `*_token_id` or `_*`: nothing;
4. null, and a dropout of 0: nothing. `false` is not: `is_causal: false` makes another model;
5. an empty value: a warning;
6. a name with a word of architecture in it, such as rope, norm or bias: refused;
7. anything else: a warning.

Lines 4, 5 and 7 hold only where config.json names the family's own class and no code beside it. Where the code that a
checkpoint brings along may read the key, as ChatGLM's, it is refused. A caller's `ignore` leaves keys out of all this.
"""

import json
import logging
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from garrulax.core.names import nearest

_log = logging.getLogger("garrulax")

#: Whether a value of a key is what the family computes anyway: a function of the value, the fields of the Config that
#: were read, and config.json.
Pin = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], bool]
#: Key -> the one value that it may have, or a function that says which.
Pins = Mapping[str, Pin | bool | None]


def is_width_over_heads(value: Any, fields: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """The pin of head_dim where it is not a setting."""
    return value * fields["heads"] == fields["width"]


#: Pinned keys of all families.
PINNED: Pins = {
    "is_causal": True, "add_cross_attention": False, "cross_attention_hidden_size": None,
    "is_llama_config": True, "rope_interleaved": False,  # written by nanotron (SmolLM)
    "use_sliding_window": False, "use_mrope": False, "use_moe": False, "use_qk_norm": False, "qk_norm": False,
    "qk_layernorm": False, "lm_head_bias": False,
    # Of Gemma 2. null is off; transformers divides by any number, by 0 too.
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip

#: Names of bookkeeping: whatever their value, they do not change what a decoder computes.
_BOOKKEEPING = re.compile(
    r"_.*|.*_token_ids?|(bos|eos|pad|unk|sep|cls|mask|additional_special)_tokens?|.*_version|unsloth_.*|neftune_.*"
    r"|tokenizer_.*|bad_words_ids?|(.*_)?max_length|(max_)?(seq|sequence)_(len|length)|max_new_tokens"
    r"|(use_)?(flash|fused?)_.*|use_flash.*"  # another implementation of the same
)

#: Words of architecture: parts of a name that are one of the first, or contain one of the second.
_WORDS = frozenset(
    """
    rope ntk yarn pos attn kv qkv head heads ln eps act mlp ff ffn glu moe mup tie tied dim cap alpha emb mask shared
    topk skip
    """.split()  # noqa: SIM905 (thirty quoted strings would be harder to read)
)
_STEMS = re.compile(
    "rotary|alibi|position|frequenc|theta|attention|softmax|softcap|causal|direction|window|sliding|sparse|dilat|sink"
    "|norm|epsilon|bias|scal[ei]|multiplier|logit|expert|router|gat[ei]|activation|[gr]elu|silu|layer|block|residual"
    "|embe?d|hidden|intermediate|expand|conv|recurren|interleav|drop"
)
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")

_QUANTISATION = re.compile(r"(?!_).*(quantiz|quantis|quant_|quant$)|compression_config|load_in_\d+bit|(.*_)?w?bits?$")


def check_quantised(raw: Mapping[str, Any]) -> None:
    """Raises ValueError if a key of config.json says that the weights are quantised."""
    for key, value in raw.items():
        if is_quantisation(key) and not _says_no(value):
            said = _shown(key) if isinstance(value, dict) else f"{_shown(key)}={reprlib.repr(value)}"
            raise ValueError(
                f"config.json: {said} is not implemented: the weights are quantised ({_method(key, value)}). Take the "
                f"checkpoint from which they were made; if they are not quantised, ignore=[{key[:40]!r}] or --ignore"
            )


def is_quantisation(key: str) -> bool:
    """Whether a key of config.json describes a quantisation, such as quantization_config."""
    return _QUANTISATION.match(key) is not None


def _says_no(value: Any) -> bool:
    if isinstance(value, dict):
        switches = [v for key, v in value.items() if re.fullmatch(r"_?load_in_\d+bit", key)]  # of bitsandbytes
        return all(_says_no(v) for v in switches or value.values())
    return not value or value == "none"


def _method(key: str, value: Any) -> str:
    """The method and the bits of a quantisation, as far as its key in config.json says them."""
    if not isinstance(value, dict):
        return f"{value} bits" if type(value) is int else _shown(key)
    names = [_shown(str(value[k])) for k in ("quant_method", "quant_algo", "format") if value.get(k)][:1]
    bits = [f"{value[k]} bits" for k in ("bits", "w_bit") if type(value.get(k)) is int][:1]
    return ", ".join(names + bits) or _shown(key)


def check_unknown(
    raw: Mapping[str, Any],
    known: Collection[str],
    fields: Mapping[str, Any],
    model_type: str,
    architecture: str,
    pinned: Pins,
    remote: bool,
) -> None:
    """Sorts the keys of a parsed config.json that no table names, by the rule above.

    Args:
        raw: The parsed file.
        known: Keys that a table names.
        fields: The fields of the Config that were read.
        model_type: Of the format, for messages.
        architecture: The format's own class.
        pinned: Pinned keys of the format; those of all formats are added.
        remote: Whether the format is that of code that lies beside its checkpoints.

    Raises:
        ValueError: A key may change what the model computes; the message names it and the way out.
    """
    own = not remote and _is_own_class(raw.get("architectures"), architecture)
    code = remote_code(raw)
    pins = {**PINNED, **pinned}
    refused: dict[str, str] = {}  # key -> how the message shows it
    skipped = []
    for key in sorted(raw.keys() - known):
        value = raw[key]
        if is_quantisation(key):  # it says no: see `check_quantised`
            continue
        if key in pins:
            if not (_holds(pins[key], value, fields, raw) or (value is None and own and not code)):
                only = "" if callable(pins[key]) else f" (only {json.dumps(pins[key])} is implemented)"
                refused[key] = f"{_shown(key)}={reprlib.repr(value)}{only}"
        elif _BOOKKEEPING.fullmatch(key):
            continue
        elif not own or code or not key.isprintable():
            refused[key] = _shown(key)
        elif value is None or (value == 0 and value is not False and ("drop" in key or "expert" in key)):
            continue
        elif value in ([], {}, "") or not _names_architecture(key):
            skipped.append(_shown(key))
        else:
            refused[key] = _shown(key)
    if refused:
        some = ", ".join([repr(key[:40]) for key in refused][:2] + ["..."] * (len(refused) > 2))
        raise ValueError(
            f"config.json of a {model_type} has unknown keys {_some(list(refused.values()))}: if they do not change "
            f"what the model computes, leave them out with ignore=[{some}] or --ignore"
        )
    if skipped:
        _log.warning("config.json of a %s has keys that are not read: %s", model_type, _some(skipped))
    if code and not remote:
        _log.warning(
            "config.json of a %s names code of its own (%s), which is not run: the model is computed as a %s",
            model_type, _some(code), architecture,
        )  # fmt: skip
    elif not own and not remote:
        _log.warning(
            "config.json of a %s names the class %s: the model is computed as a %s",
            model_type, reprlib.repr(raw["architectures"]), architecture,
        )  # fmt: skip


def remote_code(raw: Mapping[str, Any]) -> list[str]:
    """The modules of model code outside of transformers that config.json's auto_map names."""
    table = raw.get("auto_map")
    if not isinstance(table, dict):
        return [] if not table else [reprlib.repr(table)]
    found = [
        value for key, value in table.items() if key == "AutoConfig" or key.startswith(("AutoModel", "Flax", "TF"))
    ]
    return list(dict.fromkeys(_shown(str(value).rpartition(".")[0]) for value in found if value))


def _is_own_class(named: Any, architecture: str) -> bool:
    """Whether the names in `architectures`, if any, are of the model of `architecture`, whatever its task."""
    if not named:
        return True
    names = [named] if isinstance(named, str) else named
    return isinstance(names, list) and all(isinstance(n, str) and _stem(n) == _stem(architecture) for n in names)


def _stem(name: str) -> str:
    name = re.sub(r"^(TF|Flax)(?=[A-Z])", "", name)
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|PreTrainedModel|Model)$", "", name).lower()


def _holds(pin: Pin | bool | None, value: Any, fields: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    return bool(pin(value, fields, raw)) if callable(pin) else value is pin


def _names_architecture(key: str) -> bool:
    parts = [part.lower() for part in _PARTS.findall(key)]
    return any(part in _WORDS or _STEMS.search(part) for part in parts)


def _shown(key: str) -> str:
    return key[:40] if key.isprintable() else reprlib.repr(key)


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def without(raw: Mapping[str, Any], ignore: Collection[str], label: str = "config.json") -> dict[str, Any]:
    """A parsed config.json without some keys.

    Args:
        raw: The parsed file.
        ignore: Names of keys to leave out, as if the file did not have them; "rope_scaling.factor" names the key factor
            in the object rope_scaling.
        label: Name of the file, for messages.

    Raises:
        TypeError: `ignore` is one string, not several.
        ValueError: The file does not have one of the keys: it is misspelt, and another is read.
    """
    if isinstance(ignore, str):
        raise TypeError(f"ignore={ignore!r} must be a list of keys of config.json")
    inside = [f"{outer}.{inner}" for outer, value in raw.items() if isinstance(value, dict) for inner in value]
    known = [*raw, *inside]
    if absent := [name for name in ignore if name not in known]:
        close = nearest(str(absent[0]), known)
        hint = f" (the nearest is {close[:80]!r})" if close else ""
        raise ValueError(f"ignore names {str(absent[0])[:80]!r}, which is no key of {label}{hint}")
    kept = {key: value for key, value in raw.items() if key not in ignore}
    for outer, value in kept.items():
        if isinstance(value, dict):
            kept[outer] = {inner: v for inner, v in value.items() if f"{outer}.{inner}" not in ignore}
    return kept
