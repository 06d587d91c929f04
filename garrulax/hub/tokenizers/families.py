"""Facts about the tokenizers of model families that their files do not state, and how the family is recognised.

Published folders often leave control tokens, prefixes and chat formats to Python code beside the files. That code is
never run; the table `TOKENIZER_FAMILIES` states the same facts. `recognise` finds the family of a folder by six tests.
The first that succeeds decides. They are ordered from explicit statements to mere indications:

1. `garrulax_family` in tokenizer_config.json. Our own `save` writes it, so a saved tokenizer is always read as what it
   was, even if its files were converted to another format.
2. `tokenizer_class` in tokenizer_config.json, if only one family uses the class.
3. The file name: ice_text.model is ChatGLM-6B (or GLM-130B, if config.json names it), cog-pretrain.model is GLM
   (Chinese). No other family uses these names, and they decide even if no JSON file lies beside them.
4. ChatGLM2, ChatGLM3 or GLM-4, by the class ChatGLMTokenizer or the model_type chatglm of config.json. All three
   releases use this class, this model_type and the file name tokenizer.model, so their contents decide: tiktoken ranks
   are GLM-4; a role token or the name "chatglm3" in a JSON file is ChatGLM3; the rest is ChatGLM2. This test comes
   after 3 because ChatGLM-6B has the same class too.
5. `model_type` in config.json: baichuan; for a file of tiktoken ranks, llama, mllama, glm or glm4. A llama without
   ranks is LLaMA-1 or -2, whose SentencePiece file states everything. If the model_type is missing or unknown (a
   tokenizer without its model), the number of ranks decides: LLaMA-3 has 128,000, GLM-4 has 151,329.
6. Added tokens in the files, above all in tokenizer.json: the role tokens of LLaMA-3 or of GLM-4. This test is the
   last and weakest, since fine-tuned models of other families may add such tokens; so all of a set must be present.

A folder that no test recognises has no family: its files then state everything.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from garrulax.hub.tokenizers.base import Tokenizer

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
class TokenizerFamily:
    """Facts that the code of a family adds to its tokenizer's files.

    Attributes:
        added: Control tokens whose ids follow the vocabulary, in this order; None leaves an id free. Ids that files of
            the folder list take precedence.
        names: bos_token, eos_token and pad_token, used where tokenizer_config.json does not name them.
        prefix: Control tokens before a prompt.
        suffix: Control tokens after a prompt.
        ends: Tokens besides eos that end an answer.
        chat: Name of the format (`chat.FORMATS`) of the family's chat models.
    """

    added: tuple[str | None, ...] = ()
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    chat: str | None = None


_ICE = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>"}
TOKENIZER_FAMILIES = {
    # tokenization_chatglm.py of THUDM/chatglm-6b; sat/tokenization/icetk_glm_130B of THUDM/SwissArmyTransformer
    "chatglm": TokenizerFamily(names=_ICE, suffix=("[gMASK]", "<sop>"), ends=("<eop>",), chat="chatglm"),
    "glm130b": TokenizerFamily(names=_ICE | {"eos_token": "<eod>"}, suffix=("[gMASK]", "<sop>"), ends=("<eop>",)),
    # tokenization_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b
    "chatglm2": TokenizerFamily(
        added=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        names={"pad_token": "<unk>"},
        prefix=("[gMASK]", "sop"),
        chat="chatglm2",
    ),
    "chatglm3": TokenizerFamily(
        added=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES),
        names={"pad_token": "<unk>"},
        prefix=("[gMASK]", "sop"),
        ends=("<|user|>", "<|observation|>"),
        chat="chatglm3",
    ),
    "glm4": TokenizerFamily(
        added=_GLM4,
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[gMASK]", "<sop>"),
        ends=("<|user|>", "<|observation|>"),
        chat="glm4",
    ),
    # models/llama3/tokenizer.py of meta-llama/llama-models
    "llama3": TokenizerFamily(
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
    # The role tokens of Baichuan's chat models are in generation_config.json (`ROLE_IDS`).
    "baichuan": TokenizerFamily(names={"pad_token": "<unk>"}),
    # data_utils/tokenization.py of THUDM/GLM. The Chinese ids are those of its option --fix-command-token, which the
    # Hugging Face checkpoints use. Without the option [gMASK] shares the id of <|endofpiece|>: added_tokens.json can
    # say so.
    "glm-chinese": TokenizerFamily(
        added=("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", None, *_SPANS, "[sMASK]", "[gMASK]", "[dBLOCK]"),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[CLS]",),
    ),
    "glm-gpt2": TokenizerFamily(
        added=(*_SPANS, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]", "[dBLOCK]"),
        names={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[CLS]",),
    ),
    "glm-bert": TokenizerFamily(added=_SPANS, names={"eos_token": "[PAD]", "pad_token": "[PAD]"}, prefix=("[CLS]",)),
    "glm-roberta": TokenizerFamily(
        added=_SPANS, names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, prefix=("<s>",)
    ),
}  # fmt: skip
#: tokenizer_class -> family, for the classes that only one family uses.
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
_FAMILY_OF_TYPE = {"llama": "llama3", "mllama": "llama3", "glm": "glm4", "glm4": "glm4"}  # with tiktoken ranks
_FAMILY_OF_COUNT = {128_000: "llama3", 151_329: "glm4"}


def recognise(
    file: str, config: dict[str, Any], model: dict[str, Any], added: Collection[str], ranks: int = 0
) -> str | None:
    """The family of a tokenizer file, found by the six tests that the module's docstring explains.

    Args:
        file: Name of the tokenizer file.
        config: Content of tokenizer_config.json.
        model: Content of config.json.
        added: Added tokens that files of the folder name.
        ranks: Number of ranks in a tiktoken file; 0 for other files.

    Returns:
        A key of `TOKENIZER_FAMILIES`, or None if no test succeeds.

    Raises:
        ValueError: `garrulax_family` is not a key of `TOKENIZER_FAMILIES`.
    """
    # 1. Our own `save` wrote it.
    name = config.get("garrulax_family")
    if name is not None:
        if name not in TOKENIZER_FAMILIES:
            known = ", ".join(TOKENIZER_FAMILIES)
            raise ValueError(f"tokenizer_config.json: garrulax_family {name!r} is not one of {known}")
        return name
    # 2. A class of one family only.
    tokenizer_class, model_type = config.get("tokenizer_class", ""), model.get("model_type", "")
    if tokenizer_class in CLASSES:
        return CLASSES[tokenizer_class]
    # 3. A file name of one family only.
    if file == "ice_text.model":
        return "glm130b" if "130b" in f"{model_type} {model.get('_name_or_path', '')}".lower() else "chatglm"
    if file == "cog-pretrain.model":
        return "glm-chinese"
    # 4. The three releases that share class, model_type and file name.
    if file.endswith(".model") and (tokenizer_class == "ChatGLMTokenizer" or model_type == "chatglm"):
        names = f"{config.get('name_or_path', '')} {model.get('_name_or_path', '')}".lower()
        is_third = "chatglm3" in names or "<|user|>" in added
        return "glm4" if ranks else "chatglm3" if is_third else "chatglm2"
    # 5. The model's type, and without it the number of ranks.
    if model_type == "baichuan":
        return "baichuan"
    if ranks:
        return _FAMILY_OF_TYPE.get(model_type) or _FAMILY_OF_COUNT.get(ranks)
    # 6. Control tokens.
    if {"<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"} <= set(added):
        return "llama3"
    return "glm4" if {"[gMASK]", "<sop>", "<|user|>", "<|observation|>"} <= set(added) else None


def complete_config(
    family: str | None, config: dict[str, Any], generation: dict[str, Any], added: Collection[str]
) -> dict[str, Any]:
    """tokenizer_config.json, completed with the facts of the family. Entries of the file take precedence.

    Args:
        family: A key of `TOKENIZER_FAMILIES`, or None.
        config: Content of tokenizer_config.json.
        generation: Content of generation_config.json, in which Baichuan's chat models name their role tokens.
        added: The control tokens that exist; older models of a family may lack some.
    """
    own = {} if family is None else {"garrulax_family": family}
    if family is not None:
        facts = TOKENIZER_FAMILIES[family]
        own |= {role: token for role, token in facts.names.items() if token in added or token not in facts.added}
    roles = {key: generation[key] for key in ROLE_IDS if isinstance(generation.get(key), int)}
    return own | roles | {key: value for key, value in config.items() if value is not None}


def added_tokens(family: str | None, size: int, listed: dict[str, int]) -> dict[str, int]:
    """Text -> id of the control tokens outside of the vocabulary.

    Args:
        family: A key of `TOKENIZER_FAMILIES`, or None.
        size: Number of ids in the vocabulary; the tokens of the family follow it.
        listed: Text -> id of the control tokens that files list. They take precedence, and so do their ids.
    """
    own = {} if family is None else {content: size + i for i, content in enumerate(TOKENIZER_FAMILIES[family].added)}
    return {content: i for content, i in own.items() if content and i not in listed.values()} | listed


def apply_family(tokenizer: Tokenizer, family: str | None) -> Tokenizer:
    """Gives `tokenizer` the prefix, suffix, ends and chat format of its family; a prefix from its file stays.

    Raises:
        ValueError: The tokenizer lacks a token of the family's prefix or suffix.
    """
    if family is not None:
        facts, ids = TOKENIZER_FAMILIES[family], tokenizer.specials
        if lacking := [content for content in (*facts.prefix, *facts.suffix) if content not in ids]:
            raise ValueError(f"a {family} tokenizer needs the token {lacking[0]!r}, which this one does not have")
        tokenizer.prefix = tokenizer.prefix or tuple(ids[content] for content in facts.prefix)
        tokenizer.suffix = tuple(ids[content] for content in facts.suffix)
        tokenizer.ends = tuple(ids[c] for c in facts.ends if c in ids and ids[c] != tokenizer.eos)
        tokenizer.chat_format = "baichuan" if "user_token_id" in tokenizer.config else facts.chat
    return tokenizer
