"""The decoder over the real engine and tiny random models: its answers, streams, threads and devices."""

import concurrent.futures
import dataclasses
import gc
import threading
import time
import weakref

import jax
import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.drafters.replay import ReplayDrafter
from pipedec_jax.model.parameters import MemorySource, nest, parameter_shapes
from pipedec_jax.modeled import cost
from tests.conftest import DEVICES

PROMPTS = ["def quicksort(items):\n    if len", "for index, value", "x"]


@pytest.fixture(scope="module")
def pp(target) -> Decoder:
    return Decoder(target, method="pp", stages=2)


@pytest.fixture(scope="module")
def pipedec(target, draft) -> Decoder:
    return Decoder(target, draft, method="pipedec", stages=2, width=4, children=2)


def test_a_chunk_may_be_larger_than_any_answer(pp):
    expected = pp.generate(PROMPTS[0], max_new_tokens=6).text
    assert "".join(pp.stream(PROMPTS[0], max_new_tokens=6, chunk=10**20)) == expected


def test_both_methods_give_the_same_answer(pp, pipedec):
    for prompt in PROMPTS:
        plain = pp.generate(prompt, max_new_tokens=24)
        assert plain.ticks == 2 * plain.new_tokens
        assert plain.hits is None
        assert plain.modeled_speedup_vs_pp == 1
        answer = pipedec.generate(prompt, max_new_tokens=24)
        assert answer.token_ids == plain.token_ids
        assert answer.text == plain.text
        assert answer.hits + answer.misses == answer.new_tokens - 1
        assert answer.ticks <= plain.ticks


def test_streams_and_token_prompts_give_what_generate_gives(pipedec, target):
    whole = pipedec.generate(PROMPTS[0], max_new_tokens=20, logprobs=True)
    stream = pipedec.stream(target.tokenizer.encode(PROMPTS[0]), max_new_tokens=20, logprobs=True, chunk=3)
    assert "".join(stream) == whole.text
    assert stream.result.tokens == whole.tokens
    assert all(token.logprob < 0 for token in whole.tokens)
    array = np.asarray(target.tokenizer.encode(PROMPTS[0]), np.int32)
    assert pipedec.generate(array, max_new_tokens=20).token_ids == whole.token_ids


def test_an_interrupt_inside_the_engine_leaves_what_came_before_and_says_what_can_be_done(pipedec, monkeypatch):
    whole = pipedec.generate(PROMPTS[0], max_new_tokens=20)
    stream = pipedec.stream(PROMPTS[0], max_new_tokens=20, chunk=3)
    shown = next(stream)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipedec.engine, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    with pytest.raises(RuntimeError, match=r"begin a new one \(generate\(\) or stream\(\) of a decoder"):
        next(stream)
    assert whole.text.startswith(stream.partial().text)
    assert stream.partial().text.startswith(shown)
    assert pipedec.generate(PROMPTS[0], max_new_tokens=20).token_ids == whole.token_ids


def test_an_abandoned_stream_does_not_disturb_the_next_answer(pipedec):
    whole = pipedec.generate(PROMPTS[1], max_new_tokens=20)
    abandoned = pipedec.stream(PROMPTS[0], max_new_tokens=20, chunk=1)
    next(abandoned)
    assert pipedec.generate(PROMPTS[1], max_new_tokens=20).tokens == whole.tokens
    with pytest.raises(RuntimeError, match="another answer"):
        next(abandoned)


def test_threads_get_whole_answers_one_after_the_other(pipedec):
    expected = {prompt: pipedec.generate(prompt, max_new_tokens=12).tokens for prompt in PROMPTS[:2]}
    left = pipedec.stream(PROMPTS[0], max_new_tokens=12, chunk=1)
    next(left)

    def ask(prompt):
        whole = [pipedec.generate(prompt, max_new_tokens=12).tokens == expected[prompt] for _ in range(10)]
        many = pipedec.generate_many([prompt] * 5, max_new_tokens=12)
        return whole + [answer.tokens == expected[prompt] for answer in many]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert list(pool.map(ask, expected)) == [[True] * 15] * 2
    with pytest.raises(RuntimeError, match="another answer"):
        next(left)


