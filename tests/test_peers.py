"""Peers: GGUF arrays stand for the same model, guesses never change llama.cpp's text, and times become ratios."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from checkpoints_convert.config_json import llama_config
from pipedec_jax.model.parameters import MemorySource, nest, parameter_shapes
from pipedec_jax.peers import contest, gguf_file
from pipedec_jax.peers.answer import Answer
from pipedec_jax.peers.cpp import LlamaCpp
from tests.random_pairs import FIVE, ODD, PAIRS, as_source, hugging_face_config, target_weights


def answer(tokens, first_s, seconds):
    return Answer(tuple(tokens), first_s, seconds)


class Scripted:
    def __init__(self, name, log, answers):
        self._name, self._log, self._answers = name, log, answers

    def answer(self, prompt, new_tokens):
        self._log.append((self._name, tuple(prompt)))
        return self._answers[tuple(prompt)]


def test_peers_take_turns_and_their_times_become_ratios_of_the_same_prompt():
    log = []
    one, two = (1,), (2,)
    ours = {one: answer([5, 6, 7], 0.1, 0.3), two: answer([8, 8, 8], 0.1, 0.5)}
    theirs = {one: answer([5, 6, 7], 0.2, 0.8), two: answer([8, 9, 8], 0.2, 0.6)}
    peers = {"ours": Scripted("ours", log, ours), "theirs": Scripted("theirs", log, theirs)}
    found = contest.contest(peers, [one, two], 3, rounds=2)
    turns = [("ours", one), ("theirs", one), ("ours", two), ("theirs", two)]
    assert log == [("ours", one), ("theirs", one), *turns, *turns]  # the first of each warms up
    rows = contest.standings(found, "ours", ["ours"])
    assert [(row.same, row.answers, row.first_differs) for row in rows] == [(4, 4, ""), (2, 4, "answer 2, token 2")]
    assert rows[1].per_token_ms == pytest.approx(1e3 * (0.3 + 0.2) / 2)
    assert rows[1].first_ms == pytest.approx(200)
    # 0.1 s over 0.3 s on the first prompt, 0.2 s over 0.2 s on the second.
    assert rows[1].against["ours"][0] == pytest.approx((1 / 3 + 1) / 2)
    assert rows[0].against["ours"] == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(("prompts", "tokens", "rounds"), [([], 2, 1), ([[1]], 1, 1), ([[1]], 2, 0)])
def test_nothing_to_compare_is_an_error(prompts, tokens, rounds):
    with pytest.raises(ValueError, match="take a prompt, 2 tokens and a round at least"):
        contest.contest({}, prompts, tokens, rounds=rounds)


class Text:
    """A model, as `cpp.Context` is one, whose text is known: after token t comes `after[t]`."""

    def __init__(self, after):
        self.after, self.read, self.fed = after, [], []

    def feed(self, tokens, scored):
        self.read += tokens
        self.fed.append(len(tokens))
        return np.eye(len(self.after))[[self.after[token] for token in tokens[-scored:]]] * 9

    def keep(self, count):
        assert count <= len(self.read) + 1
        del self.read[count:]


@pytest.mark.parametrize("guesses", [0, 1, 3, 20])
@pytest.mark.parametrize("least", [0.0, 0.75])
def test_guesses_of_a_draft_never_change_the_text(guesses, least):
    target, draft = Text([1, 2, 3, 4, 5, 0, 0]), Text([1, 2, 0, 4, 5, 6, 0])
    peer = LlamaCpp(target, draft if guesses else None, guesses, least)
    for prompt in ([0], [3, 4], [6, 0, 1]):
        found = peer.answer(prompt, 12).tokens
        expected = [target.after[prompt[-1]]]
        while len(expected) < 12:
            expected.append(target.after[expected[-1]])
        assert list(found) == expected
        assert target.read == [*prompt, *expected[:-1]]
    passes = len(target.fed)
    assert passes == 36 if not guesses else passes < 36


def test_what_is_looked_up_is_verified(monkeypatch):
    class LookUp:
        def __init__(self, num_pred_tokens):
            self.count = num_pred_tokens

        def __call__(self, text):
            return np.asarray([*text[-2:], 1, 1][: self.count], np.intc)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", SimpleNamespace(LlamaPromptLookupDecoding=LookUp))
    target = Text([1, 0])
    assert LlamaCpp(target, None, 4).answer([0], 6).tokens == (1, 0, 1, 0, 1, 0)
    assert len(target.fed) < 6


@pytest.mark.parametrize("geometry", [FIVE, ODD])
def test_gguf_arrays_are_outputs_by_inputs_and_pairs_are_interleaved(geometry):
    pair = PAIRS[geometry][0]
    weights = target_weights(pair)
    source = as_source(pair.target_config, weights)
    arrays = dict(gguf_file.gguf_arrays(source))
    A = pair.target_config["head_dim"]
    for theirs, name in (
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.up_proj", "ffn_up"),
    ):
        np.testing.assert_allclose(
            arrays[f"blk.1.{name}.weight"], weights[f"model.layers.1.{theirs}.weight"], rtol=1e-6
        )
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    found = arrays["blk.0.attn_q.weight"]
    # Split halves rotate (i, i + A / 2); llama.cpp rotates (2 i, 2 i + 1).
    np.testing.assert_allclose(found[0:A:2], query[: A // 2], rtol=1e-6)
    np.testing.assert_allclose(found[1:A:2], query[A // 2 : A], rtol=1e-6)
    assert not [name for name in arrays if name.endswith(".bias")]
    assert ("output.weight" in arrays) != pair.target_config["tie_word_embeddings"]
    assert ("rope_freqs.weight" in arrays) == (pair.target_config["rope_scaling"] is not None)


def test_biases_are_in_a_gguf_in_the_order_of_their_matrices_rows():
    config = hugging_face_config(1, attention_bias=True, mlp_bias=True)
    shapes = parameter_shapes(llama_config({"model_type": "llama", **config}))
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    for path in shapes:
        if path.endswith("_bias"):  # Row r of a matrix is r, and so is its bias.
            count = arrays[path].size
            arrays[path] = np.arange(count, dtype=float).reshape(shapes[path])
            arrays[path.removesuffix("_bias")] += arrays[path]
    source = MemorySource(llama_config({"model_type": "llama", **config}), nest(arrays))
    found = dict(gguf_file.gguf_arrays(source))
    biases = [name for name in found if name.endswith(".bias")]
    assert len(biases) == 7
    for name in biases:
        np.testing.assert_array_equal(found[name], found[name.replace(".bias", ".weight")][:, 0])


@pytest.mark.parametrize(
    ("scaling", "slower", "amplitude"),
    [
        ({"rope_type": "linear", "factor": 4.0}, [4.0] * 4, []),
        (
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 40},
            [1.0, 4.0, 4.0, 4.0],
            [1.5],
        ),
    ],
    ids=["linear", "yarn"],
)
def test_scaled_rope_is_in_a_gguf_as_llama_cpp_takes_it(scaling, slower, amplitude):
    """As what each frequency is divided by, and a factor on cosine and sine."""
    config = hugging_face_config(1, rope_scaling=scaling)
    source = as_source(config, target_weights(PAIRS[FIVE][0]))
    np.testing.assert_allclose(dict(gguf_file.gguf_arrays(source))["rope_freqs.weight"], slower)
    writer = MagicMock()
    gguf_file.write_geometry(writer, source.config)
    assert [call.args[0] for call in writer.add_rope_scaling_attn_factors.call_args_list] == amplitude


def test_a_gguf_file_is_read_back(tmp_path):
    gguf = pytest.importorskip("gguf")
    pair = PAIRS[FIVE][0]
    source = as_source(pair.target_config, target_weights(pair))
    path = tmp_path / "model" / "target.gguf"
    gguf_file.write_gguf(SimpleNamespace(config=source.config, source=source), path)
    read = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    for name, array in gguf_file.gguf_arrays(source):
        np.testing.assert_array_equal(tensors[name], array.astype(np.float32))
    assert read.fields["llama.block_count"].contents() == 5
