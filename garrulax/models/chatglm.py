"""ChatGLM2, ChatGLM3 and GLM-4: pre-norm blocks with RMSNorm, grouped queries, a gated MLP, and rotary positions that
turn half of each head in neighbouring pairs.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, L layers. config.json and tensor names are in chatglm_hf.py. Sources: Team GLM 2024 (arXiv 2406.12793);
modeling_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b; transformers' Glm and Glm4.
"""

import dataclasses
import math

import jax

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import Layout
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers import rope
from garrulax.layers.attention import attend, default_positions
from garrulax.layers.cache import Cache, admit, whole_length
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, gated_mlp, linear
from garrulax.layers.norms import rms_norm
from garrulax.layers.rope import Rope
from garrulax.layers.stack import run
from garrulax.models import chatglm_hf


@dataclasses.dataclass(frozen=True)
class Config:
    """ChatGLM2 and after. Defaults are ChatGLM2-6B.

    vocab, context: tokens (the context is advice: rotary positions go on). width, layers, heads, kv_heads,
    head_dim, mlp_width: sizes; head_dim 0 stands for width / heads. activation: of the gate. norm_eps: of the norms.
    rope: rotary settings. rotary: share of a head's width that is turned. *_dropout: rates, used where forward is
    given a key. qkv_bias: whether query, key and value have biases. output_norms: whether what attention and
    MLP give is normalised too. residual_after_norm: whether it is added to their normalised input, not to the input.
    tied: the output is the token embedding. init_std: of the initial weights. bos, eos, pad: token ids; eos may be
    several. dialect: the format of checkpoints, "chatglm" (of the remote code), "glm" or "glm4" (transformers'
    classes); parameters do not depend on it, so that replacing it exports a model in another format.
    """

    vocab: int = 65024
    context: int = 32768
    width: int = 4096
    layers: int = 28
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 0
    mlp_width: int = 13696
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    rotary: float = 0.5
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    qkv_bias: bool = True
    output_norms: bool = False
    residual_after_norm: bool = False
    tied: bool = False
    init_std: float = 0.02
    bos: int | None = None
    eos: int | tuple[int, ...] | None = 2
    pad: int | None = 0
    dialect: str = "chatglm"

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads", "kv_heads", "mlp_width")
        if self.head_dim == 0:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        check_sizes(self, "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        check_activation(self.activation)
        check_rates(self, "attention_dropout", "residual_dropout")
        check_positive(self, "norm_eps", "init_std", "rotary")
        if self.rotary > 1 or self.rotary_width % 2 or not self.rotary_width:
            raise ValueError(f"rotary={self.rotary} must turn an even part of head_dim {self.head_dim}")
        check_flags(self, "qkv_bias", "output_norms", "residual_after_norm", "tied")
        check_ids(self, "bos", "eos", "pad", several=("eos",))
        chatglm_hf.check_dialect(self)

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: the context, or more where the rotary positions are stretched."""
        return self.rope.max_length(self.context)

    @property
    def rotary_width(self) -> int:
        """Entries of a head that rotary positions turn."""
        return int(self.head_dim * self.rotary)


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: as LLaMA's, whatever the dialect fuses."""
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width
    weight, names = normal(c.init_std), chatglm_hf.NAMES[c.dialect]
    h = names["layer"]

    def norm(name):
        return {"scale": ParamSpec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector")}

    def table(name):
        return ParamSpec((c.vocab, D), ("vocab", "embed"), weight, Stored(name), role="embedding")

    def half(i):  # of the rows of gate and up together
        stored = Stored(h + names["gate_up"], (2, F, D), (1, 0), (i,))
        return ParamSpec((D, F), ("embed", "mlp"), weight, stored, (2 * F, D))

    attention = {
        "out": ParamSpec(
            (H, C, D), ("heads", "head", "embed"), weight, Stored(h + names["out"], (D, H, C), (1, 2, 0)), (D, H * C),
            inputs=2,
        ),
    }  # fmt: skip
    for name, (stored, rows, take) in chatglm_hf.projections(c).items():
        count, axis = (H, "heads") if name == "query" else (K, "kv_heads")
        attention[name] = ParamSpec(
            (D, count, C), ("embed", axis, "head"), weight, Stored(f"{h}{stored}.weight", (*rows, D), (2, 0, 1), take),
            (math.prod(rows), D),
        )  # fmt: skip
        if c.qkv_bias:
            attention[f"{name}_bias"] = ParamSpec(
                (count, C), (axis, "head"), zeros, Stored(f"{h}{stored}.bias", rows, None, take), (math.prod(rows),),
                role="vector",
            )  # fmt: skip
    layer = {
        "attention_norm": norm(h + "input_layernorm"),
        "attention": attention,
        "mlp_norm": norm(h + "post_attention_layernorm"),
        "mlp": {
            "gate": half(0),
            "up": half(1),
            "down": ParamSpec((F, D), ("mlp", "embed"), weight, Stored(h + names["down"], (D, F), (1, 0)), (D, F)),
        },
    }
    if c.output_norms:
        layer["attention_output_norm"] = norm(h + "post_self_attn_layernorm")
        layer["mlp_output_norm"] = norm(h + "post_mlp_layernorm")
    tree = {"tokens": table(names["tokens"]), "blocks": stacked(c.layers, layer), "norm": norm(names["norm"])}
    if not c.tied:
        tree["head"] = table(names["head"])
    return tree


def hidden(
    params: Tree,
    tokens: jax.Array,
    c: Config,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] after the last norm, and the cache. Arguments as in `garrulax.forward`."""
    positions = default_positions(tokens, cache) if positions is None else positions
    view, cache = admit(tokens, positions, mask, cache)
    x = lookup(params["tokens"], tokens)
    turn = rope.table(c.rope, positions, c.rotary_width, whole_length(positions, cache), x.dtype)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y = norm(x, p["attention_norm"])
        z, kv = attention(y, p["attention"], kv, layer, keys[0])
        x = add(x, y, z, p.get("attention_output_norm"), keys[1])
        y = norm(x, p["mlp_norm"])
        return add(x, y, gated_mlp(y, p["mlp"], c.activation), p.get("mlp_output_norm"), keys[2]), kv

    def attention(x, p, kv, layer, key):
        q = rope.rotate_pairs(linear("BTD,DHC->BTHC", x, p, "query"), *turn)
        k = rope.rotate_pairs(linear("BTD,DKC->BTKC", x, p, "key"), *turn)
        v = linear("BTD,DKC->BTKC", x, p, "value")
        y, kv = attend(q, k, v, view, kv, layer, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def add(x, normed, y, output_norm, key):
        y = y if output_norm is None else norm(y, output_norm)
        return (normed if c.residual_after_norm else x) + dropout(y, c.residual_dropout, key)

    def norm(x, p):
        return rms_norm(x, **p, eps=c.norm_eps)

    x, cache = run(block, x, params["blocks"], cache=cache, key=key, remat=remat, unroll=unroll)
    return norm(x, params["norm"]), cache


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


DIALECTS = chatglm_hf.DIALECTS


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json with model_type chatglm (ChatGLM2 and after), glm or glm4.

    Raises ValueError as `models.chatglm_hf.read` does.
    """
    return Config(**chatglm_hf.read(raw))


def to_hf(c: Config) -> dict:
    """The config.json of `c` in its dialect."""
    return chatglm_hf.write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's."""
    names = chatglm_hf.NAMES[c.dialect]
    tied = {names["head"]: names["tokens"]} if c.tied else {}
    return Layout(prefix=names["prefix"], tied=tied, buffers=("rotary_pos_emb.inv_freq", ".rotary_emb.inv_freq"))


_CHATGLM3 = Config(context=8192, eos=chatglm_hf.CHATGLM3_EOS)
_GLM4 = Config(vocab=151552, context=8192, layers=40, norm_eps=1.5625e-7, eos=(151329, 151336, 151338), pad=151329)

#: As published, in the dialect that was published first. The rope ratios (16, 50, 500) stand in other projects' files
#: and were not checked against the checkpoints; nor were attention_bias and norm_eps of GLM-4-9B-0414.
PRESETS = {
    "chatglm2-6b": Config(),
    "chatglm2-6b-32k": Config(rope=Rope(kind="linear", factor=16.0)),
    "chatglm3-6b": _CHATGLM3,
    "chatglm3-6b-32k": dataclasses.replace(_CHATGLM3, context=32768, rope=Rope(theta=500_000.0)),
    "glm-4-9b": _GLM4,
    "glm-4-9b-chat": dataclasses.replace(_GLM4, context=131072, rope=Rope(theta=5_000_000.0)),
    "glm-4-9b-0414": dataclasses.replace(
        _GLM4, context=32768, norm_eps=1e-5, qkv_bias=False, output_norms=True, dialect="glm4"
    ),
}
