"""What the families of models put around a text, beyond what their tokenizer files say, and how a folder is recognised.

Published folders often leave control tokens, prefixes and chat formats to Python code that lies beside them. That code
is never run: the same facts stand in `FAMILIES` here. Which one a folder means is decided, in this order, by

1. `garrulax_family` in tokenizer_config.json, which our own `save` writes;
2. `tokenizer_class` there. ChatGLMTokenizer is the class of three models: beside ice_text.model it is ChatGLM-6B, with
   a tiktoken file GLM-4, else ChatGLM2 or, if a file names a role token or "chatglm3", ChatGLM3;
3. the file: ice_text.model (ChatGLM-6B, or GLM-130B if config.json says so), cog-pretrain.model (GLM, Chinese);
4. `model_type` in config.json: chatglm as in 2, baichuan, and with a tiktoken file llama and glm4;
5. the number of ranks in a tiktoken file: 128000 is LLaMA-3, 151329 GLM-4;
6. control tokens in tokenizer.json: those of LLaMA-3's or of GLM-4's roles.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from garrulax.hub.tokenizers.base import Tokenizer, content_of

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)  # fmt: skip
_GLM4 = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES, "<|begin_of_image|>",
    "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
_SPANS = ("<|startofpiece|>", "<|endofpiece|>")


@dataclasses.dataclass(frozen=True)
class Family:
    """What the code of a family adds to its tokenizer's file.

    added: control tokens with the ids behind the vocabulary, in this order; None leaves an id free. What files of the
      folder list comes first.
    names: bos_token, eos_token and pad_token, where tokenizer_config.json does not name them.
    prefix, suffix: control tokens around a prompt. ends: tokens besides eos that end an answer.
    chat: the conversation format (`chat.FORMATS`) of its chat models.
    """

    added: tuple[str | None, ...] = ()
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    chat: str | None = None


_ICE = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>"}
FAMILIES = {
    # tokenization_chatglm.py of THUDM/chatglm-6b; sat/tokenization/icetk_glm_130B of THUDM/SwissArmyTransformer
    "chatglm": Family(names=_ICE, suffix=("[gMASK]", "<sop>"), ends=("<eop>",), chat="chatglm"),
    "glm130b": Family(names=_ICE | {"eos_token": "<eod>"}, suffix=("[gMASK]", "<sop>"), ends=("<eop>",)),
    # tokenization_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b
    "chatglm2": Family(
        added=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        names={"pad_token": "<unk>"},
        prefix=("[gMASK]", "sop"),
        chat="chatglm2",
    ),
    "chatglm3": Family(
        added=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES),
        names={"pad_token": "<unk>"},
        prefix=("[gMASK]", "sop"),
        ends=("<|user|>", "<|observation|>"),
        chat="chatglm3",
    ),
    "glm4": Family(
        added=_GLM4,
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[gMASK]", "<sop>"),
        ends=("<|user|>", "<|observation|>"),
        chat="glm4",
    ),
    # models/llama3/tokenizer.py of meta-llama/llama-models
    "llama3": Family(
        added=_LLAMA3,
        names={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
        prefix=("<|begin_of_text|>",),
        ends=("<|eom_id|>", "<|eot_id|>"),
        chat="llama3",
    ),
    "baichuan": Family(names={"pad_token": "<unk>"}),  # a chat model's generation_config.json has the role tokens
    # data_utils/tokenization.py of THUDM/GLM. The Chinese ids are those of --fix-command-token, to which the Hugging
    # Face checkpoints were moved; without it [gMASK] has <|endofpiece|>'s id, which added_tokens.json can say.
    "glm-chinese": Family(
        added=("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", None, *_SPANS, "[sMASK]", "[gMASK]", "[dBLOCK]"),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[CLS]",),
    ),
    "glm-gpt2": Family(
        added=(*_SPANS, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]", "[dBLOCK]"),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[CLS]",),
    ),
    "glm-bert": Family(added=_SPANS, names={"eos_token": "[PAD]", "pad_token": "[PAD]"}, prefix=("[CLS]",)),
    "glm-roberta": Family(
        added=_SPANS, names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, prefix=("<s>",)
    ),
}  # fmt: skip
CLASSES = {
    "GLM130BTokenizer": "glm130b",
    "ChatGLM4Tokenizer": "glm4",
    "BaichuanTokenizer": "baichuan",
    "GLMChineseTokenizer": "glm-chinese",
    "GLMGPT2Tokenizer": "glm-gpt2",
    "GLMBertTokenizer": "glm-bert",
    "GLMRobertaTokenizer": "glm-roberta",
}
ROLE_IDS = ("user_token_id", "assistant_token_id")  # keys of Baichuan's generation_config.json
_RANKS = {128_000: "llama3", 151_329: "glm4"}


def recognise(
    file: str, config: dict[str, Any], model: dict[str, Any], added: Collection[str], ranks: int = 0
) -> str | None:
    """The name of the family of a tokenizer file, or None where the files themselves say all.

    file: its name. config, model: tokenizer_config.json and config.json. added: tokens named in files.
    ranks: how many a tiktoken file has. ValueError for a `garrulax_family` that there is not.
    """
    name = config.get("garrulax_family")
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"tokenizer_config.json: garrulax_family {name!r} is not one of {', '.join(FAMILIES)}")
        return name
    of_class, model_type = config.get("tokenizer_class", ""), model.get("model_type", "")
    if of_class in CLASSES:
        return CLASSES[of_class]
    if file == "ice_text.model":
        return "glm130b" if "130b" in f"{model_type} {model.get('_name_or_path', '')}".lower() else "chatglm"
    if file == "cog-pretrain.model":
        return "glm-chinese"
    if file.endswith(".model") and (of_class == "ChatGLMTokenizer" or model_type == "chatglm"):
        named = f"{config.get('name_or_path', '')} {model.get('_name_or_path', '')}".lower()
        is_third = "chatglm3" in named or "<|user|>" in added
        return "glm4" if ranks else "chatglm3" if is_third else "chatglm2"
    if model_type == "baichuan":
        return "baichuan"
    if ranks:
        by_type = {"llama": "llama3", "mllama": "llama3", "glm": "glm4", "glm4": "glm4"}
        return by_type.get(model_type) or _RANKS.get(ranks)
    if {"<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"} <= set(added):
        return "llama3"
    return "glm4" if {"[gMASK]", "<sop>", "<|user|>", "<|observation|>"} <= set(added) else None


def complete(
    family: str | None, config: dict[str, Any], generation: dict[str, Any], added: Collection[str]
) -> dict[str, Any]:
    """tokenizer_config.json with what the family's code adds to it.

    generation: generation_config.json, in which Baichuan's chat models name their role tokens. added: the control
    tokens there are; older models of a family may lack some.
    """
    own = {} if family is None else {"garrulax_family": family}
    if family is not None:
        facts = FAMILIES[family]
        own |= {role: token for role, token in facts.names.items() if token in added or token not in facts.added}
    roles = {key: generation[key] for key in ROLE_IDS if isinstance(generation.get(key), int)}
    return own | roles | {key: value for key, value in config.items() if value is not None}


def added_tokens(family: str | None, size: int, listed: dict[str, int]) -> dict[str, int]:
    """The control tokens outside of a vocabulary of `size` ids: those that files list, and the family's elsewhere."""
    own = {} if family is None else {content: size + i for i, content in enumerate(FAMILIES[family].added)}
    return {content: i for content, i in own.items() if content and i not in listed.values()} | listed


def adopt(tokenizer: Tokenizer, family: str | None) -> Tokenizer:
    """`tokenizer`, with the prefix, suffix and conversation format of its family where its file has none."""
    if family is not None:
        facts, ids = FAMILIES[family], tokenizer.specials
        if lacking := [content for content in (*facts.prefix, *facts.suffix) if content not in ids]:
            raise ValueError(f"a {family} tokenizer needs the token {lacking[0]!r}, which this one does not have")
        tokenizer.prefix = tokenizer.prefix or tuple(ids[content] for content in facts.prefix)
        tokenizer.suffix = tuple(ids[content] for content in facts.suffix)
        tokenizer.ends = tuple(ids[c] for c in facts.ends if c in ids and ids[c] != tokenizer.eos)
        tokenizer.chat_format = "baichuan" if "user_token_id" in tokenizer.config else facts.chat
    return tokenizer


def names_of(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on as a chat template sees them."""
    names = {key: content_of(value) for key, value in config.items() if key.endswith("_token")}
    return {key: content for key, content in names.items() if isinstance(content, str)}
