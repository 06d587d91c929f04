"""The start of `garrulax train`: a preset, a model with weights, or the folder of a run."""

import argparse
import dataclasses
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import garrulax as gx
from garrulax import models
from garrulax.cli.models import find_model
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import make_mesh
from garrulax.core.spec import Tree
from garrulax.hub.json_files import read_object
from garrulax.hub.tokenizer_training import train_chars, train_sentencepiece
from garrulax.hub.tokenizers import GLM_SPECIALS, GPT_SPECIALS, ByteTokenizer, Tokenizer, load_tokenizer
from garrulax.train import lora
from garrulax.train import settings as settings_
from garrulax.train.corpus import Corpora, Corpus
from garrulax.train.data_identity import EVAL_TEXT
from garrulax.train.digests import DamagedError
from garrulax.train.setting_limits import named_texts
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset, default_root, find_shards
from garrulax.train.sources import STDLIB, expanded, mixture, split_weight
from garrulax.train.spare import TOKENIZER

_GENERATION = "generation_config.json"
#: Settings that decide what the text of a run is.
_OF_THE_TEXT = ("corpus", "valid", "dedup", "dedup_threshold")


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        settings: Of the run.
        folder: Of the run.
        model: Config and perhaps tokenizer, without weights. `garrulax.save` with the trained weights in their place
            keeps everything else that came with a loaded model.
        loaded: Whether the weights come from the model that `settings.preset` names.
        recorded: Hashes of corpus and tokenizer in run.json, if a run is resumed; else empty.
        text_given: Whether a resumed run was given a setting of its text, such as another place of it.
        new_data: Whether a resumed run may go on with another text than it began with.
    """

    settings: Settings
    folder: Path
    model: gx.Model
    loaded: bool = False
    recorded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    text_given: bool = False
    new_data: bool = False

    @property
    def params(self) -> Callable[[], Tree] | None:
        """Reads the weights to start from; None draws random ones, or a checkpoint has them.

        On a mesh they are split while they are read, so that no device holds all of them.
        """
        if not self.loaded:
            return None
        s = self.settings
        if s.lora:  # frozen weights stay as they are stored: `weights` is for those that are trained
            return lambda: gx.load(find_model(s.preset)).params
        return lambda: gx.load(find_model(s.preset), self.mesh, s.weights, s.strategy).params

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the settings; None is one device. Raises ValueError if the devices do not make it."""
        return make_mesh(self.settings.mesh) if self.settings.mesh else None

    def with_params(self, params: Tree) -> gx.Model:
        """The model with trained parameters."""
        adapters = lora.read(self.settings.lora)
        about = {} if adapters is None else adapters.adapter(self.model.config)
        return self.model.replace(params=params, adapter=about)


def start(args: argparse.Namespace) -> Start:
    """The start that a command line describes; reads no weights and no text.

    Raises:
        FileExistsError: If a new run is to begin in a folder that has one.
        ValueError: If the settings are wrong, or a file of a resumed run is damaged.
    """
    options = {"mesh": args.mesh, "lora": args.lora}
    words = settings_words([*args.settings, *(f"{name}={value}" for name, value in options.items() if value)])
    if args.resume:
        return dataclasses.replace(resumed(Path(expanded(args.resume)), words), new_data=args.new_data)
    if args.new_data:
        raise ValueError("--new-data is for a run that is resumed: give its folder with --resume")
    settings, model, loaded = chosen(args.config, words)
    lora.check_names(settings.lora, model.config)
    name = f"{name_of(settings.preset)}-tuned" if loaded else settings.preset
    folder = Path(expanded(args.run)) if args.run else Path("runs", name)
    check_new(folder)
    return Start(settings, folder, model, loaded)


def check_new(folder: Path) -> None:
    """Raises FileExistsError if a folder has a run or a model in it."""
    if (folder / settings_.RUN_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a run: continue it with garrulax train --resume {shlex.quote(str(folder))}, or choose "
            "another --run"
        )
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is the folder of a model: choose another --run")


def settings_words(words: Sequence[str]) -> list[str]:
    """Words of a command line as `key=value`; a word that is no such pair, or a path, names the model."""
    is_pair = re.compile(r"[A-Za-z_][\w.]*\s*=").match
    return [word if is_pair(word) and not Path(expanded(word)).exists() else f"preset={word}" for word in words]


def chosen(file: str | None, words: Sequence[str]) -> tuple[Settings, gx.Model, bool]:
    """The settings of a new run, its model without weights, and whether the model has weights to start from.

    A name of a preset is the preset; anything else is loaded, and the defaults are those of fine-tuning.

    Raises:
        ValueError: As `settings.read_settings` does, and if the word is neither a preset nor a model.
        FileNotFoundError: If there is no such file.
    """
    changes = settings_.read_changes(file, words)
    name = changes.get("preset", Settings.preset)
    if not isinstance(name, str) or name in models.presets() or not _may_be_model(name):
        if changes.get("lora"):
            raise ValueError(f"lora needs a model with weights: {name} is a preset; name a folder or a run")
        settings, config = settings_.apply_changes(changes)
        return settings_.absolute_paths(settings), gx.Model(config, {}), False
    model = gx.load(find_model(expanded(name)), only=())
    settings, config = settings_.apply_changes(settings_.finetuning(model.config, changes), config=model.config)
    if config != model.config:  # such as another dropout; not another shape
        spec.check_params(models.parameters(config), spec.abstract(models.parameters(model.config)))
    return settings_.absolute_paths(settings), model.replace(config=config), True


