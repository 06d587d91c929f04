"""Held-out texts besides the one that decides which checkpoint is best."""

import dataclasses
from typing import Protocol

from garrulax.core.config import ModelConfig
from garrulax.train.batches import Data, make_data
from garrulax.train.corpus import Corpus
from garrulax.train.data_identity import EVAL_TEXT
from garrulax.train.infill_tokens import InfillTokenizer
from garrulax.train.setting_limits import named_texts
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset, Encoder, build_shards


class TextTokenizer(InfillTokenizer, Encoder, Protocol):
    """The parts of a tokenizer that are used here."""


def with_eval_texts(
    data: Data, settings: Settings, dataset: Dataset, config: ModelConfig, tokenizer: TextTokenizer
) -> Data:
    """The data of a run with the batches of each of `settings.eval_texts`, and the hash of each text in its identity.

    All of a text is evaluated, also if it is in the corpus.

    Args:
        data: Of the run.
        settings: Of the run.
        dataset: That the run trains on.
        config: Of the model.
        tokenizer: That the data set was made with.

    Raises:
        FileNotFoundError: If a source matches no file.
        ValueError: If a text is too short to predict a token of.
    """
    found, identity = {}, dict(data.identity)
    for name, sources in named_texts(settings.eval_texts).items():
        try:
            text = build_shards(Corpus(sources, valid=sources), tokenizer)
            text.train = dataset.train  # only the held-out part of these batches is read
            found[name] = make_data(text, settings, config, tokenizer).held_out
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"eval_texts={name}: {error}") from error
        identity[f"{EVAL_TEXT}{name}"] = str(text.meta["corpus"])
    return dataclasses.replace(data, eval_texts=found, identity=identity)
