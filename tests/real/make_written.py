"""Makes smollm2_written.json: what transformers writes after twenty prompts, greedily and with beams.

Needs the environment of make.py: python tests/real/make_written.py MODEL.gguf
"""

import json
import sys
from pathlib import Path

import gguf
import torch
import transformers
from make import HERE, bpe
from smollm2_texts import BEGINNINGS

KINDS = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3},
    "no_repeat": {"no_repeat_ngram_size": 3},
    "beams": {"num_beams": 4, "early_stopping": False, "length_penalty": 1.0},
}


def main(path):
    path = Path(path)
    fields = gguf.GGUFReader(path).fields
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    written = {}
    for kind, settings in KINDS.items():
        count = 128 if kind in ("greedy", "beams") else 64
        written[kind] = []
        for text in BEGINNINGS:
            ids = bpe(text, vocabulary, ranks)
            made = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
                **{"repetition_penalty": 1.0, **settings},
            )
            written[kind].append(made[0, len(ids) :].tolist())
        print(kind, sum(map(len, written[kind])), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "smollm2_written.json").write_text(json.dumps({"versions": versions, **written}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
