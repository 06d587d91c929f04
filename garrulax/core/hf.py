"""Reading and writing the config.json of a Hugging Face checkpoint, by one table a family."""

import dataclasses
from typing import Any

#: Keys that change nothing in what a decoder computes: bookkeeping, and defaults of old generation code.
IRRELEVANT = frozenset({
    "_name_or_path", "_commit_hash", "_attn_implementation", "architectures", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "unsloth_version",
    "use_bfloat16", "use_cache",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """How a family's Config stands in config.json.

    model_type, architecture: their values there.
    fields: field of ours -> key there (the first of a tuple is written, all are read).
    defaults: field -> value that the reference code takes where the key is absent; a field not listed is required.
    fixed: key -> the one value that this family implements; anything else is refused. Absent is fine.
    ignored: further keys that change nothing.
    """

    model_type: str
    architecture: str
    fields: dict[str, str | tuple[str, ...]]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def read(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Fields of ours from the parsed config.json.

        Raises ValueError naming the keys that are missing, unknown, or have a value that is not implemented.
        """
        values, known = {}, {"model_type", *self.fixed, *self.ignored, *IRRELEVANT}
        for field, keys in self.fields.items():
            names = (keys,) if isinstance(keys, str) else keys
            known.update(names)
            found = [raw[k] for k in names if raw.get(k) is not None]
            if found:
                values[field] = found[0]
            elif field in self.defaults:
                values[field] = self.defaults[field]
            else:
                raise ValueError(f"config.json of a {self.model_type} lacks {names[0]!r}")
        for key, value in self.fixed.items():
            if key in raw and raw[key] != value:
                raise ValueError(f"config.json: {key}={raw[key]!r} is not implemented (only {value!r})")
        unknown = sorted(raw.keys() - known)
        if unknown:
            raise ValueError(f"config.json of a {self.model_type} has unknown keys {', '.join(unknown)}")
        return values

    def write(self, config: Any) -> dict[str, Any]:
        """The config.json of `config`, which `read` turns back into it."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field, keys in self.fields.items():
            out[keys if isinstance(keys, str) else keys[0]] = getattr(config, field)
        return {**out, **self.fixed}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tensor names in a checkpoint beyond those of the Spec tree.

    prefix: what bare checkpoints (without a language-model head) leave out of every name.
    extra_prefix: what some checkpoints put before every name.
    tied: tensor -> the tensor it equals; either may stand in a file, only the second is written.
    buffers: endings of the names of constants, which are skipped.
    """

    prefix: str = ""
    extra_prefix: str = ""
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