def _may_be_model(name: str) -> bool:
    return Path(expanded(name)).exists() or "/" in name or name.endswith(".gguf")


def name_of(model: str) -> str:
    """The last part of a model's path or name, for the folder of a run."""
    path = Path(model)
    parts = path.parts[:-1] if path.name == "model" and len(path.parts) > 1 else path.parts  # of a run
    return parts[-1].removesuffix(".gguf")


def resumed(folder: Path, words: Sequence[str] = ()) -> Start:
    """The start of a run that goes on, with its tokenizer. `words` are settings to change, as `key=value`."""
    settings, config = settings_.read_run_file(folder, words)
    recorded = settings_.read_record(folder)["data"]
    model = gx.Model(config, {}, _checked_tokenizer(folder / TOKENIZER, recorded["tokenizer"]))
    if (folder / TOKENIZER / _GENERATION).exists():
        model = model.replace(generation=read_object(folder / TOKENIZER / _GENERATION))
    given = any(word.partition("=")[0].strip() in _OF_THE_TEXT for word in words)
    loaded = settings.preset not in models.presets()
    return Start(settings, folder, model, loaded, recorded=recorded, text_given=given)


def _checked_tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # the libraries that read tokenizers raise errors of every kind
        raise DamagedError(f"the tokenizer in {folder} is damaged: {error}; put back the one of the run") from error
    if tokenizer.fingerprint != fingerprint:
        raise DamagedError(f"the tokenizer in {folder} is not the one that the run began with: put that one back")
    return tokenizer


# -- Tokenizer --------------------------------------------------------------------------------------------------------


def with_tokenizer(begun: Start, corpus: Corpora) -> Start:
    """The start of a new run with its tokenizer: the model's own, one from a path, or one trained on the corpus."""
    with tempfile.TemporaryDirectory() as temporary:  # save and load it, as a resumed run does, to get the same ids
        _new_tokenizer(begun, corpus).save(temporary)
        tokenizer = load_tokenizer(temporary)
    return dataclasses.replace(begun, model=begun.model.replace(tokenizer=tokenizer))


def save_tokenizer(begun: Start) -> None:
    """Writes what a resumed run needs of the model besides its checkpoint into the run's folder."""
    assert begun.model.tokenizer is not None
    try:
        begun.model.tokenizer.save(begun.folder / TOKENIZER)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{begun.folder / TOKENIZER} cannot be written: {error.strerror}") from error
    if generation := getattr(begun.model, "generation", None):
        text = json.dumps(dict(generation), indent=2) + "\n"
        (begun.folder / TOKENIZER / _GENERATION).write_text(text, encoding="utf-8")


def _new_tokenizer(begun: Start, corpus: Corpora) -> Tokenizer:
    settings, model = begun.settings, begun.model
    if begun.loaded != (settings.tokenizer == "model") and settings.tokenizer in settings_.TOKENIZERS:
        if begun.loaded:
            raise ValueError(
                f"tokenizer={settings.tokenizer}: the weights of {settings.preset} belong to their own tokenizer; "
                "leave the setting out, or give the path of that tokenizer"
            )
        raise ValueError(f"tokenizer=model: the preset {settings.preset} has no tokenizer of its own")
    if settings.tokenizer == "model":
        if model.tokenizer is None:
            raise ValueError(f"{settings.preset} has no tokenizer: give the path of one with tokenizer=")
        return model.tokenizer
    specials = GPT_SPECIALS if models.blanks(model.config) is None else GLM_SPECIALS
    if settings.tokenizer == "sentencepiece":
        texts = (document.text for document in corpus.split("train"))
        try:
            return train_sentencepiece(texts, vocab=settings.vocab, specials=specials)
        except ValueError as error:
            if "vocabulary" not in str(error):
                raise
            raise ValueError(f"{error}; set it with vocab=NUMBER (now vocab={settings.vocab})") from error
    if settings.tokenizer == "chars":
        return train_chars((document.text for document in corpus), specials=specials)
    if settings.tokenizer == "bytes":
        return ByteTokenizer(specials)
    return load_tokenizer(settings.tokenizer)


