"""`lora`, `merge`, `load_adapter`, `save_adapter`: adapters of a model, in memory and in the folders of PEFT."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from garrulax.core import lora as pairs
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.layout import parse_pattern
from garrulax.core.lora import Lora, has_pairs
from garrulax.core.lora_specs import Rule, attach, is_head, map_parameters, module_of
from garrulax.hub import peft, prefixes
from garrulax.hub.adapter_tensors import Arrays, pairs_of, plain_names, read_pairs, write_pairs
from garrulax.hub.download import find_folder
from garrulax.hub.model import Model
from garrulax.hub.replacing import replacing
from garrulax.hub.tensors import open_file, write_tensors
from garrulax.models import family, parameters

_BASE = "base_model_name_or_path"
_FILES = {peft.CONFIG, peft.WEIGHTS, "README.md"}


def lora(
    model: Model,
    rank: int = 16,
    alpha: float = 32,
    targets: Rule = "all",
    *,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> Model:
    """The model with new LoRA adapters, which compute nothing yet: its logits are the same.

    Args:
        model: Its weights may be quantised, stacked or unstacked, on one device or sharded.
        rank: Width of the adapters.
        alpha: Their products are multiplied by alpha / rank.
        targets: "all" is every matrix of the layers. Else names of parameters ("query", "mlp/up", "tokens") or of
            modules in the checkpoint ("q_proj"), or a function (path, ParamSpec) -> bool.
        rslora: Whether the factor is alpha / sqrt(rank) (Kalajdzievski 2023).
        dora: Whether the lengths of the columns are trained as well (Liu et al. 2024).
        seed: Of the initial values.

    Returns:
        A model that shares the weights with the one given.

    Raises:
        ValueError: The rank or alpha is not above 0, a target matches nothing, or the model has adapters already.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> model = gx.lora(gx.Model(config, gx.init(config, jax.random.key(0))), rank=4, targets=["qkv"])
        >>> model.params["blocks"]["attention"]["qkv"].a.shape
        (1, 32, 4)
    """
    params = attach(
        model.params, parameters(model.config), targets, rank, alpha, jax.random.key(seed), rslora=rslora, dora=dora
    )
    about = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "use_dora": dora}
    return model.replace(params=params, adapter=about, adapters={})


def merge(model: Model) -> Model:
    """The model with its adapters added to its weights.

    The sums are computed in float32 (or float64) and rounded once to the dtype of the weights.

    Raises:
        ValueError: The model has no adapters, or the weights below them are quantised, or an adapter cannot be merged.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> model = gx.lora(gx.Model(config, gx.init(config, jax.random.key(0))))
        >>> gx.merge(model).params["blocks"]["attention"]["qkv"].shape
        (1, 32, 3, 2, 16)
    """
    if model.prefix is not None:
        raise ValueError("a prefix is no change of weights and cannot be merged")
    if not has_pairs(model.params) and not model.adapter:
        raise ValueError("the model has no adapters to merge")
    return model.replace(params=pairs.merge(model.params), adapter={}, adapters={})


def load_adapter(model: Model, path: str | Path, name: str | None = None) -> Model:
    """The model with the adapter of a PEFT folder (adapter_config.json, adapter_model.safetensors).

    It is LoRA, or a prefix or soft prompt (PREFIX_TUNING, PROMPT_TUNING, P_TUNING), which becomes `Model.prefix`. A
    folder with the prefix encoder of ChatGLM's P-tuning v2 in safetensors is read too.

    Args:
        model: The model that the adapter was trained for, without adapters in its parameters.
        path: The folder, or a name on the Hugging Face hub (extra `hub`).
        name: None puts the adapter into `params`. A name leaves them alone, and adds the model with the adapter to
            `adapters`, from which `generate(adapter=name)` takes it.

    Returns:
        A model that shares its weights with the one given, except those that the adapter brings whole. If the adapter
        treats embedding and output head differently, they are not tied any more.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The adapter is of another model, a setting of it is not implemented, or it changes the weights of
            the model too. The message names the tensor or the setting.

    Example:
        >>> import jax, tempfile, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> base = gx.Model(config, gx.init(config, jax.random.key(0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save_adapter(gx.lora(base, rank=4), folder)
        ...     model = gx.load_adapter(base, folder)
        >>> model.adapter["r"]
        4
    """
    folder = find_folder(path)
    if has_pairs(model.params) or model.prefix is not None:
        raise ValueError("the model has adapters already: give the model without them, or merge them first (gx.merge)")
    found: Any = None if (folder / peft.CONFIG).exists() else prefixes.read_chatglm(folder, model.config)
    raw = {} if found is not None else peft.read_config(folder)
    if raw.get("peft_type", "LORA") != "LORA":
        found = prefixes.read_peft(folder, raw, model.config)
    if found is not None:
        adapted = model.replace(prefix=found, adapter=raw, adapters={})
        return adapted if name is None else model.replace(adapters={**model.adapters, name: adapted})
    label = str(folder)
    peft.check_lora(raw, str(folder / peft.CONFIG))
    tensors: Arrays = {k: t.array() for k, t in plain_names(open_file(folder / peft.WEIGHTS)).items()}
    config, params = _untied(model.config, model.params, tensors)
    params = read_pairs(params, parameters(config), tensors, raw, label)
    adapted = model.replace(config=config, params=params, adapter=raw, adapters={})
    if name is None:
        return adapted
    if config != model.config:
        raise ValueError(f"{label} changes the config of the model (its head is not tied): load it without a name")
    return model.replace(adapters={**model.adapters, name: adapted})


def _untied(config: ModelConfig, params: Any, tensors: Mapping[str, Any]) -> tuple[ModelConfig, Any]:
    """The config and parameters with a head of its own, if an adapter changes only one of embedding and head."""
    if not config.tied:
        return config, params
    heads = {name.removesuffix(".weight") for name in family(config).tensor_names(config).heads}
    table = module_of(parameters(config)["tokens"])
    touched = set(pairs_of(tensors)) | {name.removesuffix(".weight") for name in tensors}
    if not touched & {*heads, table}:
        return config, params
    return dataclasses.replace(config, tied=False), {**params, "head": params["tokens"]}


def save_adapter(model: Model, path: str | Path, base: str | None = None) -> None:
    """Saves the adapter of a model as a folder that `load_adapter` and `PeftModel.from_pretrained` read.

    Args:
        model: With an adapter in its parameters.
        path: The folder; an adapter in it is replaced at once.
        base: Name or path of the model that the adapter is for, for adapter_config.json; None keeps what it says.

    Raises:
        ValueError: The model has no adapter, or one that PEFT has no form for: of an embedding that is the output head
            too. Or `path` holds other files than an adapter's.

    Example:
        >>> import jax, pathlib, tempfile, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> model = gx.lora(gx.Model(config, gx.init(config, jax.random.key(0))))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save_adapter(model, folder)
        ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if model.prefix is not None:
        raw = prefixes.config_of(model.prefix, model.adapter, model.config)
        _write(Path(path), prefixes.tensors_of(model.prefix), raw if base is None else {**raw, _BASE: base})
        return
    specs = parameters(model.config)
    if not has_pairs(model.params):
        raise ValueError("the model has no adapter to save: gx.lora makes one")
    if model.config.tied and isinstance(model.params["tokens"], Lora):
        raise ValueError("the adapter changes embedding and output head at once, which PEFT cannot say: merge it")
    written = write_pairs(model.params, specs)
    rslora = bool(model.adapter.get("use_rslora"))
    sizes = {m: (p.rank, _alpha(p.scale, p.rank, rslora)) for m, p in written.items()}
    modules = [
        n.removesuffix(".weight") for s in spec.named_specs(specs).values() if s.role != "vector" for n in s.names
    ]
    raw = peft.written_config(model.adapter, sizes, modules, _transposed(specs))
    if base is not None:
        raw[_BASE] = base
    tensors = {f"{m}.{end}": x for m, p in written.items() for end, x in p.tensors.items()}
    tensors |= _whole(model.params, specs, raw, written)
    _write(Path(path), {f"base_model.model.{name}": x for name, x in tensors.items()}, raw)


def _write(path: Path, tensors: Arrays, raw: Mapping[str, Any]) -> None:
    named = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
    folder = path.expanduser().resolve()
    with replacing(folder, _check_replaceable) as temporary:
        write_tensors(temporary / peft.WEIGHTS, {k: (x.dtype, x.shape) for k, x in named.items()}, iter(named.values()))
        text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
        (temporary / peft.CONFIG).write_text(text, encoding="utf-8")


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """alpha of a factor in float32: the whole number, if it is one."""
    alpha = scale * (rank**0.5 if rslora else rank)
    near = round(alpha)
    return near if abs(alpha - near) < 1e-5 * max(1, near) else alpha


def _transposed(specs: Any) -> bool:
    """Whether the checkpoint stores matrices as [inputs, outputs], as GPT-2 does."""
    layout = next((s.layout for s in spec.named_specs(specs).values() if s.role == "matrix"), None)
    if layout is None:
        return False
    groups, target = parse_pattern(layout.pattern, ValueError)
    return target[0] in groups[0]


def _whole(params: Any, specs: Any, raw: Mapping[str, Any], written: Mapping[str, Any]) -> Arrays:
    """The tensors that the adapter has as a whole: modules, biases, rows of a table, tables below a pair."""
    names = [name for s in spec.named_specs(specs).values() for name in s.names]
    wanted = peft.whole_names(raw, names, written)
    tables = {s.name for s in spec.named_specs(specs).values() if s.role == "embedding"}
    wanted |= {f"{m}.weight": f"{m}.base_layer.weight" for m in written if f"{m}.weight" in tables}
    rows = raw.get("trainable_token_indices")
    tensors: Arrays = {}

    def collect(path: str, s: spec.ParamSpec, w: Any, layer: int | None) -> None:
        base = w.base if isinstance(w, Lora) else w
        for i in range(s.layers) if s.layers else [layer]:
            name = s.name.format(i)
            if name in wanted:
                x = np.asarray(base[i] if s.layers else base)
                own = tensors.setdefault(wanted[name], np.empty(s.layout.stored_shape, x.dtype))
                s.layout.write(x, own)
        if rows is not None and path == "tokens" and not is_head(path):
            chosen = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
            name = f"{module_of(s)}.token_adapter.trainable_tokens_delta"
            tensors[name] = np.asarray(base)[np.array(chosen)]

    map_parameters(collect, specs, params)
    return tensors


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - _FILES):
        raise ValueError(f"{folder} holds more than an adapter: choose another folder")
