"""Models with what the grids' have not, scaled rotary frequencies and biases: tokens are the oracle's."""

import pytest

from pipedec_jax.model.exit_head import ExitHeadConfig
from tests import random_pairs
from tests.exactness import PREFILL, Bench, Shape
from tests.oracle import GREEDY, Draw
from tests.random_pairs import VOCAB, Pair, hugging_face_config, plain_steps

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
OTHERS = {
    "linear": hugging_face_config(5, rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "yarn": hugging_face_config(5, rope_theta=500.0, rope_scaling=YARN),
    "biases": hugging_face_config(5, attention_bias=True, mlp_bias=True),
}
PROMPT = tuple(range(3, VOCAB, 2))


SHAPES = [
    Shape("best-first", 3, 4, 3, "linear"),
    # The exit's head is a layer of its own, whose rotations are the target's.
    Shape("ppsd", 3, 1, 1, "yarn", head=ExitHeadConfig(2, "block")),
    Shape("best-first", 3, 4, 3, "biases"),
    # Biases after a sum over devices count once.
    Shape("best-first", 2, 4, 3, "biases", others=(("tensor_parallel", 2),)),
    # The head's block has none of the target's biases.
    Shape("ppsd", 3, 1, 1, "biases", head=ExitHeadConfig(2, "block", feed_forward=40)),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_tokens_are_plain_decodings(case, monkeypatch):
    for kind, config in OTHERS.items():
        monkeypatch.setitem(random_pairs.GEOMETRIES, kind, config)
        monkeypatch.setitem(random_pairs.DRAFT_ROWS, kind, VOCAB)
        monkeypatch.setitem(PREFILL, kind, 16)
    pair, bench, hits = Pair(case.geometry, seed=1), Bench(case), 0
    for draw in (GREEDY, Draw(temperature=0.8, top_k=20, seed=3)):
        progress = bench.decode(pair, PROMPT, 60, draw)
        assert progress.tokens == [step.token for step in plain_steps(pair, PROMPT, draw, 60)]
        hits += sum(progress.hits)
    assert hits > 5
