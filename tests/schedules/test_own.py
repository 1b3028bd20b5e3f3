"""Schedules of one's own: their tokens are plain decoding's whatever they prefer, and their mistakes are named."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.pipeline.engine import Engine
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.sampling import Sampling
from pipedec_jax.schedules.base import Schedule
from tests.oracle import GREEDY, Draw
from tests.random_pairs import FIVE, VOCAB, Pair, as_source, draft_weights, plain_steps, target_weights

PAIR = Pair(FIVE, seed=1)
PROMPT = (3, 14, 15, 92, 65, 35)
DRAWN = Draw(temperature=0.8, seed=3)


@dataclasses.dataclass(frozen=True)
class DeepestFirst(Schedule):
    """As the module's own example."""

    def score(self, tree):
        deep = tree.position[:, None].astype(jnp.float32)
        return super().score(tree) + 0.5 * deep


@dataclasses.dataclass(frozen=True)
class AtRandom(Schedule):
    """Sends guesses in no sensible order."""

    def score(self, tree):
        score = super().score(tree)
        noise = jax.random.normal(jax.random.key(7), score.shape, score.dtype)
        return jnp.where(jnp.isfinite(score), noise, score)


@pytest.mark.parametrize(
    ("schedule", "steps", "draw"),
    [(DeepestFirst(4), 1, DRAWN), (DeepestFirst(3, pool=9), 2, GREEDY), (AtRandom(3, pool=6), 2, DRAWN)],
    ids=str,
)
def test_tokens_are_plain_decodings(schedule, steps, draw):
    with jax.enable_x64(True):
        engine = Engine(
            as_source(PAIR.target_config, target_weights(PAIR)),
            as_source(PAIR.draft_config, draft_weights(PAIR)),
            EngineSettings("best-first", stages=3, children=3, draft_steps=steps, schedule=schedule, dtype=jnp.float64),
            vocab_size=VOCAB,
        )
        assert engine.settings.width == schedule.width
        engine.start(PROMPT, max_new_tokens=40, sampling=Sampling(draw.temperature, seed=draw.seed))
        progress = engine.run(40)
    assert progress.tokens == [step.token for step in plain_steps(PAIR, PROMPT, draw, 40)]
    assert sum(progress.hits) > 5


@dataclasses.dataclass(frozen=True)
class Short(Schedule):
    """Gives nodes of another number than its width."""

    def next_batch(self, tree):
        tree, batch = super().next_batch(tree)
        return tree, batch[:-1]


@dataclasses.dataclass(frozen=True)
class Alone(Schedule):
    """Forgets the tree."""

    def frontier(self, tree, step=0) -> Any:
        return super().frontier(tree, step)[1]


@dataclasses.dataclass(frozen=True)
class Grown(Schedule):
    """Gives another tree than it took."""

    def frontier(self, tree, step=0):
        tree, nodes = super().frontier(tree, step)
        return jax.tree.map(lambda leaf: jnp.concatenate((leaf, leaf)) if leaf.ndim == 1 else leaf, tree), nodes


@dataclasses.dataclass(frozen=True)
class Listed(Schedule):
    """Cannot be hashed."""

    sizes: Any = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tiny(Schedule):
    """Has too few places."""

    def capacity(self, stages):
        return self.width


class Model:
    """A target that is never decoded with."""

    def __init__(self, family):
        self.target, self.draft = (pipedec_jax.load(family[name]) for name in ("target", "draft"))

    def decoder(self, schedule, **options):
        return pipedec_jax.Decoder(self.target, self.draft, **{"stages": 2, "schedule": schedule} | options)


@pytest.fixture(scope="module")
def models(family):
    return Model(family)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("best", {}, "schedule must be an object of a Schedule .*, not 'best'"),
        (Schedule, {}, "schedule must be an object of a Schedule"),
        (Schedule(0), {}, "Schedule.width must be a whole number of at least 1, not 0"),
        (Schedule(4, pool=-1), {}, "Schedule.pool must be a whole number of at least 0, not -1"),
        (Schedule(4, pool=3), {}, r"Schedule.pool \(3\) must be 0, or hold a batch: width is 4"),
        (Listed(4), {}, "Listed must be a frozen dataclass .*unhashable type"),
        (Tiny(4), {}, r"Tiny.capacity\(2\) must be a whole number of at least 5, not 4"),
        (Schedule(4), {"method": "pipedec"}, "takes best-first's place: leave method 'pipedec' out"),
        (Schedule(4), {"width": 4}, "width is for schedules of pipedec_jax: leave it out"),
        (Schedule(4), {"pool": 8}, "pool is for schedules of pipedec_jax"),
        (Schedule(4), {"adaptive": False}, "adaptive is for schedules of pipedec_jax"),
        (Schedule(4), {"draft_steps": 2}, "draft_steps must be 1 for Schedule, which extends only what it has sent"),
        (Schedule(6000), {}, r"the tree would need \d+ places"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_weights_are_read(models, schedule, options, message):
    with pytest.raises(ValueError, match=message):
        models.decoder(schedule, **options)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Short(4), r"Short.next_batch\(\) must give nodes as whole numbers \[4\] \(its width\), not int32 \[3\]"),
        (Alone(4), r"Alone.frontier\(\) must give two things, the tree and nodes"),
        (Grown(4), r"Grown.frontier\(\) must give a tree of such arrays as it took"),
    ],
)
def test_what_it_gives_is_checked(models, schedule, message):
    with pytest.raises(ValueError, match=message):
        models.decoder(schedule).generate([1, 2, 3], max_new_tokens=2)


def test_a_decoder_is_named_after_it_and_drafts_as_often_as_there_is_time(models):
    decoder = models.decoder(DeepestFirst(np.int64(4)), record=True)
    assert (decoder.method, decoder.width, decoder.settings.steps) == ("DeepestFirst", 4, 1)
    assert "DeepestFirst" in repr(decoder)
    answer = decoder.generate([1, 2, 3], max_new_tokens=6)
    assert answer.method == decoder.recording().layout.method == "DeepestFirst"
    plain = pipedec_jax.Decoder(models.target, method="pp", stages=1)
    assert answer.token_ids == plain.generate([1, 2, 3], max_new_tokens=6).token_ids
    usual, own, poolless = (
        pipedec_jax.Decoder(pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft"), stages=2, **options)
        for options in ({"width": 4}, {"schedule": Schedule(4, pool=8)}, {"schedule": Schedule(4)})
    )
    assert usual.settings.steps == own.settings.steps > poolless.settings.steps == 1