def test_a_stream_begins_after_another_threads_whole_answer(pipedec):
    prompt, begun = PROMPTS[0], threading.Event()
    expected = pipedec.generate(prompt, max_new_tokens=40)
    run = pipedec.engine.run

    def slow(tokens):
        begun.set()
        time.sleep(0.1)
        return run(tokens)

    with concurrent.futures.ThreadPoolExecutor() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipedec.engine, "run", slow)
        whole = pool.submit(pipedec.generate, prompt, max_new_tokens=40)
        assert begun.wait(60)
        stream = pipedec.stream(prompt, max_new_tokens=40)
        assert whole.result().tokens == expected.tokens
        assert "".join(stream) == expected.text


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pp", "stages": 3},
        {"method": "best-first", "stages": 2, "width": 4, "draft_steps": 2},
        {"method": "pipedec", "stages": 2, "width": 4, "tensor_parallel": 2},
        {"method": "best-first", "stages": 3, "width": 4, "drafter": "ngram"},
    ],
    ids=lambda options: options["method"],
)
def test_idle_ranks_change_no_token_and_no_tick(target, draft, options):
    guesses = options["method"] != "pp" and options.get("drafter") != "ngram"
    models = (target, draft) if guesses else (target,)
    expected, found = (
        Decoder(*models, **options, idle_ranks=idle).generate(
            PROMPTS[0], max_new_tokens=24, temperature=0.6, top_p=0.9, seed=2
        )
        for idle in (0, 2)
    )
    assert found.tokens == expected.tokens
    with_idle = Decoder(*models, **options, idle_ranks=2)
    assert len(with_idle.devices) == (options["stages"] + guesses + 2) * options.get("tensor_parallel", 1)


def test_what_is_not_finite_is_named_beside_idle_ranks(target):
    broken = {path: np.array(target.source.read(path)) for path in parameter_shapes(target.config)}
    broken["layers/3/value"][0, 0, 0] = np.nan
    unsound = pipedec_jax.Model.from_tree(target.config, nest(broken), target.tokenizer)
    with pytest.raises(pipedec_jax.NotFiniteError, match="stage 2 of 2"):
        Decoder(unsound, method="pp", stages=2, idle_ranks=2).generate([5], max_new_tokens=8)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}], ids=["greedy", "drawn"])
def test_a_draft_that_lacks_tokens_changes_none(pp, target, options):
    """As where tokens were added to the target alone. The draft is the target without its last rows."""
    whole = pp.generate(PROMPTS[0], max_new_tokens=40, **options)
    rows = max(whole.token_ids)  # so that of these it lacks the last one
    tree = {path: target.source.read(path) for path in parameter_shapes(target.config)}
    tree["embedding"] = tree["embedding"][:rows]
    config = dataclasses.replace(target.config, vocab_size=rows)
    draft = pipedec_jax.Model(config, target.tokenizer, lambda: MemorySource(config, nest(tree)))
    found = Decoder(target, draft, stages=2, width=4, drafter="model").generate(
        PROMPTS[0], max_new_tokens=40, **options
    )
    assert found.token_ids == whole.token_ids
    assert 0 < found.hits < 39


def test_a_mesh_of_the_callers_own_makes_no_difference(pp, target):
    whole = pp.generate(PROMPTS[0], max_new_tokens=8)
    broken = {path: np.array(target.source.read(path)) for path in parameter_shapes(target.config)}
    broken["layers/3/value"][0, 0, 0] = np.nan
    unsound = pipedec_jax.Model(target.config, target.tokenizer, lambda: MemorySource(target.config, nest(broken)))
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
        for decoder in (pp, Decoder(target, method="pp", stages=2)):
            assert decoder.generate(PROMPTS[0], max_new_tokens=8).token_ids == whole.token_ids
        with pytest.raises(pipedec_jax.NotFiniteError, match="stage 2 of 2"):
            Decoder(unsound, method="pp", stages=2).generate([5], max_new_tokens=8)


def test_several_prompts_share_the_compiled_program(pipedec):
    pipedec.generate(PROMPTS[0], max_new_tokens=8)
    answers = pipedec.generate_many(PROMPTS, max_new_tokens=8)
    assert [answer.compile_s for answer in answers] == [0, 0, 0]
    assert [answer.token_ids for answer in answers] == [
        pipedec.generate(prompt, max_new_tokens=8).token_ids for prompt in PROMPTS
    ]


