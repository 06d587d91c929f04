"""transformers' side of benchmarks/decode.py: greedy or beam search `generate` of a randomly initialised GPT-2 124M.

Prints one JSON line: seconds of each call, after a first one that is not timed.
"""

import json
import sys
import time

import torch
import transformers

prompt_length, new, runs, beams, batch = map(int, sys.argv[1:])
model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
prompt = torch.arange(1000, 1000 + prompt_length)[None] + torch.arange(batch)[:, None]
settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
seconds = []
for _ in range(runs + 1):
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    seconds.append(time.perf_counter() - start)
    if out.shape[1] != prompt_length + new:
        raise SystemExit(f"made {out.shape[1] - prompt_length} tokens, not {new}")
version = f"transformers {transformers.__version__}, torch {torch.__version__}"
print(json.dumps({"seconds": seconds[1:], "version": version}))
