"""Decoding on this device: a LLaMA of the shape of LLaMA-2 7B with random weights, greedy, after prompts of 128 tokens.

The time of the first call, with what is compiled; milliseconds a token, by the difference between the times of two
lengths, so that reading the prompt and starting do not count; and the share of the memory's bandwidth, from the bytes
of the weights that a step reads (all but the token embedding). The quantised forms are those of docs/quantisation.md,
group 128 for int4; every layer has the codes of one layer, in memory of its own.
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
    if form == "bfloat16":
        return gx.unstack(gx.init(config, jax.random.key(0), dtype="bfloat16")), config
    one = dataclasses.replace(config, layers=1)
    group = 32 if tiny and form == "int4" else None
    params, _ = gx.quantise((gx.init(one, jax.random.key(0), dtype="bfloat16"), one), form, group=group)
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
    params, config = model(args.form, args.tiny)
    jax.block_until_ready(params)
    wait_for_turn()
    for batch in map(int, args.batches.split(",")):
        label = "tiny" if args.tiny else "llama2-7b"
        with timing.reported("decode", f"{label} B{batch} {args.form}"):
            measure(params, config, args.form, batch, 16 if args.tiny else NEW, label, args.only_first)
        if args.only_first:
            break


if __name__ == "__main__":
    main()
