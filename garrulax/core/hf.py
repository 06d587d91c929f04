"""Reading and writing the config.json of a Hugging Face checkpoint, by one table a family."""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

#: Keys that change nothing in what a decoder computes: bookkeeping, heads of other tasks, defaults of generation.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward classifier_dropout
    custom_pipelines decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id predict_special_tokens prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 (eighty quoted strings would be harder to read)
)


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """How a family's Config stands in config.json.

    model_type, architecture: their values there.
    fields: field of ours -> key there (the first of a tuple is written, all are read).
    defaults: field -> value that the reference code takes where the key is absent; a field not listed is required.
    optional: fields for which null means none; for the others it means the default.
    fixed: key -> the one value that this family implements; anything else is refused. Absent is fine.
    ignored: further keys that change nothing.
    marker: a key that tells this family's files from another's of the same model_type.
    """

    model_type: str
    architecture: str
    fields: dict[str, str | tuple[str, ...]]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    marker: str | None = None

    def claims(self, raw: dict[str, Any]) -> bool:
        """Whether the parsed config.json is one of this family's; by its architecture where it has no model_type."""
        if self.marker is not None and self.marker not in raw:
            return False
        if "model_type" in raw:
            return raw["model_type"] == self.model_type
        return self.architecture in (raw.get("architectures") or [])

    def read(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Fields of ours from the parsed config.json; lists become tuples.

        Raises ValueError naming the keys that are missing, unknown, contradict each other, or have a value that is
        not implemented.
        """
        values, known = {}, {"model_type", *self.fixed, *self.ignored, *IRRELEVANT}
        for field, keys in self.fields.items():
            names = (keys,) if isinstance(keys, str) else keys
            known.update(names)
            found = {k: raw[k] for k in names if raw.get(k) is not None}
            first = next(iter(found.values()), None)
            if any(value is not first and value != first for value in found.values()):
                raise ValueError(
                    f"config.json: {' and '.join(f'{k}={reprlib.repr(v)}' for k, v in found.items())} disagree"
                )
            if found:
                values[field] = tuple(first) if isinstance(first, list) else first
            elif field in self.optional and any(k in raw for k in names):
                values[field] = None
            elif field in self.defaults:
                values[field] = self.defaults[field]
            else:
                raise ValueError(f"config.json of a {self.model_type} lacks {names[0]!r}")
        for key, value in self.fixed.items():
            if key in raw and raw[key] != value:
                raise ValueError(f"config.json: {key}={reprlib.repr(raw[key])} is not implemented (only {value!r})")
        unknown = sorted(raw.keys() - known)
        if unknown:
            named = ", ".join(key[:40] if key.isprintable() else reprlib.repr(key) for key in unknown[:12])
            raise ValueError(f"config.json of a {self.model_type} has unknown keys {named}")
        return values

    def write(self, config: Any) -> dict[str, Any]:
        """The config.json of `config`, which `read` turns back into it."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field, keys in self.fields.items():
            value = getattr(config, field)
            out[keys if isinstance(keys, str) else keys[0]] = list(value) if isinstance(value, tuple) else value
        return {**out, **self.fixed}


def claimant(dialects: Sequence[HFConfig], raw: dict[str, Any]) -> HFConfig:
    """The first of a family's dialects that claims the parsed config.json. Raises ValueError where none does."""
    for dialect in dialects:
        if dialect.claims(raw):
            return dialect
    known = ", ".join(dict.fromkeys(dialect.model_type for dialect in dialects))
    raise ValueError(f"config.json: model_type={reprlib.repr(raw.get('model_type'))} is not of this family ({known})")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tensor names in a checkpoint beyond those of the ParamSpec tree.

    prefix: what bare checkpoints (without a language-model head) leave out of every name.
    extra_prefix: what some checkpoints put before every name.
    tied: tensor -> the tensor it equals; either may stand in a file, only the second is written.
    buffers: endings of the names of constants, which are skipped.
    """

    prefix: str = ""
    extra_prefix: str = ""
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
