import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_convert.config_json import config_json, llama_config, read_json, token_ids
from pipedec_jax.config import MOST_LAYERS, LinearScaling, Llama3Scaling, LlamaConfig, YarnScaling
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
        {"rope_theta": 500000.0, "rope_scaling": SCALING | {"rope_type": "llama3", "type": "linear"}},
        {"rope_parameters": LLAMA3_ROPE, "rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4, "head_dim": 16, "mlp_bias": False},
        {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False},
    ],
)
def test_old_and_new_spellings_mean_the_same(spelling):
    assert llama_config(OLD | spelling) == LlamaConfig(
        vocab_size=128, width=64, feed_forward=96, layers=2, heads=4, kv_heads=4, head_size=16, context=4096,
        rope_theta=500000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 128), norm_eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("spelling", [{}, {"rope_theta": 1e4}, {"rope_scaling": None}, {"rope_scaling": {}},
                                      {"rope_scaling": {"type": "linear", "factor": 1.0}}, {"hidden_act": "swish"},
                                      {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
                                      {"partial_rotary_factor": 1}, {"architectures": None},
                                      {"architectures": ["LLaMAForCausalLM"]}])  # fmt: skip
def test_plain_rope_in_all_spellings(spelling):
    config = llama_config(OLD | spelling)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 100000, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0}},
    ],
)
def test_linear_scaling_in_all_spellings(spelling):
    config = llama_config(OLD | spelling)
    assert (config.rope_theta, config.rope_scaling) == (100000.0, LinearScaling(4.0))


@pytest.mark.parametrize(
    ("settings", "beside", "expected"),
    [
        ({"original_max_position_embeddings": 64, "finetuned": True}, {},
         YarnScaling(16.0, 64, 0.1 * math.log(16) + 1)),
        ({"attention_factor": 1.5, "beta_fast": 4, "beta_slow": 0, "truncate": False}, {},
         YarnScaling(16.0, 4096, 1.5, 4.0, 1.0, False)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"original_max_position_embeddings": 32}, YarnScaling(16.0, 32, 1.0)),
        ({"original_max_position_embeddings": 64, "attention_factor": 1.0}, {"original_max_position_embeddings": 32},
         YarnScaling(16.0, 32, 1.0)),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, {},
         YarnScaling(16.0, 4096, (0.2 * math.log(16) + 1) / (0.05 * math.log(16) + 1))),
        ({"mscale": 2.0, "beta_fast": 0}, {}, YarnScaling(16.0, 4096, 0.1 * math.log(16) + 1)),
        ({"factor": 0.5}, {}, YarnScaling(0.5, 4096, 1.0)),
    ],
)  # fmt: skip
def test_what_yarn_leaves_out_is_what_hugging_face_takes(settings, beside, expected):
    values = OLD | {"rope_scaling": {"type": "yarn", "factor": 16.0} | settings} | beside
    assert llama_config(values).rope_scaling == expected


def test_what_any_model_leaves_out_is_what_hugging_face_takes():
    from transformers import LlamaConfig as Theirs

    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    values = {key: OLD[key] for key in (*needed, "num_attention_heads")}
    ours, theirs = llama_config(values), Theirs(**values)
    assert (ours.context, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (ours.kv_heads, ours.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.rope_theta, ours.tied_embeddings) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)


