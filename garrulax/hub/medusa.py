"""Medusa heads in the layout of FasterDecoding/Medusa: config.json, and the tensors of the heads.

config.json has medusa_num_heads, medusa_num_layers and base_model_name_or_path. The file medusa_lm_head.safetensors has
`{i}.{n}.linear.weight` and `.bias` for residual block n of head i, and `{i}.{layers}.weight` for its output matrix.
Checkpoints of model and heads together have the same names behind `medusa_head.`, and are read too. For heads that
choose from some tokens only, config.json lists the ids of these under medusa_tokens. This key and medusa_accuracy, how
often each guess of each head was right, are our own.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.leaf import dtype_of
from garrulax.hub import streaming
from garrulax.hub.download import find_folder
from garrulax.hub.json_files import read_object
from garrulax.hub.replacing import replacing
from garrulax.hub.tensors import StoredTensor, open_tensors, write_tensors
from garrulax.hub.writing import check_replaceable
from garrulax.models import medusa
from garrulax.models.unpack import ModelLike, unpack_model

FILE = "medusa_lm_head.safetensors"
PREFIX = "medusa_head."


def save_medusa(heads: medusa.MedusaHeads, path: str | Path) -> None:
    """Saves Medusa heads as a folder.

    Args:
        heads: From `train_medusa` or `load_medusa`.
        path: The folder; heads that are there are replaced.

    Raises:
        ValueError: `path` holds other files, or the parameters do not fit the settings of the heads.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.models import medusa
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save_medusa(medusa.init(model, heads=2), folder)
        ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['config.json', 'medusa_lm_head.safetensors']
    """
    c, specs = heads.config, medusa.parameters(heads.config)
    spec.check_params(specs, heads.params)
    raw: dict[str, Any] = {
        "medusa_num_heads": c.heads,
        "medusa_num_layers": c.layers,
        "base_model_name_or_path": c.base,
        "hidden_size": c.width,
        "vocab_size": c.vocab,
    }
    medusa.check_tokens(heads.tokens, c)
    if heads.tokens is not None:
        raw["medusa_tokens"] = np.asarray(heads.tokens).tolist()
    if heads.accuracy is not None:
        raw["medusa_accuracy"] = [[round(float(x), 5) for x in row] for row in heads.accuracy]
    named, values = spec.named_specs(specs), spec.named_leaves(heads.params)
    layout = {s.name: (np.dtype(values[k].dtype), s.layout.stored_shape) for k, s in named.items()}

    def stored(key: str, s: spec.ParamSpec) -> np.ndarray:
        dtype, shape = layout[s.name]
        out = np.empty(shape, dtype)
        s.layout.write(np.asarray(values[key]), out)
        return out

    with replacing(Path(path).expanduser().resolve(), check_replaceable) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder / FILE, layout, (stored(key, s) for key, s in named.items()))


def load_medusa(path: str | Path, model: ModelLike) -> medusa.MedusaHeads:
    """Loads Medusa heads, saved by `save_medusa` or in the layout of FasterDecoding/Medusa.

    Args:
        path: The folder, or a name on the Hugging Face hub (extra `hub`).
        model: The model that the heads belong to; its dtype becomes that of the heads.

    Returns:
        The heads.

    Raises:
        FileNotFoundError: There are no heads in safetensors.
        ValueError: The heads are for another model, a tensor is missing or unknown, or config.json is damaged.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.models import medusa
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save_medusa(medusa.init(model, heads=2), folder)
        ...     heads = gx.load_medusa(folder, model)
        >>> heads.config.heads
        2
    """
    params, config, _ = unpack_model(model)
    folder = find_folder(path)
    found = open_tensors(folder)
    inside = {name.removeprefix(PREFIX): x for name, x in found.items() if name.startswith(PREFIX)}
    tensors = inside or found
    raw = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    settings, tokens = _settings(raw, folder, tensors, config)
    specs = medusa.parameters(settings)
    wanted = {s.name: s.layout.stored_shape for s in spec.named_specs(specs).values()}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        what = "misses" if odd[0] in wanted else "has an unknown tensor"
        raise ValueError(
            f"{folder} {what} {odd[0]!r}: config.json says {settings.heads} heads of {settings.layers} layers"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} is {tensors[name].shape}, the model needs {shape}: these heads are for another model"
            )
    dtype = dtype_of(params["blocks"])
    read = spec.map_specs(lambda s: _read(s, tensors[s.name], dtype), specs)
    ids = None if tokens is None else jnp.asarray(tokens, jnp.int32)
    heads = medusa.MedusaHeads(settings, read, ids, _accuracy(raw.get("medusa_accuracy"), folder, settings))
    medusa.check_heads(heads, config)
    return heads


def _settings(
    raw: dict[str, Any], folder: Path, tensors: dict[str, StoredTensor], config: ModelConfig
) -> tuple[medusa.Config, list[int] | None]:
    """The settings in config.json, and the tokens that the heads choose from."""
    heads, layers, tokens = raw.get("medusa_num_heads"), raw.get("medusa_num_layers", 1), raw.get("medusa_tokens")
    if heads is None:  # a checkpoint of model and heads may have the model's config.json only
        heads = len({name.partition(".")[0] for name in tensors})
    if tokens is not None and not (isinstance(tokens, list) and all(type(i) is int for i in tokens)):
        raise ValueError(f"{folder / 'config.json'}: medusa_tokens is not a list of ids")
    choices = None if tokens is None else len(tokens)
    base = str(raw.get("base_model_name_or_path") or "")
    try:
        settings = medusa.Config(config.width, config.vocab, heads, layers, choices, base)
        medusa.check_tokens(tokens, settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return settings, tokens


def _accuracy(shares: Any, folder: Path, c: medusa.Config) -> np.ndarray | None:
    """Returns the accuracy [k, r] of the heads from config.json, or None if the file has none."""
    if shares is None:
        return None
    try:
        table = np.asarray(shares, np.float64)
    except (TypeError, ValueError):  # no numbers, or rows of different lengths
        table = np.zeros(0)
    if table.ndim != 2 or len(table) != c.heads or not table.size or not ((table >= 0) & (table <= 1)).all():
        raise ValueError(
            f"{folder / 'config.json'}: medusa_accuracy is not {c.heads} lists, one a head, of shares from 0 to 1: "
            "leave it out"
        )
    return table


def _read(s: spec.ParamSpec, tensor: StoredTensor, dtype: np.dtype) -> jax.Array:
    if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{s.name} is stored as {tensor.dtype}: heads are floats")
    out = streaming.empty(s.shape, dtype)
    streaming.read_windows([streaming.window(tensor, s.layout, out)])
    return jax.device_put(out)
