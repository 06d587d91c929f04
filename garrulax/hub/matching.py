"""Matches the tensors of a checkpoint with the ParamSpec tree of its model, under the names that tools give them."""

import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.hf import TensorNames
from garrulax.hub import streaming
from garrulax.hub.tensors import DTYPES, INDEX, StoredTensor, read_index
from garrulax.models import family

#: Endings of the names of rotary tables, which every program computes itself. They are skipped in all families.
ROTARY_TABLES = (
    *("inv_freq", "cos_cached", "sin_cached", "rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin", "rope_cos"),
    *("rope_sin", "rotary_emb.cos", "rotary_emb.sin"),
)
#: Endings of the names of other constants: masks and the numbers of the positions.
_CONSTANTS = ("causal_mask", "masked_bias", "position_ids")
#: Modules that torch.compile, FSDP, activation checkpointing and DeepSpeed wrap around others: parts of names.
_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)\."
)
#: Parts of the names of PEFT's tensors: adapters, which belong into the weights, and weights that adapters replace.
_ADAPTERS = re.compile(
    r"\.(lora_[A-Za-z]\w*|base_layer|modules_to_save|original_module|ia3_\w+|oft_\w+|hada_\w+)(\.|$)"
)
#: Endings of the names of quantised tensors and their scales: GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|weight\.(absmax|quant_map|nested_absmax|quant_state\..*)|weight_scale(_inv)?"
    r"|weight_packed|weight_zero_point|input_scale)$"
)


