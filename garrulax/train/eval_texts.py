"""Held-out texts besides the one that decides which checkpoint is best."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from garrulax.core.config import ModelConfig
from garrulax.train.batches import make_data
from garrulax.train.corpus import Corpus
from garrulax.train.infill_tokens import InfillTokenizer
from garrulax.train.rows import HostBatch
from garrulax.train.setting_limits import named_texts
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset, Encoder, build_shards


class TextTokenizer(InfillTokenizer, Encoder, Protocol):
    """The parts of a tokenizer that are used here."""


def eval_batches(
    settings: Settings, dataset: Dataset, config: ModelConfig, tokenizer: TextTokenizer
) -> Mapping[str, Callable[[], Iterator[HostBatch]]]:
    """For each of `settings.eval_texts`, a function that starts a new pass over its batches.

    All of a text is evaluated, also if it is in the corpus.

    Args:
        settings: Of the run.
        dataset: That the run trains on.
        config: Of the model.
        tokenizer: That the data set was made with.

    Raises:
        FileNotFoundError: If a source matches no file.
        ValueError: If a text is too short to predict a token of.
    """
    found = {}
    for name, sources in named_texts(settings.eval_texts).items():
        text = build_shards(Corpus(sources, valid=sources), tokenizer)
        text.train = dataset.train  # only the held-out part of these batches is read
        try:
            found[name] = make_data(text, settings, config, tokenizer).held_out
        except ValueError as error:
            raise ValueError(f"eval_texts={name}: {error}") from error
    return found
