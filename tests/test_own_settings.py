"""A decoder within what its caller has told JAX, and what of it may be copied."""

import copy
import pickle

import jax
import numpy as np
import pytest

import pipedec_jax

PROMPT, TOKENS = "for index, value", 6
CALLERS = {
    "transfer guard": lambda: jax.transfer_guard("disallow_explicit"),
    "no compiling": lambda: jax.disable_jit(),
    "infinity is an error": lambda: jax.debug_infs(True),
    "nan is an error": lambda: jax.debug_nans(True),
}


@pytest.fixture(scope="module")
def models(family):
    return [pipedec_jax.load(family[name]) for name in ("draft", "target")]


@pytest.fixture(scope="module")
def expected(models):
    return pipedec_jax.Decoder(models[-1], method="pp", stages=1).generate(PROMPT, max_new_tokens=TOKENS).token_ids


@pytest.mark.parametrize("caller", CALLERS)
def test_what_a_caller_tells_jax_about_its_own_code_changes_no_token(models, expected, caller):
    draft, target = models
    with CALLERS[caller]():
        decoder = pipedec_jax.Decoder(target, draft, stages=2, width=4, children=2)
        found = decoder.generate(PROMPT, max_new_tokens=TOKENS).token_ids
        assert "".join(decoder.stream(PROMPT, max_new_tokens=TOKENS)) == target.tokenizer.decode(expected)
    assert found == expected


def test_the_threads_of_a_hierarchy_are_as_free_of_it(models, expected):
    """Their settings are not those of the thread that starts them, so the caller's are for the whole process here."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        decoder = pipedec_jax.HierarchyDecoder(models, form="free", stages=(1, 1), passes=(2,))
        with jax.set_mesh(jax.make_mesh((3,), ("data",))):  # the caller's too
            found = decoder.generate(PROMPT, max_new_tokens=TOKENS).token_ids
    finally:
        jax.config.update("jax_transfer_guard", before)
    assert found == expected


def test_within_a_compiled_function_nothing_is_decoded_and_no_answer_ended(models, expected):
    decoder = pipedec_jax.Decoder(models[-1], method="pp", stages=1)

    @jax.jit
    def compiled(x):
        decoder.generate(PROMPT, max_new_tokens=2)
        return x

    with pytest.raises(RuntimeError, match=r"a decoder cannot be used within a function that jax\.jit"):
        compiled(1.0)  # before there is an engine
    stream = decoder.stream(PROMPT, max_new_tokens=TOKENS)
    next(stream)
    with pytest.raises(RuntimeError, match=r"a decoder cannot be used within a function that jax\.jit"):
        compiled(1.0)
    assert "".join(stream)
    assert stream.result.token_ids == expected


def test_decoders_and_streams_are_not_copied(models):
    """Two copies of a decoder would share an engine, and each would take the other's tokens for its own."""
    decoder = pipedec_jax.Decoder(models[-1], method="pp", stages=1)
    for one in (decoder, decoder.stream(PROMPT, max_new_tokens=TOKENS)):
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=f"a {type(one).__name__} cannot be copied or pickled"):
                act(one)


@pytest.mark.parametrize("int8", [False, True])
def test_models_are_pickled_for_other_processes(family, int8):
    model = pipedec_jax.load(family["target"], int8=int8)
    again = pickle.loads(pickle.dumps(model))
    assert again.config == model.config
    assert again.tokenizer.decode(again.tokenizer.encode(PROMPT)) == PROMPT
    path = "layers/1/query"
    np.testing.assert_array_equal(again.source.read(path), model.source.read(path))
    used = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(used.source.read(path), model.source.read(path))