def match(
    found: dict[str, StoredTensor], specs: spec.Tree, config: ModelConfig, folder: Path | str
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the names in the ParamSpec tree.

    Missing prefixes are added and extra ones removed, buffers are dropped, and of two tied tensors one is kept.

    Args:
        found: The tensors of the checkpoint, by their names there.
        specs: ParamSpec tree of the model.
        config: The configuration of the model.
        folder: The folder, for messages.

    Raises:
        FileNotFoundError: A tensor is in a file that the folder's index names and that is missing.
        ValueError: The tensors do not fit `specs`; the message names every kind of misfit.
    """
    _check_amounts(found, specs, folder)
    _check_adapters(found, folder)
    more = family(config).tensor_names(config)
    buffers = (*more.buffers, *ROTARY_TABLES, *_CONSTANTS)
    ties = dict.fromkeys(more.heads, specs["tokens"].name) if config.tied and "tokens" in specs else {}
    wanted = {name: s for s in jax.tree.leaves(specs, is_leaf=spec.is_spec) for name in s.names}
    known = wanted.keys() | ties.keys()
    tensors, unknown, twice = {}, [], []
    for stored, name in _known_names(found, known, more, buffers).items():
        if name is None:
            if not stored.endswith(buffers):
                unknown.append(stored)
        elif name in tensors:
            twice.append(stored)
        else:
            tensors[name] = found[stored]
    tied = {name: tensors.pop(name) for name in ties if name in tensors}
    for name, tensor in tied.items():
        tensors.setdefault(ties[name], tensor)
    missing = [name for name in wanted if name not in tensors]
    shapes, kinds = [], []
    for name, tensor in tensors.items():
        expected = wanted[name].layout.stored_shape
        if tensor.shape != expected:
            shapes.append(f"{name} is {tensor.shape}, not {expected}")
        if tensor.dtype not in DTYPES:
            kinds.append(f"{name} is {tensor.dtype}")
    problems = [
        _listed("missing", missing),
        _listed("unknown", unknown),
        _listed("given twice under names that mean the same", twice),
        _listed("of a shape that config.json does not give", shapes),
        _listed(f"of a dtype that is not {', '.join(DTYPES)}", kinds),
    ]
    if any(problems):
        problems += _hints(missing, unknown, specs, _claims(Path(folder), missing, known, more, buffers))
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(filter(None, problems))}")
    for name, tensor in tied.items():
        if not _same_numbers(tensor, tensors[ties[name]]):
            raise ValueError(
                f"config.json ties {name} to {ties[name]}, but they differ: it should say tie_word_embeddings=false"
            )
    return tensors


def _known_names(
    stored: Collection[str], known: Collection[str], more: TensorNames, buffers: tuple[str, ...]
) -> dict[str, str | None]:
    """Stored name -> known name, None where there is none; with the prefixes of tools removed if more names then fit.

    Nothing can be mistaken, because afterwards all names and shapes must fit.
    """
    best: list[str | None] = []
    fewest = len(stored) + 1
    for names in _readings(list(stored)):
        found = [_canonical(name, known, more) for name in names]
        unknown = sum(name is None and not n.endswith(buffers) for name, n in zip(found, names, strict=True))
        if unknown < fewest:
            best, fewest = found, unknown
        if not fewest:
            break
    return dict(zip(stored, best, strict=True))


def _readings(stored: list[str]) -> Iterator[list[str]]:
    """The names as stored; without the modules that tools wrap around others; and without each common beginning."""
    yield stored
    names = [_WRAPPERS.sub("", name) for name in stored]
    yield names
    for length in _common_lengths(names):
        yield [name[length:] for name in names]


def _common_lengths(names: list[str], most: int = 8) -> list[int]:
    """Lengths of the beginnings "a.", "a.b." and so on that all names have."""
    first, last = min(names, default=""), max(names, default="")  # what these two share, all names between them do
    common = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(first, last, strict=False))
    return [at + 1 for at, (letter, _) in enumerate(common) if letter == "."][:most]


def _canonical(stored: str, known: Collection[str], more: TensorNames) -> str | None:
    """The known name of a stored tensor, with prefixes corrected; None if it is unknown."""
    short = stored.removeprefix(more.extra_prefix)
    return next((name for name in (stored, short, more.prefix + short) if name in known), None)


def _listed(what: str, names: list[str], shown: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


def _claims(
    folder: Path, missing: list[str], known: Collection[str], more: TensorNames, buffers: tuple[str, ...]
) -> dict[str, str]:
    """Missing tensor -> the file in which the folder's index places it.

    Raises:
        FileNotFoundError: One of these files is missing.
    """
    index = read_index(folder) if missing else {}
    places = {name: index[stored] for stored, name in _known_names(index, known, more, buffers).items() if name}
    claims = {name: places[name] for name in missing if name in places}
    _check_files(folder, index, claims.values())
    return claims


def _check_files(folder: Path, index: dict[str, str], needed: Collection[str]) -> None:
    """Raises FileNotFoundError if one of the files that are needed is not there."""
    for file in sorted(set(needed)):
        if not (folder / file).exists():
            count = len(set(index.values()))
            raise FileNotFoundError(f"{folder} lacks {file}, one of the {count} files that {INDEX} names")


def _hints(missing: list[str], unknown: list[str], specs: spec.Tree, claims: dict[str, str]) -> list[str]:
    """Possible causes of a misfit between tensors and config.json, each with the remedy."""
    hints = []
    if claims:
        name, file = next(iter(claims.items()))
        hints.append(f"{INDEX} places {name} in {file}, which does not hold it")
    if "head" in specs and missing == [specs["head"].name]:
        hints.append("if the output head is the token embedding, config.json should say tie_word_embeddings=true")
    quantised = next((name for name in unknown if _QUANTISED.search(name)), None)
    if quantised:
        hints.append(f"{quantised} is part of quantised weights, which are not implemented")
    lengths = _common_lengths(unknown) if len(unknown) > 1 else []
    if lengths and not quantised:
        hints.append(f"all unknown names begin with {unknown[0][: lengths[-1]]!r}")
    return hints


def _check_adapters(found: Collection[str], folder: Path | str) -> None:
    """Raises ValueError if the tensors are those of an adapter, or of a model that still has one."""
    names = [name for name in found if _ADAPTERS.search(name)]
    if names:
        raise ValueError(
            f"{folder} holds an adapter that is not merged into the weights ({len(names)} tensors such as {names[0]}): "
            "merge it first, with peft's merge_and_unload(), and save the model"
        )


def _check_amounts(found: Collection[str], specs: spec.Tree, folder: Path | str, spare: int = 1000) -> None:
    """Raises ValueError if config.json asks for far more tensors than exist; their names could fill the memory."""
    leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    names = sum({s.name: max(s.layers, 1) for s in leaves}.values())
    if names > len(found) + spare:
        index = read_index(Path(folder))
        _check_files(Path(folder), index, index.values())
        raise ValueError(f"config.json asks for {names:,} tensors, but {folder} holds {len(found):,}")


def _same_numbers(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, of whatever dtypes; takes the memory of two chunks."""
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    wide = np.result_type(*(np.float64 if t.dtype == "F64" else np.float32 for t in (a, b)))
    pairs = itertools.zip_longest(streaming.chunks(a), streaming.chunks(b))
    return all(np.array_equal(x.astype(wide), y.astype(wide), equal_nan=True) for x, y in pairs)