def test_dynamic_scaling_is_none_up_to_the_context_as_its_refusal_says():
    from transformers import LlamaConfig as Theirs
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    theirs = Theirs(**COMMON, num_attention_heads=4, rope_parameters=rope)
    found, scale = ROPE_INIT_FUNCTIONS["dynamic"](theirs, seq_len=COMMON["max_position_embeddings"])
    A = theirs.head_dim
    assert found.tolist() == pytest.approx([1e4 ** (-2 * i / A) for i in range(A // 2)])
    assert scale == 1


def test_the_context_of_vicuna_16k_is_what_it_was_trained_for():
    vicuna = OLD | {"max_sequence_length": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert llama_config(vicuna).context == 16384
    assert llama_config(OLD | {"max_sequence_length": 2048}).context == OLD["max_position_embeddings"]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_what_models_of_other_families_leave_out_is_what_hugging_face_takes(kind):
    from transformers import AutoConfig

    needed = {key: OLD[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    needed |= {"model_type": kind, "num_attention_heads": 32}
    ours, theirs = llama_config(needed), AutoConfig.for_model(**needed)
    assert (ours.norm_eps, ours.kv_heads) == (theirs.rms_norm_eps, theirs.num_key_value_heads)
    assert ours.context == (theirs.sliding_window if kind == "mistral" else theirs.max_position_embeddings)
    assert (ours.rope_theta, ours.tied_embeddings) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)
    assert (ours.attention_bias, ours.feed_forward_bias) == (kind == "qwen2", False)
    nulls = llama_config(needed | {"num_key_value_heads": None, "sliding_window": None})
    assert (nulls.kv_heads, nulls.context) == (32, theirs.max_position_embeddings)


MISTRAL = OLD | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 4}
QWEN2 = OLD | {"model_type": "qwen2", "architectures": None, "num_key_value_heads": None, "max_window_layers": 1}
LONG_QWEN2 = {key: value for key, value in QWEN2.items() if key != "max_window_layers"}
LONG_QWEN2 |= {"max_position_embeddings": 40000, "use_sliding_window": True}
MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("values", "context"),
    [
        (QWEN2 | {"sliding_window": 100}, 4096),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True}, 100),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 4096),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 4096),
        (QWEN2 | {"sliding_window": 5000, "use_sliding_window": True}, 4096),
        (QWEN2 | {"sliding_window": 100, "use_sliding_window": True, "layer_types": MIXED}, 100),
        # What is not said: layers from the 29th on have a window, of 4096.
        (LONG_QWEN2 | {"num_hidden_layers": 28}, 40000),
        (LONG_QWEN2 | {"num_hidden_layers": 29}, 4096),
        (MISTRAL | {"sliding_window": 100}, 100),
        (OLD | {"sliding_window": 100}, 4096),
    ],
)
def test_the_context_ends_where_a_window_begins_to_slide(values, context):
    assert llama_config(values).context == context


def test_kinds_of_layers_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match="layer_types must be a list, a kind for each layer, or null, not 5"):
        llama_config(QWEN2 | {"use_sliding_window": True, "layer_types": 5})


def test_biases_that_a_family_has_not_are_not_asked_for():
    config = llama_config(MISTRAL | {"attention_bias": True, "mlp_bias": True})
    assert (config.attention_bias, config.feed_forward_bias) == (False, False)


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
    assert ours.attention_bias == theirs.attention_bias
    assert ours.feed_forward_bias == theirs.mlp_bias


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3_ROPE,
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048,
         "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ],
)  # fmt: skip
def test_what_we_export_is_read_by_transformers(rope, tmp_path):
    from transformers import LlamaConfig as Theirs

    config = llama_config(OLD | {"rope_parameters": rope, "head_dim": 10})
    exported = config_json(config, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(exported))
    # Releases that know no other kind than `linear` take no other name.
    assert ("type" in exported["rope_scaling"]) == (rope["rope_type"] == "linear")
    theirs = Theirs.from_pretrained(tmp_path)
    assert {key: value for key, value in theirs.rope_parameters.items() if key != "type"} == rope
    assert theirs.architectures == ["LlamaForCausalLM"]
    assert (theirs.head_dim, str(theirs.dtype), theirs.rms_norm_eps) == (10, "torch.bfloat16", 1e-5)


whole = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e9)
configs = st.builds(
    lambda heads, groups, half, scaling, **rest: LlamaConfig(
        heads=heads * groups, kv_heads=heads, head_size=2 * half, rope_scaling=scaling, **rest
    ),
    heads=st.integers(1, 64), groups=st.integers(1, 8), half=st.integers(1, 256),
    vocab_size=whole, width=whole, feed_forward=whole, layers=st.integers(1, MOST_LAYERS), context=whole,
    rope_theta=st.floats(1.1, 1e9), norm_eps=positive, tied_embeddings=st.booleans(),
    attention_bias=st.booleans(), feed_forward_bias=st.booleans(),
    scaling=st.none()
    | st.builds(Llama3Scaling, positive, st.floats(0.1, 1), st.floats(2, 8), whole)
    | st.builds(LinearScaling, positive.filter(lambda factor: factor != 1))
    | st.builds(YarnScaling, positive, whole, positive, positive, positive, st.booleans()),
)  # fmt: skip


