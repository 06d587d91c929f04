"""GLM."""

from entry import ELSEWHERE_BLANKS, SIZES, Entry

from garrulax.models.glm import Config

ENTRY = Entry(
    config=Config(**SIZES, mask=33, sentence_mask=34, generation_mask=35, sop=36, eop=37, init_std=0.3),
    rows=("GLM",),
    elsewhere=ELSEWHERE_BLANKS,
    counts={
        "glm-base": 109_338_624, "glm-large": 334_688_256, "glm-410m": 410_265_600, "glm-515m": 514_632_960,
        "glm-roberta": 354_873_344, "glm-large-chinese": 355_659_776, "glm-2b": 1_920_122_880,
        "glm-10b": 9_880_682_496, "glm-10b-chinese": 9_879_633_920,
    },
    text=Config(
        vocab=264, context=96, eos=256, pad=256, cls=257, mask=258, sentence_mask=259, generation_mask=260, sop=261,
        eop=262, width=32, layers=2, heads=4, init_std=0.4,
    ),
)  # fmt: skip