def fit(config: ModelConfig, settings: Settings, tokenizer: Tokenizer) -> ModelConfig:
    """Fits a preset's config to a tokenizer.

    Args:
        config: Of the model.
        settings: Of the run.
        tokenizer: To take the control tokens from, and the size of the vocabulary if `config.vocab` is the preset's. A
            different `config.vocab`, chosen by the user, is kept.

    Raises:
        ValueError: If a control token is missing, and as `check` does.
    """
    family = models.family(config)
    if config.vocab == models.preset(settings.preset).vocab:
        config = dataclasses.replace(config, vocab=tokenizer.vocab)
    check(config, settings, tokenizer)
    # A format of checkpoints may have no token for some purpose: such a field is None, and stays so.
    control = {f: name for f, name in family.CONTROL_TOKENS.items() if getattr(config, f) is not None}
    missing = [name for name in control.values() if name not in tokenizer.specials]
    if not control:
        return dataclasses.replace(config, bos=tokenizer.bos, eos=tokenizer.eos)
    if missing or tokenizer.eos is None:
        raise ValueError(
            f"{family.__name__} needs control tokens that the tokenizer lacks: {', '.join(missing) or 'an end of text'}"
        )
    ids = {field: tokenizer.specials[name] for field, name in control.items()}
    # ChatGLM-6B has one token that ends answers and texts.
    ids |= {"eop" if config.eos is None else "eos": tokenizer.eos}
    return dataclasses.replace(config, **ids, pad=tokenizer.eos if tokenizer.pad is None else tokenizer.pad)


def check(config: ModelConfig, settings: Settings, tokenizer: Tokenizer) -> None:
    """Checks that a model can be trained with these settings and this tokenizer.

    Raises:
        ValueError: If the vocabulary is too small for the tokenizer or the window longer than the model's context.
    """
    if config.vocab < tokenizer.vocab:
        trains_one = settings.tokenizer == "sentencepiece"
        raise ValueError(
            f"model.vocab={config.vocab} is smaller than the tokenizer's {tokenizer.vocab} ids: leave out model.vocab"
            + (f", or train a smaller tokenizer with vocab={config.vocab}" if trains_one else "")
        )
    if settings.window > config.context:
        raise ValueError(f"window={settings.window} is longer than model.context={config.context}: change one of them")


# -- Text -------------------------------------------------------------------------------------------------------------


def corpora(settings: Settings) -> Corpora:
    """The corpora that the settings describe: one, or those of a mixture."""
    parts = mixture(settings.corpus)
    options: dict[str, Any] = {
        "valid": settings.valid or None,
        "dedup": settings.dedup,
        "dedup_threshold": settings.dedup_threshold,
    }
    return Corpora([Corpus(part.name, **options) for part in parts] or [Corpus(settings.corpus, **options)])


def cached_datasets(begun: Start) -> list[Dataset] | None:
    """The token ids of a resumed run, if they are in the cache and it was not given another place of its text."""
    if not begun.recorded or begun.text_given or begun.new_data or begun.model.tokenizer is None:
        return None
    try:
        found = [find_shards(corpus, begun.model.tokenizer) for corpus in begun.recorded["corpus"].split(",")]
    except DamagedError:  # `build_shards` names the file and makes them again from the text
        return None
    return [dataset for dataset in found if dataset is not None] if all(found) else None


def short(hashes: str) -> str:
    """The beginnings of the hashes of corpora, joined by commas, for people."""
    return ",".join(one[:12] for one in hashes.split(","))


def check_corpus(begun: Start, corpus: Corpora) -> None:
    """Reads the text of a run, and checks that a resumed run gets the text that it began with.

    Raises:
        FileNotFoundError: If there is no text. For a resumed run it says where the name stands and what else to give.
        ValueError: If the text is another one.
    """
    where = f"{begun.folder / 'run.json'} says corpus={','.join(begun.settings.corpus)}"
    try:
        found = corpus.hash
    except (FileNotFoundError, ValueError) as error:
        if not begun.recorded or begun.text_given:
            raise
        raise type(error)(
            f"{error}. {where}, and its token ids are not in {default_root()}: give the place of the text with "
            f"--resume {shlex.quote(str(begun.folder))} corpus=PATH, or the folder of the ids in GARRULAX_CACHE"
        ) from error
    began = begun.recorded.get("corpus", found)
    if found == began or begun.new_data:
        return
    reason = "the text has changed"
    if STDLIB in [split_weight(source).name for source in begun.settings.corpus]:
        reason = "stdlib is the source of the running Python, which is another one now (or text beside it is)"
    raise ValueError(
        f"{where}, but {reason}: sha256 {short(found)}, the run began with {short(began)}. Give that one with "
        f"corpus=PATH, or the folder of its token ids (now {default_root()}) in GARRULAX_CACHE; --new-data goes on "
        "with the new one"
    )


def check_eval_texts(begun: Start, found: Mapping[str, str]) -> None:
    """Checks that a resumed run gets the `eval_texts` that it began with. It may have further ones, or fewer.

    Args:
        begun: The start of the run.
        found: Hashes of its data (`batches.Data.identity`).

    Raises:
        ValueError: If one is another text now: its losses could not be compared with the earlier ones.
    """
    for name, sources in named_texts(begun.settings.eval_texts).items():
        now, began = (hashes.get(f"{EVAL_TEXT}{name}") for hashes in (found, begun.recorded))
        if now is None or began in (None, now) or begun.new_data:
            continue
        raise ValueError(
            f"eval_texts={name}={','.join(sources)} has changed: sha256 {short(now)}, the run began with "
            f"{short(began)}. Put that text back, give its place with eval_texts={name}=PATH, or give the new one "
            "another name; --new-data goes on with the new one under this name"
        )
