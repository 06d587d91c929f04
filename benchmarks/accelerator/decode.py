"""Decoding on this device: a LLaMA of the shape of LLaMA-2 7B with random weights, greedy, after prompts of 128 tokens.

The time of the first call, with what is compiled; milliseconds a token, by the difference between the times of two
lengths, so that reading the prompt and starting do not count; and the share of the memory's bandwidth, from the bytes
of the weights that a step reads (all but the token embedding). The quantised forms are those of docs/quantisation.md,
group 128 for int4; every layer has the weights of one layer, in memory of its own.

Several processes share the device. GiB of weights: 12.6 in bfloat16, 6.3 in int8, 3.4 in int4, and 12.6 of PyTorch;
each has up to 1 of a cache and 0.6 of programs. With --only-first a process loads in its turn, when the one that
compiled has ended, so that there is one bfloat16 model of this library at a time. JAX's allocator grows by doubling and
reserves at most twice what it holds: 2 (12.6 + 6.3 + 3.4 + 3) + 12.6 + 1 + 5 x 0.6 = 67 GiB at most.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import garrulax as gx
from accelerator import device, timing
from accelerator.workers import emit, wait_for_turn

FORMS = ("bfloat16", "int8", "int4")
PROMPT, NEW = 128, 128
TINY_SIZES = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 2, "mlp_width": 128, "vocab": 128}


def model(form: str, tiny: bool) -> tuple[Any, Any]:
    """Unstacked parameters, and the config; texts never end."""
    config = dataclasses.replace(gx.preset("llama2-7b", **(TINY_SIZES if tiny else {})), eos=None)
    one = dataclasses.replace(config, layers=1)  # a stack of all layers would need the memory of a second model
    params = gx.init(one, jax.random.key(0), dtype="bfloat16")
    if form != "bfloat16":
        group = 32 if tiny and form == "int4" else None
        params, _ = gx.quantise((params, one), form, group=group)
    (layer,) = gx.unstack(params)["blocks"]
    return {**params, "blocks": tuple(jax.tree.map(jnp.copy, layer) for _ in range(config.layers))}, config


def weight_bytes(params: Any) -> int:
    """Bytes that a step reads: all weights but the token embedding, of which it looks rows up."""
    read = {name: x for name, x in params.items() if name != "tokens"}
    return sum(x.nbytes for x in jax.tree.leaves(read))


def measure(params: Any, config: Any, form: str, batch: int, new: int, label: str, only_first: bool) -> None:
    """Reports the first call, and unless only that is wanted the time of a token."""
    prompts = [[(i * 7 + j) % config.vocab for i in range(PROMPT)] for j in range(batch)]

    def call(count: int) -> float:
        start = time.perf_counter()
        gx.generate((params, config), prompts, max_new_tokens=count, temperature=0.0)
        return time.perf_counter() - start

    title = f"{label} B{batch} {form}"
    first = call(new)
    if only_first:
        emit("first call", title, f"  {title:28s} first call {first:.1f} s, compiled programs kept", seconds=first)
        return
    seconds = {}
    for count in (new, new // 4):
        call(count)
        seconds[count] = statistics.median(call(count) for _ in range(3))
    each = (seconds[new] - seconds[new // 4]) / (new - new // 4)
    weights = weight_bytes(params)
    cached = batch * (PROMPT + 5 * new // 8) * 2 * config.layers * config.kv_heads * config.head_dim * 2
    share, all_read = (count / each / timing.bandwidth() for count in (weights, weights + cached))
    emit(
        "decode", title,
        f"  {title:28s} {1e3 * each:6.2f} ms a token, {batch / each:7,.0f} tokens/s, weights"
        f" {weights / each / 1e12:.2f} TB/s ({share:.0%} of the bandwidth; with the cache {all_read:.0%}),"
        f" first call {first:.1f} s",
        ms=1e3 * each, tokens_per_s=batch / each, weights_TBs=weights / each / 1e12, share=share,
        share_with_cache=all_read, first_call_s=first, weights_GB=weights / 1e9, call_s=seconds[new],
    )  # fmt: skip


def main() -> None:
    """Makes the model, waits, and measures each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--only-first", action="store_true", help="the first call of the first batch alone")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny:
        device.accelerator()
    label, table = "tiny" if args.tiny else "llama2-7b", "first call" if args.only_first else "decode"
    batches = [int(batch) for batch in args.batches.split(",")][: 1 if args.only_first else None]
    if args.only_first:
        wait_for_turn()
    with timing.reported(table, f"{label} {args.form}"):  # such as too little memory for the weights
        params, config = model(args.form, args.tiny)
        jax.block_until_ready(params)
        if not args.only_first:
            wait_for_turn()
        for batch in batches:
            with timing.reported(table, f"{label} B{batch} {args.form}"):
                measure(params, config, args.form, batch, 16 if args.tiny else NEW, label, args.only_first)


if __name__ == "__main__":
    main()
