"""GLM-130B and ChatGLM-6B."""

from entry import ELSEWHERE_BLANKS, SIZES, Change, Entry

from garrulax.models.glm130b import Config

ENTRY = Entry(
    config=Config(**SIZES, mlp_width=12, gated=True, positions_2d=False, dialect="glm-130b"),
    rows=("GLM-130B", "ChatGLM-6B"),
    changes={"alpha_layers": Change(3), "dialect": Change("chatglm", base={"gated": False})},
    elsewhere=(*ELSEWHERE_BLANKS, "context"),
    counts={"glm-130b": 128_697_794_560, "chatglm-6b": 6_173_286_400, "chatglm-6b-v0": 6_255_206_400},
    foreign="glm",
    text=Config(
        vocab=264, context=96, width=16, layers=1, heads=2, mlp_width=24, gated=True, tied=False, mask=258,
        sentence_mask=259, generation_mask=260, sop=261, eop=262, eos=256, dialect="glm-130b",
    ),
)  # fmt: skip
