"""A model class for lm-evaluation-harness (EleutherAI), which has the tasks: `Harness`.

    import lm_eval, garrulax as gx
    from garrulax.evaluate.lm_eval import Harness

    lm_eval.simple_evaluate(model=Harness(gx.load("path/to/model")), tasks=["hellaswag"])

Importing this module needs the extra `lm-eval`. It follows the harness' own class for transformers (`HFLM`), so that
the same weights get the same numbers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from garrulax import hub, models, sampling
from garrulax.evaluate.passes import BATCH_TOKENS, prepare, score_rows
from garrulax.evaluate.rows import continuation_row
from garrulax.sampling.ends import end_tokens

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"evaluation tasks need lm-evaluation-harness: pip install 'garrulax[lm-eval]' ({error})"
    ) from None


@register_model("garrulax")
class Harness(TemplateLM):
    """A model, as lm-evaluation-harness calls it.

    Control tokens that a text spells, such as those of a chat template, are read as control tokens, as the harness does
    with transformers.

    Attributes:
        model: The `garrulax.Model`.
        tokenizer: Its tokenizer.
        max_length: Tokens that a pass reads.
        max_gen_toks: Greatest number of new tokens where a task names none.
        batch_size: Texts that are generated at a time.
    """

    def __init__(
        self,
        model: hub.Model | str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        batch_tokens: int = BATCH_TOKENS,
        prefix: int | None = None,
        dtype: str | None = None,
    ):
        """Prepares a model.

        Args:
            model: From `gx.load`, or the name of what it loads.
            max_length: Tokens that a pass may read; None is the model's context. Longer texts lose their beginning.
            max_gen_toks: Greatest number of new tokens where a task names none.
            batch_size: Texts that are generated at a time.
            batch_tokens: Tokens that are scored at a time, padding included.
            prefix: Id in front of a text without a context; None is bos, or eos for models without bos.
            dtype: Of a model that is loaded here.

        Raises:
            TypeError: The model fills blanks (GLM): tasks of the harness are for models that continue texts.
            ValueError: It has no tokenizer, its tokenizer no bos and no eos, or it cannot read `max_length` tokens.
        """
        super().__init__()
        model = hub.load(model, dtype=dtype) if isinstance(model, str) else model
        params, config, _ = prepare(model)
        if models.blanks(config) is not None:
            raise TypeError("tasks of lm-evaluation-harness continue texts, but this model fills blanks: gx.score and "
                            "gx.choose score its answers")  # fmt: skip
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ValueError("lm-evaluation-harness gives texts, but the model has no tokenizer")
        most = config.max_length
        if not 1 <= (max_length := most if max_length is None else int(max_length)) <= most:
            raise ValueError(f"max_length={max_length} must be from 1 to the model's context of {most}")
        known = (prefix, tokenizer.bos, tokenizer.eos, *end_tokens(config))
        first = next((token for token in known if token is not None), None)
        if first is None:
            raise ValueError("the tokenizer has neither bos nor eos: give prefix, the id in front of a text")
        self.model, self.tokenizer, self._prefix = model, tokenizer, first
        self.max_length, self.max_gen_toks, self.batch_size = max_length, int(max_gen_toks), int(batch_size)
        self._params, self._config, self._batch_tokens = params, config, int(batch_tokens)
        self._decoder = model.replace(params=models.unstack(model.params))

    @property
    def eot_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """Id in front of a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer and its chat template, by which the harness finds its cached requests."""
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, or the name of the published format, for the harness' records."""
        if not chat_template:
            return None
        template = self.tokenizer.config.get("chat_template") or self.tokenizer.chat_format
        return template if isinstance(template, str) else json.dumps(template)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with its control tokens spelled out."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt or None,
            tokenize=False,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the tokenizer's prefix (such as bos) unless the text spells it or it is not wanted."""
        ids = self.tokenizer.encode_with_specials(string, self.tokenizer.find_specials(string))
        prefix = list(self.tokenizer.prefix)
        if add_special_tokens is False or (add_special_tokens is None and prefix and ids[: len(prefix)] == prefix):
            return ids
        return prefix + ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that do not overlap."""
        texts = [request.args[0] for request in requests]
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for text in texts
        ]
        found = iter(self._loglikelihood_tokens([(None, *window) for some in windows for window in some]))
        totals = [sum(next(found)[0] for _ in some) for some in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding writes it) of each continuation, given (key, context, ids)."""
        rows = []
        for _, context, ids in requests:
            if not context or not 1 <= len(ids) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(ids)} tokens after {len(context)} cannot be scored: both must have at "
                    f"least one, and the continuation at most {self.max_length}"
                )
            context = (context + ids)[-(self.max_length + 1) :][: -len(ids)]
            rows.append(continuation_row(context, ids, self._config))
        found = score_rows(rows, self._params, self._config, self._batch_tokens)
        answers = [(float(x.logprobs.sum(dtype="float64")), bool(x.is_argmax.all())) for x in found]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuations of contexts, up to their stop strings. A context that is too long loses its beginning."""
        texts = [""] * len(requests)
        for kwargs, group in _by_arguments(requests).values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                arguments = {"seed": batch, **normalize_gen_kwargs(kwargs, self.max_gen_toks)}  # repeats differ
                found = self._generate([requests[i].args[0] for i in batch], arguments)
                for i, text in zip(batch, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], arguments: dict[str, Any]) -> list[str]:
        """Calls `gx.generate` with the arguments of a task. An argument that it does not know raises TypeError."""
        new, stop = arguments.pop("max_gen_toks"), [text for text in arguments.pop("until") if text]
        arguments.setdefault("temperature", 0.0)
        if not arguments.pop("do_sample"):
            arguments["temperature"] = 0.0
        space = self.max_length - new
        if space < 1:
            raise ValueError(f"max_gen_toks={new} leaves no space in the model's context of {self.max_length} tokens")
        prompts = [self.tok_encode(context)[-space:] or [self.prefix_token_id] for context in contexts]
        done: Any = sampling.generate(self._decoder, prompts, max_new_tokens=new, stop=stop, **arguments)
        return [completion.text for completion in done]


def _by_arguments(requests: Sequence[Any]) -> dict[str, tuple[dict[str, Any], list[int]]]:
    """The indices of the requests with equal arguments of generation."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        kwargs = request.args[1]
        groups.setdefault(json.dumps(kwargs, sort_keys=True, default=str), (kwargs, []))[1].append(i)
    return groups
