"""Wrong settings of a hierarchy are errors that say what to change."""

from __future__ import annotations

import jax
import pytest

from pipedec_jax.hierarchy.engine import HierarchyEngine
from pipedec_jax.hierarchy.settings import HierarchySettings
from tests.hierarchy.families import sources
from tests.random_pairs import VOCAB

BAD = {
    "another method": ({"method": "magic"}, "method must be one of pipespec, speculative, not 'magic'"),
    "another form": ({"form": "wild"}, "form must be one of lockstep, free, not 'wild'"),
    "one model": ({"stages": (1,), "passes": ()}, "needs at least two models"),
    "three in turns": (
        {"method": "speculative", "stages": (1, 1, 1), "passes": (4, 2)},
        "speculative takes two models, the draft and the target, not 3",
    ),
    "too many passes": ({"passes": (4, 2)}, "one number for each model but the target: 1, not 2"),
    "one pass too many": ({"passes": (257,)}, "passes must be at most 256 in a tick, not 257"),
    "no pass": ({"passes": (0,)}, "passes must be a whole number of at least 1, not 0"),
    "no width": ({"width": 0}, "width must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        HierarchySettings(**options)


def test_models_must_fit():
    two = sources(0, 2)
    for models, options, vocab_size, message in (
        (two, {"stages": (1, 1, 1), "passes": (2, 2)}, VOCAB, "given for 3 models but there are 2"),
        (two, {"stages": (3, 1)}, VOCAB, r"model 0 .*stages \(3\) must not exceed the model's layers \(2\)"),
        (two, {}, 1000, "model 0 has 101 embedding rows for 1000 tokens; choose models of the target's family"),
        (two, {"stages": (2, 3)}, VOCAB, "5 devices are needed"),
    ):
        settings = HierarchySettings(**options)
        with pytest.raises(ValueError, match=message):
            HierarchyEngine(models, settings, vocab_size=vocab_size, devices=jax.devices()[:4])


def test_widths_hold_what_the_smaller_models_give_in_a_tick():
    assert HierarchySettings(passes=(6,)).widths == (1, 6)
    assert HierarchySettings(passes=(256,)).widths == (1, 256)
    assert HierarchySettings(stages=(2, 1), passes=(5,)).widths == (1, 3), "a token takes a pass of both stages"
    assert HierarchySettings(stages=(1, 1, 1), passes=(4, 2)).widths == (1, 6, 6)
    assert HierarchySettings(method="speculative", passes=(6,)).widths == (1, 7)
    assert HierarchySettings(passes=(1,)).widths == (1, 2)
