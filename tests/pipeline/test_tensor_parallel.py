"""Stages split over devices: tokens against the oracle, what each device holds, and how often they meet."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pipedec_jax
from pipedec_jax.cache import chunk_rows
from pipedec_jax.config import LlamaConfig
from pipedec_jax.exchange import AXES, vary
from pipedec_jax.model import llama
from pipedec_jax.model.exit_head import ExitHeadConfig
from pipedec_jax.model.held import held_shapes
from pipedec_jax.model.int8 import Int8Source
from pipedec_jax.model.parameters import MemorySource, initialize, layer_shapes
from pipedec_jax.model.tensor_parallel import layer_part, part_config, tensor_share
from pipedec_jax.pipeline import placement
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import StageSplit
from pipedec_jax.pipeline.stage import Target, run_stage
from pipedec_jax.soundness import NotFiniteError
from tests.exactness import Shape, bench
from tests.oracle import GREEDY, Draw
from tests.random_pairs import Pair, as_source, plain_steps, target_weights

PROMPT = (3, 14, 15, 92, 65, 35)
DRAWN = Draw(temperature=0.8, top_k=20, seed=3)
WIDE = LlamaConfig(vocab_size=50, width=16, feed_forward=22, layers=2, heads=8, kv_heads=4, head_size=4, context=64)


def shape(method: str, stages: int, parts: int, geometry: str = "five layers", **others: Any) -> Shape:
    tree = {} if method in ("pp", "ppsd") else {"width": 4, "children": 3}
    values: dict[str, Any] = {"width": 1, "children": 1, "geometry": geometry} | tree | others
    return Shape(method, stages, **values, others=(("tensor_parallel", parts),))


SHAPES = [
    shape("best-first", 1, 2, steps=2),
    shape("best-first", 2, 2, steps=2, drafter="both"),
    shape("pipedec", 3, 2),
    shape("stpp", 2, 4, steps=2),
    # Each of three devices has the one KV head.
    shape("best-first", 2, 3, "odd"),
    shape("ppsd", 2, 2, head=ExitHeadConfig(2, "block")),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tokens_are_plain_decodings(case):
    pair, hits = Pair(case.geometry, seed=1), 0
    for draw in (GREEDY, DRAWN):
        progress = bench(case, "float64").decode(pair, PROMPT, 40, draw)
        assert progress.tokens == [step.token for step in plain_steps(pair, PROMPT, draw, 40)]
        hits += sum(progress.hits)
    assert hits > 5


def test_the_stage_whose_layer_is_broken_is_named_though_several_devices_find_it():
    case = SHAPES[2]
    shared, pair = bench(case, "float64"), Pair(case.geometry, seed=1)
    engine = shared.load(pair)
    weights = {name: array.copy() for name, array in target_weights(pair).items()}
    weights["model.layers.2.mlp.down_proj.weight"][3, 0] = np.nan
    with shared.x64():
        source = as_source(pair.target_config, weights)
        target = placement.place_target(engine.mesh, source, engine.target.split, jnp.dtype("float64"))
        engine.weights = engine.weights.replace(target=target)
        shared.pair = None  # the next to use it gets its own weights
        engine.start(PROMPT[:1], max_new_tokens=5)
        with pytest.raises(NotFiniteError, match=r"stage 2 of 3 \(layers 3 to 4\)") as error:
            engine.run(5)
    assert (error.value.stage, error.value.tick) == (2, 2)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("int8", [False, True])
def test_parts_put_together_are_the_layer(parts, int8):
    """Rows of the parts' products, summed, are the whole layer's: also with more devices than KV heads, and zeros."""
    biased = dataclasses.replace(WIDE, attention_bias=True, feed_forward_bias=True)
    # No bias is 0, and no two of them are alike.
    source = MemorySource(
        biased,
        jax.tree.map(
            lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), initialize(biased, jax.random.key(0))
        ),
    )
    source = Int8Source(source) if int8 else source
    mesh = placement.make_mesh(1, parts=parts)
    params = placement.place_target(mesh, source, StageSplit((2,)), np.float32)
    part = part_config(source.config, parts)
    assert params.layers[0].keys() == held_shapes(part).keys()
    for name, sizes in held_shapes(part).items():
        array = params.layers[0][name]
        assert {shard.data.shape for shard in array.addressable_shards} == {sizes}
        assert array.dtype == (np.float32 if not int8 or array.ndim == 1 else np.int8)
    x = jax.random.normal(jax.random.key(1), (5, WIDE.width))
    rows = chunk_rows(jnp.int32(0), 5, jnp.int32(5), 8)

    def run(params, cache, x):
        cache, x = run_stage(Target(source.config, StageSplit((2,)), 50, parts=parts), params, cache, rows, x)
        return jax.lax.pmean(vary(x), AXES)

    cache = placement.cache_maker(mesh, source.config, 2, 8, np.float32)()
    spec = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, placement.OWN, P()), out_specs=P()))
    found = program(params, cache, x)
    layers = [{name: source.read(f"layers/{layer}/{name}") for name in layer_shapes(source.config)} for layer in (0, 1)]
    rope = llama.rope_tables(WIDE, jnp.arange(5), jnp.float32)
    expected = x
    for layer in layers:

        def attend(query, key, value):
            mask = jnp.tril(jnp.ones((5, 5), bool))
            return llama.attention(query, jnp.moveaxis(key, 0, 2), jnp.swapaxes(value, 0, 1), mask), None

        expected, _ = llama.forward_layer(source.config, layer, expected, rope, attend)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    # Two sums a layer, beside this test's own mean.
    sums = re.findall("stablehlo.all_reduce", program.lower(params, cache, x).as_text())
    assert len(sums) == (2 * 2 if parts > 1 else 0) + 1


def test_what_a_device_reads_is_its_part():
    assert layer_part(WIDE, "attention_norm", 2, 1) is None
    assert layer_part(WIDE, "query", 2, 1) == (slice(0, 16), slice(4, 8), slice(0, 4))
    assert layer_part(WIDE, "output", 2, 1) == (slice(4, 8), slice(0, 4), slice(0, 16))
    assert layer_part(WIDE, "key", 8, 3) == (slice(0, 16), slice(1, 2), slice(0, 4))
    assert layer_part(WIDE, "down", 4, 3) == (slice(18, 22), slice(0, 16))  # 6, 6, 6 and 4 rows
    narrow = dataclasses.replace(WIDE, feed_forward=5)
    assert [layer_part(narrow, "up", 4, part)[1] for part in range(4)] == [*map(slice, (0, 2, 4, 5), (2, 4, 5, 5))]
    int8 = dataclasses.replace(WIDE, int8=True)
    assert layer_part(int8, "gate_scale", 4, 3) == (slice(18, 22),)
    assert layer_part(int8, "value_scale", 2, 1) == (slice(2, 4), slice(0, 4))
    assert layer_part(int8, "down_scale", 4, 3) is None
    biased = dataclasses.replace(WIDE, attention_bias=True)
    assert layer_part(biased, "query_bias", 2, 1) == (slice(4, 8), slice(0, 4))
    assert layer_part(biased, "output_bias", 2, 1) is None
    assert tensor_share(WIDE, 2) == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="8 heads, 4 KV heads cannot be split over 3 devices"):
        part_config(WIDE, 3)
    for parts in (6, 8):
        with pytest.raises(ValueError, match=f"12 heads, 4 KV heads cannot be split over {parts} devices"):
            part_config(dataclasses.replace(WIDE, heads=12), parts)


def test_bad_settings_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="tensor_parallel must be a whole number of at least 1, not 0"):
        EngineSettings(tensor_parallel=0)
    with pytest.raises(ValueError, match="heads cannot be split over 5 devices"):
        pipedec_jax.Decoder(pipedec_jax.load_demo("target"), method="pp", tensor_parallel=5)
