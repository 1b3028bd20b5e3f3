"""Reports of compiled programs: what is held, what is copied, how often devices meet."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pipedec_jax import exchange
from pipedec_jax.analysis.compiled import ShapeSource, _copies, _cycles, _read_ahead, report, shape_head
from pipedec_jax.analysis.described import Sizes, compile_hierarchy, compile_method, described_devices
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import ExitHeadConfig, head_shapes
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings

TINY = LlamaConfig(vocab_size=40, width=8, feed_forward=12, layers=3, heads=2, kv_heads=1, head_size=4, context=64)


@pytest.mark.parametrize("small", [0, exchange.SMALL])
def test_an_engine_without_weights_compiles_and_is_reported(monkeypatch, small):
    monkeypatch.setattr(exchange, "SMALL", small)
    engine = Engine(ShapeSource(TINY), None, EngineSettings(method="pp", stages=2), vocab_size=40)
    local = engine.new_local(engine.capacity_for(30))
    held = (engine.weights, local.cache, local.drafter)
    found = report(engine.programs(30).run, held)
    caches = 2 * 2 * 4 * engine.capacity_for(30) * 4
    assert (
        found.own_bytes
        == sum(size for size in engine.bytes_per_device()[0].values() if isinstance(size, int)) + caches + 4 * 8
    )  # the last norm
    assert found.total_bytes >= found.own_bytes
    assert 40 < found.kernels < 150
    # Embeddings, what the last stage knows, and the choices: the sums of a tick; and a hop, if in none of them.
    assert found.collectives == {"all-reduce": 3} | ({} if small else {"collective-permute": 1})
    before = report(engine.programs(30).prefill, held)
    assert before.own_bytes == found.own_bytes - 4 * 20 * 8 - 4 * 8, "prefill takes neither head nor last norm"


def test_a_hierarchy_s_models_are_compiled_one_by_one_and_reported():
    rows = compile_hierarchy("pipespec", Sizes(stages=2, context=30, dtype="float32"), TINY, [TINY], jax.devices())
    assert [(row["method"], row["program"]) for row in rows] == [
        (f"pipespec, {model}", program) for model in ("model 0", "target") for program in ("prefill", "ticks")
    ]
    assert all(row["total_bytes"] >= row["own_bytes"] > 0 for row in rows)
    # The target's pass is a tick of its pipe.
    assert rows[3]["collectives"] == {"all-reduce": 3}


def test_what_a_method_needs_to_be_compiled_is_said():
    with pytest.raises(ValueError, match="pipedec with --drafter model needs --draft"):
        compile_method("pipedec", Sizes(stages=2), TINY, None, jax.devices())
    with pytest.raises(ValueError, match="speculative does not split a stage"):
        compile_hierarchy("speculative", Sizes(stages=2, tensor_parallel=2), TINY, [TINY], jax.devices())
    for sizes, message in (
        (Sizes(stages=2), r"context \(4096\) exceeds the target's 64 tokens: lower --context"),
        (Sizes(stages=2, context=0), "context must be a whole number of at least 1, not 0"),
        (Sizes(stages=2, context=30, dtype="bf16"), "dtype must be one of float32, bfloat16, .* not 'bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_method("pp", sizes, TINY, None, jax.devices())
        with pytest.raises(ValueError, match=message):
            compile_hierarchy("pipespec", sizes, TINY, [TINY], jax.devices())
    with pytest.raises(ValueError, match="exit_layer must be a whole number of at least 1, not 0"):
        compile_method("ppsd", Sizes(stages=2, exit_layer=0), TINY, None, jax.devices())
    with pytest.raises(ValueError, match="cannot be compiled for"):
        described_devices("v5e:4x4", "nothing")


def test_kernels_of_one_device_are_those_of_its_loop():
    engine = Engine(ShapeSource(TINY), None, EngineSettings(method="pp", stages=1), vocab_size=40)
    assert 30 < report(engine.programs(30).run, engine.weights).kernels < 150


@pytest.mark.parametrize(("topology", "shape"), [("h100:3", "1x1x3"), ("h100:2x8", "1x2x8")])
def test_gpus_are_described_by_their_properties(monkeypatch, topology, shape):
    asked = {}

    def describe(**options):
        asked.update(options)
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(ValueError, match=r"no plugin.*'jax\[cuda13\]'"):
        described_devices(topology)
    assert (asked["platform"], asked["topology"]) == ("cuda", shape)
    assert "H100" in asked["target_config"]


def test_what_the_compiler_refuses_is_no_fault_of_the_command(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: all slice devices")

    monkeypatch.setattr(Engine, "programs", refuse)
    with pytest.raises(ValueError, match="the compiler refuses: INTERNAL: all slice devices"):
        compile_method("pp", Sizes(stages=2, context=30, dtype="float32"), TINY, None, jax.devices())


def test_copies_of_what_is_held_are_counted():
    mesh = Mesh([jax.devices()[0]], ("x",))
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    kept = jax.jit(lambda x: (x, x.at[3].set(0.0))).lower(shape).compile()
    assert report(kept, shape).copies >= 1
    updated = jax.jit(lambda x: x.at[3].set(0.0), donate_argnums=0).lower(shape).compile()
    assert report(updated, shape).copies == 0


def test_reading_ahead_is_no_copy():
    text = """
    %copy.1 = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%a)
    %copy-start.2 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]) copy-start(%a)
    %copy.3 = s32[5]{0} copy(%b)
    %slice-start = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]) slice-start(%c), slice={[0:16]}
    %copy-start.5 = (pred[4096]{0:T(512)(128)(4,1)S(1)}, pred[4096]{0}, u32[]{:S(2)}) copy-start(%e)
    %copy-start.4 = (f32[16]{0:T(128)}, f32[16]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%d)
    """
    assert _copies(text) == [("bfloat16", (8, 128), 2048), ("int32", (5,), 20), ("float32", (16,), 64)]
    assert _read_ahead(text) == 2048 + 4096


def test_cycles_are_those_of_all_operations():
    line = '%fusion.{0} = bf16[2,8] fusion(%a), backend_config={{"flag":true,"estimated_cycles":"{0}","x":"1"}}'
    assert _cycles("\n".join(line.format(count) for count in (12, 300))) == 312
    assert _cycles("%fusion.1 = bf16[2,8] fusion(%a)") is None


@pytest.mark.parametrize("variant", ["block", "norm-linear", "target"])
def test_an_exit_head_without_weights_has_its_shapes(variant):
    config = ExitHeadConfig(1, variant)
    assert len(jax.tree.leaves(shape_head(config, TINY).params)) == len(head_shapes(config, TINY))