def test_sampling_is_repeatable_and_a_stop_string_ends_it_earlier(pipedec):
    options = {"max_new_tokens": 40, "temperature": 1.0}
    whole = pipedec.generate(PROMPTS[0], seed=3, **options)
    assert pipedec.generate(PROMPTS[0], seed=4, **options).token_ids != whole.token_ids
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = pipedec.generate(PROMPTS[0], seed=3, stop=stop, **options)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: cut.new_tokens]


def test_a_request_carries_what_the_engine_needs(pp):
    request = pp.request("x", max_new_tokens=5, temperature=0.5, top_k=3, top_p=0.9, seed=2, stop=";", logprobs=True)
    assert request.prompt == tuple(pp.target.tokenizer.encode("x"))
    assert request.sampling == pipedec_jax.Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=2)
    assert (request.max_new_tokens, request.end_tokens, request.stop) == (5, (1, 2), (";",))
    assert request.logprobs


def test_modeled_time_follows_the_ticks(pipedec):
    answer = pipedec.generate(PROMPTS[0], max_new_tokens=16)
    costs = pipedec.settings.costs
    assert 0 < answer.modeled_cost < answer.ticks * (costs.stage.cost[-1] + costs.head.cost[-1]) * (1 + 1e-5)
    assert answer.modeled_speedup_vs_pp == pipedec.modeled_speedup_vs_pp(answer.modeled_cost / 16)
    assert pipedec.modeled_speedup_vs_pp(1.0) == pytest.approx(2 * pipedec.modeled_speedup_vs_pp(2.0))


def test_pp_costs_what_it_is_charged_as_the_baseline_also_where_stages_are_uneven(target):
    decoder = Decoder(target, method="pp", stages=3)  # of 2, 1 and 1 layers
    answer = decoder.generate(PROMPTS[0], max_new_tokens=4)
    sizes = target.config
    token = sizes.layers * cost.layer_bytes(sizes, 4) + cost.head_bytes(sizes, 4) / 3
    assert answer.modeled_cost == pytest.approx(4 * token, rel=1e-5)
    assert answer.modeled_speedup_vs_pp == 1


def test_calibration_takes_the_place_of_bytes(target, draft):
    seconds = {"layer": {"1": 1.0, "4": 2.0}, "head": 0.0, "draft": 0.1}
    decoder = Decoder(target, draft, stages=2, width=6, calibration=seconds)
    assert decoder.settings.costs.stage.cost == (0.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0)
    assert decoder.modeled_speedup_vs_pp(4.0) == 4 * 1.0 / 4.0
    with pytest.raises(ValueError, match=r"unknown key 'heads' in calibration; did you mean 'head'"):
        Decoder(target, draft, stages=2, calibration={**seconds, "heads": 1.0})


def test_bytes_per_device_cover_all_ranks(pipedec):
    devices = pipedec.bytes_per_device()
    assert len(devices) == 3
    assert all(sum(value for value in device.values() if isinstance(value, int)) > 0 for device in devices)


def test_another_drafter_takes_the_place_of_the_draft(target):
    decoder = Decoder(target, stages=2, width=1, drafter=ReplayDrafter(children=1, vocab_size=target.vocab_size))
    assert len(decoder.devices) == 2


@pytest.mark.parametrize("kind", ["one", "hierarchy"])
def test_a_decoder_that_is_dropped_frees_its_devices_at_once(target, draft, kind):
    """Not when the garbage collector comes: the next decoder may need the memory."""
    if kind == "one":
        decoder = Decoder(target, drafter="ngram", stages=2, width=2, dtype="float32")
    else:
        decoder = pipedec_jax.HierarchyDecoder([draft, target], passes=[1], dtype="float32")
    decoder.generate("x", max_new_tokens=3)
    for _ in decoder.stream("x", max_new_tokens=3):
        break
    engine = weakref.ref(decoder.engine)
    gc.collect()
    gc.disable()
    try:
        del decoder
        assert engine() is None
    finally:
        gc.enable()


def test_a_decoder_shows_what_it_is(target):
    shown = repr(Decoder(target, method="pp", stages=2, dtype="float32"))
    assert shown == f"Decoder({target!r}, pp, 2 stages, width 16, float32)"
