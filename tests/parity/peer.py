"""The other side: transformers' model of a drawn configuration, with random weights."""

import contextlib
import copy
from typing import Any

import numpy as np
import torch
import transformers
from drawing import LENGTH, Draw, Drawn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

STEPS = 12  # tokens that are generated
LENGTH_DEPENDENT = ("dynamic", "longrope")  # RoPE whose angles depend on the length of the whole text


@contextlib.contextmanager
def double_precision():
    """Makes transformers compute everything in float64.

    Its models are float32 in places whatever their dtype: RMSNorm, the frequencies and angles of RoPE, GPT-Neo's
    scores. A float64 model is then no more exact than 1e-7; with float32 meaning float64 to torch itself it is.
    """
    names = {name: getattr(torch, name) for name in ("float32", "float")}
    single = torch.Tensor.float
    try:
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        for name in names:
            setattr(torch, name, torch.float64)
        yield
    finally:
        for name, dtype in names.items():
            setattr(torch, name, dtype)
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


class Peer:
    """transformers' model of case `number` of a family."""

    def __init__(self, family: Drawn, number: int):
        self.drawn = family.draw(Draw(family.id, number))
        self.random = np.random.default_rng([number, len(family.id)])
        self.config = transformers.AutoConfig.for_model(family.name, **copy.deepcopy(self.drawn))
        self.model = transformers.AutoModelForCausalLM.from_config(self.config).eval()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.from_numpy(self._values(name, p.shape)))
        words = [i for i in range(self.config.vocab_size) if i != self.config.pad_token_id]  # which gets no gradient
        self.tokens = self.random.choice(words, (2, LENGTH))
        self.prompts = [self.tokens[0, :6].tolist(), self.tokens[1, :3].tolist()]
        eos = self.config.eos_token_id
        if isinstance(eos, list) and len(eos) > 1:
            text = self.greedy(self.prompts[0], ends=None)
            self.config.eos_token_id = [*eos[:-1], max(text, key=text.index)]  # so that one does end a text
            self.model.generation_config.eos_token_id = self.config.eos_token_id

    def _values(self, name: str, shape: torch.Size) -> np.ndarray:
        """Matrices that give attention something to choose from; norms and biases that show where they are dropped."""
        noise = self.random.normal(size=tuple(shape)).astype(np.float32)
        if len(shape) > 1:
            return 1.2 * shape[-1] ** -0.5 * noise
        return 0.3 * noise + (0 if name.endswith("bias") else 1)

    @property
    def ends(self) -> list[int] | None:
        eos = self.config.eos_token_id
        return [eos] if isinstance(eos, int) else eos

    @property
    def rope(self) -> str | None:
        return (getattr(self.config, "rope_parameters", None) or {}).get("rope_type")

    def logits(self, tokens: Any, model: Any = None, **options: Any) -> np.ndarray:
        """[B, T, V] of tokens [B, T]; options are masks and positions."""
        return self._run(tokens, model, **options).logits.detach().numpy()

    def put_gradients(self, tokens: Any, model: Any) -> None:
        """Replaces the parameters of a model by the gradients of its mean next-token loss."""
        self._run(tokens, model, labels=torch.tensor(tokens)).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.grad)

    def _run(self, tokens: Any, model: Any, **options: Any) -> Any:
        model = self.model if model is None else model
        with torch.no_grad():
            model(torch.tensor([[0]]))  # a dynamic RoPE forgets the longer text that it saw before
        return model(torch.tensor(tokens), **{k: torch.as_tensor(v) for k, v in options.items()})

    def double(self) -> Any:
        """The same model in float64, to be made and run inside `double_precision`."""
        twin = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float64).eval()
        twin.load_state_dict(self.model.state_dict())
        assert {p.dtype for p in twin.parameters()} == {torch.float64}
        return twin

    def greedy(self, prompt: list[int], ends: list[int] | None) -> list[int]:
        """New tokens after the prompt, the one that ended the text among them."""
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=STEPS, eos_token_id=ends,
            pad_token_id=0,
        )  # fmt: skip
        return made[0, len(prompt) :].tolist()
