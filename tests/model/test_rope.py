"""Rotary frequencies of every scaling are those of Hugging Face's functions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_convert.config_json import llama_config
from pipedec_jax.model.rope import attention_factor, rope_frequencies

factor = st.floats(1.0, 64.0)
original = st.integers(16, 8192)
theta = st.floats(500.0, 1e7) | st.floats(4.0, 16.0)  # of the small ones all dimensions turn often
SCALINGS = {
    "linear": st.fixed_dictionaries({"factor": factor}),
    "llama3": st.fixed_dictionaries({
        "factor": factor, "low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(3, 8),
        "original_max_position_embeddings": original,
    }),
    "yarn": st.fixed_dictionaries(
        {"factor": factor},
        optional={
            "original_max_position_embeddings": original, "attention_factor": st.floats(0.5, 2),
            "beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.25, 4), "truncate": st.booleans(),
            "mscale": st.floats(0, 2), "mscale_all_dim": st.floats(0, 2),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@given(data=st.data())
def test_frequencies_are_hugging_faces(kind, data):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = data.draw(SCALINGS[kind]) | {"rope_type": kind, "rope_theta": data.draw(theta)}
    values = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": data.draw(st.sampled_from([8, 32, 64, 128])),
              "max_position_embeddings": data.draw(st.integers(256, 65536))}  # fmt: skip
    theirs = LlamaConfig(**values, rope_parameters=dict(rope))
    ours = llama_config(
        {"model_type": "llama", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        | values
        | {"rope_parameters": rope}
    )
    expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs)
    # They compute in float32; where a part of a frequency is kept, a little of the whole one is rounded.
    np.testing.assert_allclose(rope_frequencies(ours), expected.numpy(), rtol=2e-5)
    assert attention_factor(ours) == pytest.approx(scale)
