"""Geometries that cannot be are refused where they are made."""

import dataclasses

import pytest

from pipedec_jax.config import LinearScaling, Llama3Scaling, LlamaConfig

CONFIG = LlamaConfig(vocab_size=31, width=16, feed_forward=24, layers=2, heads=2, kv_heads=1, head_size=8, context=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be a positive whole number, not 0"),
        ({"heads": 3, "kv_heads": 2}, r"kv_heads \(2\) must divide heads \(3\)"),
        ({"head_size": 3}, "head_size must be even"),
        ({"norm_eps": True}, "norm_eps must be a positive number, not True"),
        ({"tied_embeddings": 1}, "tied_embeddings must be true or false, not 1"),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling must be one of .*Llama3Scaling.* not {'factor': 8.0}"),
    ],
)
def test_bad_values_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_dictionary_is_read_back_or_refused():
    for scaling in (Llama3Scaling(8.0, 1.0, 4.0, 32), LinearScaling(4.0)):
        scaled = dataclasses.replace(CONFIG, rope_scaling=scaling)
        values = scaled.to_dict()
        assert LlamaConfig.from_dict(values) == scaled
        assert values == scaled.to_dict(), "what was given stays as it was"
    with pytest.raises(ValueError, match="unknown key 'witdh' in model config; did you mean 'width'"):
        LlamaConfig.from_dict(CONFIG.to_dict() | {"witdh": 3})
    with pytest.raises(ValueError, match="model config must be an object with keys, not None"):
        LlamaConfig.from_dict(None)
