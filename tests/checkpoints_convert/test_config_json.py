import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_convert.config_json import config_json, llama_config, read_json, token_ids
from pipedec_jax.config import MOST_LAYERS, LlamaConfig, RopeScaling
from tests.checkpoints_convert.sources import COMMON, GEOMETRIES, LLAMA3_ROPE

OLD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "pretraining_tp": 2,
    "use_cache": True,
}
SCALING = {key: value for key, value in LLAMA3_ROPE.items() if key not in ("rope_type", "rope_theta")}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": SCALING | {"rope_type": "llama3"}},
        {"rope_theta": 500000, "rope_scaling": SCALING | {"type": "llama3"}},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": LLAMA3_ROPE, "rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4, "head_dim": 16, "mlp_bias": False},
        {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False},
    ],
)
def test_old_and_new_spellings_mean_the_same(spelling):
    assert llama_config(OLD | spelling) == LlamaConfig(
        vocab_size=128, width=64, feed_forward=96, layers=2, heads=4, kv_heads=4, head_size=16, context=4096,
        rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 128), norm_eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("spelling", [{}, {"rope_theta": 1e4}, {"rope_scaling": None}, {"rope_scaling": {}},
                                      {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"hidden_act": "swish"},
                                      {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}])  # fmt: skip
def test_plain_rope_in_all_spellings(spelling):
    config = llama_config(OLD | spelling)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_fields_are_what_transformers_reads_from_the_same_file(name, tmp_path):
    from transformers import LlamaConfig as Theirs

    Theirs(**(COMMON | GEOMETRIES[name])).save_pretrained(tmp_path)
    edited = read_json(tmp_path / "config.json") | {"architectures": ["LlamaForCausalLM"]}
    ours, theirs = llama_config(edited), Theirs.from_pretrained(tmp_path)
    assert ours.heads == theirs.num_attention_heads
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_size == theirs.head_dim
    assert ours.context == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings


def test_what_we_export_is_read_by_transformers(tmp_path):
    from transformers import LlamaConfig as Theirs

    config = llama_config(OLD | {"rope_parameters": LLAMA3_ROPE, "head_dim": 10})
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))
    theirs = Theirs.from_pretrained(tmp_path)
    assert theirs.rope_parameters == LLAMA3_ROPE
    assert (theirs.head_dim, str(theirs.dtype), theirs.rms_norm_eps) == (10, "torch.bfloat16", 1e-5)


whole = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e9)
configs = st.builds(
    lambda heads, groups, half, scaling, **rest: LlamaConfig(
        heads=heads * groups, kv_heads=heads, head_size=2 * half, rope_scaling=scaling, **rest
    ),
    heads=st.integers(1, 64), groups=st.integers(1, 8), half=st.integers(1, 256),
    vocab_size=whole, width=whole, feed_forward=whole, layers=st.integers(1, MOST_LAYERS), context=whole,
    rope_theta=positive, norm_eps=positive, tied_embeddings=st.booleans(),
    scaling=st.none() | st.builds(RopeScaling, positive, st.floats(0.1, 1), st.floats(2, 8), whole),
)  # fmt: skip


@given(configs)
def test_config_json_reads_back(config):
    assert llama_config(json.loads(json.dumps(config_json(config, "float32")))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'llama'"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, not 'no'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*'gptq'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; only 'default' and 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": SCALING | {"type": "llama3", "high_freq_factor": 1.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be a JSON object"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_theta": 10000.0}, "rope_theta is given twice, as 10000.0 and 500000.0"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": {"type": "linear"}}, "contradict each other"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, not '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, not 0"),
        ({"num_attention_heads": 3}, r"hidden_size \(64\) is no multiple of num_attention_heads \(3\)"),
        ({"num_key_value_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
    ],
)
def test_refused_settings_are_named(change, message):
    values = {key: value for key, value in (OLD | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        llama_config(values)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_damaged_json_is_an_error_that_names_the_file(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_token_ids_are_one_or_several():
    assert token_ids({"eos_token_id": 2}, "eos_token_id") == [2]
    assert token_ids({"eos_token_id": [2, 3]}, "eos_token_id") == [2, 3]
    assert token_ids({"eos_token_id": None}, "eos_token_id") == token_ids({}, "eos_token_id") == []
    for bad in ("2", [-1], True, [None]):
        with pytest.raises(ValueError, match="eos_token_id must be"):
            token_ids({"eos_token_id": bad}, "eos_token_id")
