"""Training of adapters: what the setting `lora` says, and the trained and the frozen part of the parameters."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from garrulax import models
from garrulax.core import lora, sharding, spec
from garrulax.core.config import ModelConfig
from garrulax.core.lora import Lora
from garrulax.core.lora_specs import adapter_specs, attach, chosen, module_of
from garrulax.core.spec import ParamSpec, Tree, named_specs


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The setting `lora`.

    Attributes:
        rank: Width of the adapters.
        alpha: Their products are multiplied by alpha / rank; none is twice the rank.
        targets: Which weights get adapters, as in `gx.lora`; several are joined by +.
        rslora: Whether the factor is alpha / sqrt(rank).
        dora: Whether the lengths of the columns are trained as well.
        plus: Learning rate of B divided by that of A (LoRA+, Hayou et al. 2024: 16).
        whole: Parameters that are trained as a whole, by the ends of their modules' names; several are joined by +.
        group: Tokens of a group of LongLoRA's shifted attention, in training alone; 0 attends to everything.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("all",)
    rslora: bool = False
    dora: bool = False
    plus: float = 1.0
    whole: tuple[str, ...] = ()
    group: int = 0

    def adapter(self, config: ModelConfig) -> dict[str, Any]:
        """The entries of adapter_config.json that describe such an adapter."""
        modules = {module_of(s).rpartition(".")[2] for s in _whole(models.parameters(config), self.whole).values()}
        about = {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora, "use_dora": self.dora}
        return about | ({"modules_to_save": sorted(modules)} if modules else {})


def read(words: Sequence[str]) -> LoraSettings | None:
    """The setting `lora`, a list such as ["rank=16", "targets=query+value"]; None if it is empty.

    Raises:
        ValueError: It names the part that is wrong.
    """
    if not words:
        return None
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        reader = _READERS.get(name)
        if reader is None or not equals:
            raise ValueError(f"lora={word}: write NAME=VALUE, where NAME is one of {', '.join(_READERS)}")
        try:
            values[name] = reader(text)
        except ValueError:
            raise ValueError(f"lora={word}: {text!r} is no value of {name}") from None
    found = LoraSettings(**values)
    found = dataclasses.replace(found, alpha=2 * found.rank if found.alpha is None else found.alpha)
    try:
        lora.check_size(found.rank, found.alpha)
        if found.group < 0 or found.group == 1:
            raise ValueError(f"group={found.group} must be at least 2 tokens, or 0")
        if not 0 < found.plus < float("inf"):
            raise ValueError(f"plus={found.plus} must be above 0")
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None
    return found


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _names(text: str) -> tuple[str, ...]:
    if not all(names := tuple(text.split("+"))):
        raise ValueError
    return names


_READERS: dict[str, Callable[[str], Any]] = {
    "rank": int, "alpha": float, "targets": _names, "rslora": _flag, "dora": _flag, "plus": float, "whole": _names,
    "group": int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The parts of the parameters of a run.

    Attributes:
        start: What is trained, as it begins: arrays, or a function that returns them.
        specs: ParamSpec tree of what is trained.
        frozen: The rest, an argument of every step; None where all parameters are trained.
        digest: Of the frozen weights.
    """

    start: Any
    specs: Tree
    frozen: Tree | None = None
    digest: str = ""

    def joined(self, trained: Tree) -> Tree:
        """Joins trained parameters with the frozen ones."""
        return trained if self.frozen is None else lora.join(trained, self.frozen)


