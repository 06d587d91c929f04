"""Makes smollm2.npz and smollm2.json, the numbers with which the checks of SmolLM2 compare.

Needs torch, transformers 5, accelerate, and the packages gguf and regex: python tests/real/make.py MODEL.gguf
Logits, texts and losses are those of transformers, which reads the GGUF file with the package gguf. Ids come from a
plain restatement of byte-level BPE below, because transformers reads another rule for digits into the file.
"""

import itertools
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import regex
import torch
import transformers
from smollm2_texts import AWKWARD, CONVERSATION, PASSAGE, PROMPT, QUESTIONS

HERE = Path(__file__).parent
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in BYTES} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTES)}


def bpe(text, vocabulary, ranks):
    """The ids of a text: digits apart, GPT-2's words, then the merge of the lowest rank as long as there is one."""
    ids = []
    for part in regex.split(r"(\p{N})", text):
        for word in WORDS.findall(part):
            symbols = [LETTERS[byte] for byte in word.encode()]
            while len(symbols) > 1:
                pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols)]
                if min(pairs) == len(ranks):
                    break
                at = pairs.index(min(pairs))
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            ids += [vocabulary[symbol] for symbol in symbols]
    return ids


def chat(bpe, messages):
    """The ids of a conversation by the template in the file, with the control tokens <|im_start|> 1, <|im_end|> 2."""
    ids = []
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for role, content in [("system", system), *messages]:
        ids += [1, *bpe(f"{role}\n{content}"), 2, *bpe("\n")]
    return [*ids, 1, *bpe("assistant\n")]


def main(path):
    path = Path(path)
    fields = gguf.GGUFReader(path).fields
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    plain = lambda text: bpe(text, vocabulary, ranks)  # noqa: E731

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    texts = {i: token for token, i in vocabulary.items()}
    bytes_of = {letter: byte for byte, letter in LETTERS.items()}
    text_of = lambda ids: bytes(bytes_of[c] for i in ids for c in texts[i]).decode()  # noqa: E731

    def greedy(ids, count):
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, repetition_penalty=1.0, eos_token_id=2
        )
        return made[0, len(ids) :].tolist()

    questions = [greedy(chat(plain, [("user", question)]), 40) for question in QUESTIONS]
    messages, answers = [], []
    for question in CONVERSATION:
        messages.append(("user", question))
        answers.append(greedy(chat(plain, messages), 32))
        messages.append(("assistant", text_of(i for i in answers[-1] if i != 2)))
    continued = greedy(plain(PROMPT), 40)
    passage = plain(PASSAGE)
    columns = np.random.default_rng(0).choice(49152, 256, replace=False)
    with torch.no_grad():
        logits = model(torch.tensor([passage])).logits[0]
        last = model(torch.tensor([plain(PROMPT)])).logits[0, -1]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(passage[1:]))
        half = model.to(torch.bfloat16)(torch.tensor([passage])).logits[0].float()
    np.savez_compressed(
        HERE / "smollm2.npz",
        columns=columns,
        logits=logits[:64, columns].numpy(),
        total=torch.logsumexp(logits, -1).numpy(),
        probabilities=torch.softmax(last, -1).numpy().astype(np.float32).round(7),
        bfloat16_error=(half - logits).abs().mean().numpy(),
    )
    found = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "awkward": [plain(text) for text in AWKWARD],
        "questions": questions,
        "answers": answers,
        "conversation": chat(plain, messages[:-1]),
        "continued": continued,
        "passage": passage,
        "loss": loss.item(),
    }
    (HERE / "smollm2.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
