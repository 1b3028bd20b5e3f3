"""Sizes that follow from the settings, at the ends of their ranges."""

import dataclasses
from typing import Any

import pytest

from pipedec_jax.config import LlamaConfig
from pipedec_jax.drafters.base import Drafter
from pipedec_jax.pipeline.fit import cache_slots, check_fit, check_request, tree_slots
from pipedec_jax.pipeline.methods import make_schedule
from pipedec_jax.pipeline.settings import EngineSettings
from pipedec_jax.pipeline.split import split_layers

TARGET = LlamaConfig(vocab_size=100, width=8, feed_forward=16, layers=4, heads=2, kv_heads=1, head_size=4, context=64)


def test_a_cache_is_the_next_power_of_two_or_as_given_and_never_too_small():
    settings = EngineSettings(method="pipedec", stages=3, width=5)
    tree = tree_slots(settings)
    for slots in (256, 512, 1024):
        assert cache_slots(settings, slots - tree) == slots
        assert cache_slots(settings, slots - tree + 1) == 2 * slots
    assert cache_slots(settings, 1) == 256
    given = EngineSettings(method="pipedec", stages=3, width=5, capacity=100)
    assert cache_slots(given, 100 - tree) == cache_slots(given, 1) == 100
    with pytest.raises(ValueError, match="need 101 cache slots but capacity is 100"):
        cache_slots(given, 101 - tree)


def test_prompt_and_answer_may_fill_the_context_and_no_more():
    settings = EngineSettings(method="pp")
    assert check_request(settings, TARGET, 90, [0, 89], 62) == [0, 89]
    with pytest.raises(ValueError, match=r"max_new_tokens \(63\) exceed the target's context of 64"):
        check_request(settings, TARGET, 90, [0, 89], 63)
    with pytest.raises(ValueError, match="prompt token 90 is none of the target's: ids go from 0 to 89"):
        check_request(settings, TARGET, 90, [90], 1)


@dataclasses.dataclass(frozen=True)
class Guessing(Drafter):
    """A drafter of a user's; it is only looked at, never asked."""

    children: Any = 1
    ranks: Any = 0
    at_exit: Any = False

    def propose(self, params, state, view):
        raise NotImplementedError


class Silent(Drafter):
    """Does not say how it guesses."""

    children = 1


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (Guessing(children=0), r"Guessing\.children must be a whole number of at least 1, .* not 0"),
        (Guessing(children=True), r"Guessing\.children must be a whole number of at least 1, .* not True"),
        (Guessing(ranks=2), r"Guessing\.ranks must be 0 or 1 .* not 2"),
        (Guessing(ranks=1, at_exit=True), r"Guessing\.ranks must be 0: at_exit it is on the rank of the exit"),
        (Silent(), r"Silent must define propose\(\)"),
        ("nobody", "drafter must be one of model, .* not 'nobody'"),
    ],
)
def test_a_drafter_that_is_none_is_refused(drafter, message):
    settings = EngineSettings(method="pipedec", stages=2, width=1, children=1)
    check_fit(settings, TARGET, None, 90, Guessing())
    with pytest.raises(ValueError, match=message):
        check_fit(settings, TARGET, None, 90, drafter)


@pytest.mark.parametrize(("depth", "stages", "spare"), [(4, 2, 2), (5, 2, 3), (1, 4, 1), (8, 8, 1)])
def test_beside_a_static_tree_s_stages_the_draft_takes_in_what_it_has_not_seen(depth, stages, spare):
    schedule = make_schedule(EngineSettings(method="stpp", depth=depth, stages=stages, width=3))
    assert (schedule.spare, schedule.level, schedule.width) == (spare, 3, 1 + 3 * depth)


def test_the_first_stages_have_the_layers_that_are_over():
    assert split_layers(7, 3).count == (3, 2, 2)
    assert split_layers(7, 3).first == (0, 3, 5)
    assert split_layers(6, 3).count == (2, 2, 2)
