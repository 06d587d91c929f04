"""Watermarks of SmolLM2-135M-Instruct: detection from the text alone, and the model's own log-probabilities."""

import numpy as np
import pytest

import garrulax as gx

pytestmark = pytest.mark.real


def test_detection_from_the_text_alone(path):
    model = gx.load(path, dtype="float32")
    marks = [gx.watermark("one"), gx.watermark("two", "gumbel")]
    prompt = "The history of mathematics begins with"
    written = gx.generate(model, [prompt] * 2, max_new_tokens=120, end_tokens=(), watermark=marks)
    for one, mark, other in zip(written, marks, marks[::-1], strict=True):
        assert gx.detect_watermark(one.text, mark, model.tokenizer).z > 4
        assert gx.detect_watermark(one.text, other, model.tokenizer).z < 4
    ids = model.tokenizer.encode(prompt)
    scored = gx.score(model, [one.tokens for one in written], condition=[ids] * 2)
    for one, without in zip(written, scored, strict=True):
        np.testing.assert_allclose(one.logprobs, without.logprobs, atol=2e-3)
