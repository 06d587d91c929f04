"""Reading and writing the config.json of a Hugging Face checkpoint, by one table a format."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from garrulax.core.hf_keys import Pins, check_quantised, check_unknown, is_quantisation

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
    return_dict_in_generate suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 (eighty quoted strings would be harder to read)
)


_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A field of a Config as a key of config.json. Made by `key`.

    Attributes:
        names: Names of the key: the first is written, all are read.
        default: Value where the key is absent, as the reference code has it (which may differ from the Config's own
            default); `_REQUIRED` where a file must have the key.
        null: Whether null stands for None; otherwise it stands for the default.
    """

    names: tuple[str, ...]
    default: Any = _REQUIRED
    null: bool = False


def key(*names: str, default: Any = _REQUIRED, null: bool = False) -> Key:
    """A `Key` from its names."""
    return Key(names, default, null)


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """A format of config.json: how the fields of a family's Config are written there.

    Attributes:
        model_type: Value of the key `model_type`.
        architecture: Value of the key `architectures`.
        fields: Field of the Config -> key of config.json.
        fixed: Key -> the one value that is implemented; anything else is refused. The key may be absent.
        ignored: Further keys that do not change what the model computes.
        pinned: Further keys that are read only with the value that the model computes anyway, and are not written.
        remote: Whether the model's code lies beside its checkpoints and not in transformers: that code may read any
            key, so that none is skipped.
        marker: A key that tells the files of this format from others of the same model_type.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Key]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    pinned: Pins = dataclasses.field(default_factory=dict)
    remote: bool = False
    marker: str | None = None

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether a parsed config.json is of this format; by its architecture where it has no model_type."""
        if self.marker is not None and self.marker not in raw:
            return False
        if "model_type" in raw:
            return raw["model_type"] == self.model_type
        return self.architecture in (raw.get("architectures") or [])

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a parsed config.json.

        Args:
            raw: The parsed file.

        Returns:
            Values of the Config's fields by name; lists become tuples.

        Raises:
            ValueError: Keys are missing, contradict each other, have a value that is not implemented, or are unknown
                and may change what the model computes (`core.hf_keys`).
        """
        check_quantised(raw)
        values = {field: self._value(key, raw) for field, key in self.fields.items()}
        for key, value in self.fixed.items():
            nothing = is_quantisation(key) or (raw.get(key) is None and not self.remote)
            if key in raw and raw[key] != value and not nothing:
                raise ValueError(f"config.json: {key}={reprlib.repr(raw[key])} is not implemented (only {value!r})")
        names = (name for key in self.fields.values() for name in key.names)
        known = {"model_type", *self.fixed, *self.ignored, *IRRELEVANT, *names}
        check_unknown(raw, known, values, self.model_type, self.architecture, self.pinned, self.remote)
        return values

    def _value(self, key: Key, raw: Mapping[str, Any]) -> Any:
        found = {name: raw[name] for name in key.names if raw.get(name) is not None}
        first = next(iter(found.values()), None)
        if any(value is not first and value != first for value in found.values()):
            raise ValueError(
                f"config.json: {' and '.join(f'{k}={reprlib.repr(v)}' for k, v in found.items())} disagree"
            )
        if found:
            return tuple(first) if isinstance(first, list) else first
        if key.null and any(name in raw for name in key.names):
            return None
        if key.default is _REQUIRED:
            raise ValueError(f"config.json of a {self.model_type} lacks {key.names[0]!r}")
        return key.default

    def write(self, config: Any, **more: Any) -> dict[str, Any]:
        """The config.json of a Config, which `read` turns back into its fields.

        Args:
            config: The Config.
            **more: Values of fields that the Config does not have, or has in another form.
        """
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field, key in self.fields.items():
            value = more[field] if field in more else getattr(config, field)
            out[key.names[0]] = list(value) if isinstance(value, tuple) else value
        return {**out, **self.fixed}


def find_format(formats: Sequence[HFConfig], raw: Mapping[str, Any]) -> HFConfig:
    """The first of a family's formats that claims a parsed config.json.

    Raises:
        ValueError: None of them does.
    """
    for found in formats:
        if found.claims(raw):
            return found
    known = ", ".join(dict.fromkeys(found.model_type for found in formats))
    raise ValueError(f"config.json: model_type={reprlib.repr(raw.get('model_type'))} is not of this family ({known})")


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Names of tensors in a checkpoint that do not follow from the ParamSpec tree.

    Attributes:
        prefix: Beginning of every name, which checkpoints without a language-model head leave out.
        extra_prefix: Beginning that some checkpoints put before every name.
        heads: Names of the output head. Where the Config ties it to the token embedding, a file may have it under any
            of them; it must equal the embedding, and is not written.
        buffers: Endings of the names of constants, which are skipped.
    """

    prefix: str = ""
    extra_prefix: str = ""
    heads: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