def adapted(
    params: Tree | Callable[[], Tree] | None,
    config: ModelConfig,
    settings: Any,
    mesh: Mesh | None,
    specs: Tree | None = None,
) -> Adaptation:
    """The parts of the parameters of a run: with the setting `lora` its adapters are trained and the rest is frozen.

    Args:
        params: The weights to start from, or a function that reads them.
        config: Of the model.
        settings: Of the run; uses lora, seed, strategy and strict.
        mesh: To put the weights on.
        specs: ParamSpec tree of the weights, if they have more leaves than the config's family says, such as a head,
            which is trained as a whole.

    Raises:
        ValueError: There are no weights, or the settings do not go together.
    """
    of_model, made = models.parameters(config), read(settings.lora)
    specs = of_model if specs is None else specs
    if made is None:
        return Adaptation(params, specs)
    check(settings)
    if params is None:
        raise ValueError("lora needs a model with weights: name a folder, GGUF file, run or hub name, not a preset")
    heads = [path for path in spec.named_specs(specs) if path.split("/")[0] not in of_model]
    whole = frozenset([*_whole(of_model, made.whole), *heads])
    if config.tied and "tokens" in whole:
        raise ValueError("lora: the token embedding is the output head too and cannot be trained as a whole beside it")
    base = params() if callable(params) else params
    spec.check_params(specs, base)
    base = (
        jax.tree.map(jnp.asarray, base)
        if mesh is None
        else sharding.place(base, specs, mesh, settings.strategy, strict=settings.strict)
    )
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    assert made.alpha is not None
    full = attach(
        base, specs, made.targets, made.rank, made.alpha, key, rslora=made.rslora, dora=made.dora
    )  # fmt: skip
    if both := [path for path in whole if isinstance(spec.named_leaves(full)[path], Lora)]:
        raise ValueError(f"lora: {both[0]} is among targets and whole: name it once")
    start, frozen = lora.split(full, whole)
    return Adaptation(start, adapter_specs(full, specs, whole), frozen, digest(frozen))


def with_base(run: Any, adaptation: Adaptation) -> Any:
    """The `loop.Run`, which begins with the trained part, and can be resumed with the same frozen weights only."""
    if adaptation.frozen is None:
        return run
    identity = {**run.data.identity, "base": adaptation.digest}
    return dataclasses.replace(run, params=adaptation.start, data=dataclasses.replace(run.data, identity=identity))


def check(settings: Any) -> None:
    """Raises ValueError for settings that do not go with adapters."""
    for name, plain in (("quantize", "none"), ("embedding_shrink", 1.0)):
        if getattr(settings, name) != plain:
            raise ValueError(f"{name}={getattr(settings, name)} does not go with lora: leave it out")
    if settings.optimizer == "muon":
        raise ValueError("optimizer=muon is for matrices that are trained as a whole: use adamw with lora")


def check_names(words: Sequence[str], config: ModelConfig) -> None:
    """Raises ValueError if the setting `lora` names a weight that the model lacks; reads no weights."""
    found = read(words)
    if found is not None:
        chosen(models.parameters(config), found.targets)
        _whole(models.parameters(config), found.whole)


def _whole(specs: Tree, names: Sequence[str]) -> dict[str, ParamSpec]:
    """The parameters that names choose: those whose module's name ends with one, as PEFT's modules_to_save do."""
    found: dict[str, ParamSpec] = {}
    for name in names:
        matched = {
            p: s for p, s in named_specs(specs).items() if module_of(s).endswith(name) or f"/{p}".endswith(f"/{name}")
        }
        if not matched:
            raise ValueError(f"lora: whole={name} matches no parameter of this model")
        found |= matched
    return found


def plus_rates(optimizer: optax.GradientTransformation, specs: Tree, ratio: float) -> optax.GradientTransformation:
    """The optimizer with `ratio` times larger updates of every B: it begins at zero and must move more than A (LoRA+).

    Args:
        optimizer: Of the adapters.
        specs: ParamSpec tree of what is trained.
        ratio: Of the learning rates.
    """

    def factor(path: tuple, s: ParamSpec) -> float:
        return ratio if re.search(r"\.lora_B\.weight$|\.lora_embedding_B$", s.name) else 1.0

    factors = jax.tree_util.tree_map_with_path(factor, specs, is_leaf=spec.is_spec)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors), state

    return optax.GradientTransformation(optimizer.init, update)


def digest(tree: Tree) -> str:
    """A checksum of the arrays of a tree, computed where they lie: any one changed number changes it."""
    total = 0
    for name, x in sorted(spec.named_leaves(tree, lambda _: False).items()):
        total = (total * 1_000_003 + sum(map(ord, name)) + int(_checksum(x))) % 2**64
    return f"{total:016x}"


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum of a hash of each word and its place, modulo 2^32.

    The hash, the finaliser of MurmurHash3, is a bijection, so that one changed word always changes the sum. A sum of
    products would miss changes alike in all words, whose low bits are often zeros.
    """
    if x.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ place * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
    return jnp.sum(mixed ^ mixed >> np.uint32(16), dtype=jnp.uint32)
