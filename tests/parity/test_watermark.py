"""The detector's score against transformers' WatermarkDetector, which gets our green lists in place of its own.

(Its own come from torch.Generator, so they cannot be compared.)
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
import transformers

import garrulax as gx
from garrulax.sampling.detect import token_numbers


@pytest.mark.parametrize(("gamma", "vocab"), [(0.25, 9), (0.5, 400), (0.1, 30)])
def test_scored_tokens_green_tokens_and_z(gamma, vocab):
    mark = gx.watermark("a secret", gamma=gamma, context=1)
    config = transformers.GPT2Config(vocab_size=vocab + 1, bos_token_id=vocab, eos_token_id=vocab)
    settings = transformers.WatermarkingConfig(greenlist_ratio=gamma, bias=2.0, context_width=1)
    theirs = transformers.WatermarkDetector(config, "cpu", settings, ignore_repeated_ngrams=True)

    def greenlist(prefix):
        ngrams = np.array([[int(prefix[-1]), token] for token in range(vocab)])
        return torch.from_numpy(np.flatnonzero(token_numbers(mark, ngrams) < mark.threshold))

    theirs.processor._get_greenlist_ids = greenlist
    texts = np.random.default_rng(0).integers(0, vocab, (3, 80))
    wanted = theirs(torch.from_numpy(texts), return_dict=True)
    for i, text in enumerate(texts.tolist()):
        found = gx.detect_watermark(text, mark)
        assert found.scored == wanted.num_tokens_scored[i]
        assert found.statistic == wanted.num_green_tokens[i]
        assert found.z == pytest.approx(wanted.z_score[i], abs=1e-7)  # gamma is rounded to 32 bits
        assert abs(found.p_value - wanted.p_value[i]) < 0.15  # theirs is the normal approximation