@given(configs)
def test_config_json_and_a_manifest_read_back(config):
    assert llama_config(json.loads(json.dumps(config_json(config, "float32")))) == config
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_older_than_the_kinds_of_scaling_are_read_and_written_as_before():
    """Fingerprints of targets, which exit heads are bound to, are over what is written."""
    config = llama_config(OLD | {"rope_parameters": LLAMA3_ROPE})
    old = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 128}
    assert config.to_dict()["rope_scaling"] == old
    assert LlamaConfig.from_dict(config.to_dict() | {"rope_scaling": old}) == config


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "kind of rope_scaling must be one of linear, llama3, yarn, not 'dynamic'"),
        ({"kind": ["linear"], "factor": 2.0}, r"not \['linear'\]"),
        ({"kind": "linear", "factor": "2"}, "factor of rope_scaling must be a positive number, not '2'"),
        ({"kind": "linear", "factor": True}, "factor of rope_scaling must be a positive number, not True"),
        ({"kind": "linear", "factor": 0.0}, "factor of rope_scaling must be a positive number, not 0.0"),
        ({"kind": "linear", "factr": 2.0}, "unknown key 'factr' in rope_scaling; did you mean 'factor'"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 1.5, "attention_factor": 1.0}, "must be a positive whole"),
        (
            {"kind": "yarn", "factor": 2.0, "original_context": True, "attention_factor": 1.0},
            "original_context of rope_scaling must be a positive whole number, not True",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_context": 8, "attention_factor": 1.0, "truncate": 1},
            "truncate must",
        ),
        ([2.0], r"rope_scaling must be an object with keys, not \[2.0\]"),
    ],
)
def test_a_bad_scaling_in_a_manifest_is_named(scaling, message):
    values = llama_config(OLD).to_dict() | {"rope_scaling": scaling}
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; only 'llama', 'mistral', 'qwen2' can"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; only"),
        ({"model_type": "mistral"}, r"architectures is \['LlamaForCausalLM'\]; only 'MistralForCausalLM'"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": "x"}, "sliding_window must be a positive"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": 5}, "architectures is 5; only 'LlamaForCausalLM'"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, not 'no'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*'gptq'"),
        ({"quantization_config": {}}, "quantization_config is present"),
        ({"quantization_config": "awq"}, "quantization_config is present .*'awq'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic' .*remove it from config.json",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type is 'longrope' .*; only 'default', 'linear', 'llama3' and",
        ),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_type is 'su'; only 'default', 'linear', 'llama3' and 'yarn'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type is \['linear'\]; only"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": -2.0}},
            "factor of rope_scaling must be a positive number, not -2",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast must be a number, not 'x'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta must be over 1 with yarn"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": SCALING | {"type": "llama3", "high_freq_factor": 1.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be a JSON object"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_theta": 10000.0}, "rope_theta is given twice, as 10000.0 and 500000.0"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": {"type": "linear"}}, "contradict each other"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size must be a positive whole number, not '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number, not True"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, not 0"),
        ({"num_attention_heads": 3}, r"hidden_size \(64\) is no multiple of num_attention_heads \(3\)"),
        ({"num_key_value_heads": 3}, r"kv_heads \(3\) must divide heads \(4\)"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"rope_theta": -(10**400)}, "rope_theta must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number, not True"),
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


def test_a_configuration_that_is_not_there_is_said_to_belong_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; a Hugging Face LLaMA directory has a"):
        read_json(tmp_path / "config.json")


def test_token_ids_are_one_or_several():
    assert token_ids({"eos_token_id": 0}, "eos_token_id") == [0]
    assert token_ids({"eos_token_id": 2}, "eos_token_id") == [2]
    assert token_ids({"eos_token_id": [2, 3]}, "eos_token_id") == [2, 3]
    assert token_ids({"eos_token_id": None}, "eos_token_id") == token_ids({}, "eos_token_id") == []
    for bad in ("2", [-1], True, [None]):
        with pytest.raises(ValueError, match="eos_token_id must be"):
            token_ids({"eos_token_id": bad}, "eos_token_id")
