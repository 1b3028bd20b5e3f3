"""Every check that a decoder and a model make of their arguments, and what stands where none is given."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

import pipedec_jax
from pipedec_jax.decoding.base import INTERRUPT_TOKENS, STOP_TOKENS
from pipedec_jax.decoding.decoder import Decoder
from pipedec_jax.decoding.request_options import RequestOptions
from pipedec_jax.drafters.base import Drafter
from pipedec_jax.drafters.ngram import NGramDrafter
from pipedec_jax.model.exit_head import ExitHead, ExitHeadConfig, initialize_head
from pipedec_jax.pipeline.fit import has_places
from tests.conftest import DEVICES, write_byte_level


class NoChildren(Drafter):
    """A drafter that lacks what a user may forget."""

    def propose(self, params, state, view):
        raise AssertionError("asked")


@dataclasses.dataclass(frozen=True)
class Own(NoChildren):
    children: object
    ranks: object = 0


class AtExit(NoChildren):
    children = 1
    at_exit = True


class AtExitAndApart(AtExit):
    ranks = 1


def test_dtypes_are_taken_by_name_or_as_such_and_default_to_float32_on_cpu(target):
    for dtype, name in ((None, "float32"), ("bfloat16", "bfloat16"), (jax.numpy.float16, "float16")):
        decoder = Decoder(target, method="pp", stages=2, dtype=dtype)
        assert decoder.dtype.name == decoder.settings.dtype.name == name


def test_float64_is_taken_in_64_bit_mode_and_refused_where_that_has_ended(target):
    with jax.enable_x64(True):
        decoder = Decoder(target, method="pp", stages=2, dtype="float64")
        assert decoder.dtype == np.float64
    for act in (lambda: decoder.generate("x", max_new_tokens=8), decoder.prepare):
        with pytest.raises(ValueError, match="needs JAX's 64-bit mode, also while decoding"):
            act()
    with jax.enable_x64(True):
        decoder.prepare()
    with pytest.raises(ValueError, match="needs JAX's 64-bit mode, also while decoding"):
        decoder.generate("x", max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method must be one of pp, stpp, pipedec, best-first, ppsd, eesd, not 'magic'"),
        ({"method": "pipespec"}, r"method 'pipespec' is of a hierarchy of models: use pipedec_jax.HierarchyDecoder"),
        ({"stages": 5}, r"stages \(5\) must not exceed the target's layers \(4\)"),
        ({"stages": 0}, r"stages must be a whole number of at least 1, not 0"),
        ({"width": 0}, r"width must be"),
        ({"idle_ranks": -1}, r"idle_ranks must be a whole number of at least 0, not -1"),
        ({"width": 2.5}, r"width must be a whole number of at least 1, not 2.5"),
        ({"children": True}, r"children must be"),
        ({"children": 401}, r"children \(401\) must not exceed the number of tokens \(400\)"),
        ({"dtype": "int8"}, r"dtype must be one of float32, .*, not 'int8'"),
        ({"dtype": "nonsense"}, r"dtype must be one of"),
        ({"dtype": "float64"}, r"needs JAX's 64-bit mode"),
        ({"devices": []}, r"5 devices are needed .* but 0 are given"),
        (
            {"draft": None, "drafter": "ngram", "stages": 2, "tensor_parallel": 2, "devices": jax.devices()[:3]},
            r"4 devices are needed .* but 3 are given",
        ),
        ({"devices": jax.devices()[:1] * 5}, r"devices must be different ones, but .* is given twice among the 5"),
        ({"draft": None}, r"method 'best-first' needs a draft model"),
        ({"draft": "a/path"}, r"draft must be a model, such as pipedec_jax.load\('a/path'\) gives"),
        ({"drafter": 3}, r"drafter must be one of model, ngram, both, or an object of a Drafter, not 3"),
        ({"exit_layer": 2, "exit_head": "target"}, r"with an exit the target drafts for itself"),
        ({"exit_head": "target"}, r"exit_head is for an exit: give exit_layer too"),
        (
            {
                "draft": None,
                "exit_layer": 2,
                "exit_head": "target",
                "calibration": {"layer": 1.0, "head": 1.0},
            },
            r"the calibration lacks exit_head, .*--exit-layer 2 --exit-head 2-target",
        ),
        (
            {"draft": None, "method": "ppsd", "exit_head": ExitHead(ExitHeadConfig(9, "norm-linear"), {})},
            r"9.*choose 1 to 3",
        ),
        (
            {"drafter": AtExit(), "draft": None, "exit_layer": 2, "exit_head": "target"},
            r"exit_head is not used beside a drafter of your own \(AtExit\)",
        ),
        ({"drafter": NGramDrafter, "draft": None}, r"drafter must be one of .* an object of a Drafter, not <class"),
        (
            {"drafter": NoChildren(), "draft": None},
            r"NoChildren.children must be a whole number .* each node, not None",
        ),
        ({"drafter": Own(children=0), "draft": None}, r"Own.children must be a whole number of at least 1, .* not 0"),
        ({"drafter": Own(children=1, ranks=-1), "draft": None}, r"Own.ranks must be 0 or 1 .* not -1"),
        ({"drafter": Own(children=True), "draft": None}, r"Own.children must be a whole number .* not True"),
        (
            {"drafter": AtExitAndApart(), "draft": None, "exit_layer": 2},
            r"AtExitAndApart.ranks must be 0: at_exit it is on the rank of the exit",
        ),
        ({"drafter": Own(children=2.0), "draft": None}, r"Own.children must be a whole number .* not 2.0"),
        ({"drafter": Drafter(), "draft": None}, r"Drafter must define propose\(\)"),
        ({"sharpness": "sharp"}, r"sharpness must be a number, not 'sharp'"),
        ({"sharpness": True}, r"sharpness must be a number, not True"),
        ({"calibration": "times.json"}, r"a calibration is an object of seconds .*, not 'times.json'"),
        ({"devices": 2}, r"devices must be a list of JAX devices, not 2"),
        ({"devices": "cpu"}, r"devices must be a list of JAX devices, not 'cpu'"),
        ({"sharpness": 1e308}, r"sharpness must be over 0 and finite, in float32, not 1e\+308"),
        ({"sharpness": 1e-50}, r"sharpness must be over 0 and finite, in float32, not 1e-50"),
        (
            {"width": 5000},
            r"the tree would need \d+ places, and 16384 are the most; lower width, stages, draft_steps or p",
        ),
        ({"width": 5000, "method": "pipedec"}, r"the tree would need \d+ places, .* lower width or stages$"),
        ({"width": 5000, "method": "stpp"}, r"the tree would need \d+ places, .* lower width or depth$"),
        ({"capacity": 10**20}, r"capacity must be at most 32768, not 1\d+: .* hold the target's context of 128 tokens"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(target, draft, options, message):
    blind = [pipedec_jax.Model(m.config, m.tokenizer, lambda: pytest.fail("read weights")) for m in (target, draft)]
    with pytest.raises(ValueError, match=message):
        Decoder(blind[0], **{"draft": blind[1], **options})


UNUSED = {
    "pp": {"draft_steps": 2, "pool": 64, "adaptive": True, "depth": 12, "draft_length": 4},
    "stpp": {"draft_steps": 2, "pool": 64, "adaptive": True, "draft_length": 4},
    "pipedec": {"draft_steps": 2, "pool": 64, "adaptive": False, "depth": 12, "draft_length": 4},
    "best-first": {"depth": 12, "draft_length": 4},
    "ppsd": {"draft_steps": 2, "pool": 64, "adaptive": True, "depth": 12, "draft_length": 4},
    "eesd": {"draft_steps": 2, "pool": 64, "adaptive": True, "depth": 12},
}


@pytest.mark.parametrize(
    ("method", "name", "value"), [(method, *one) for method, given in UNUSED.items() for one in given.items()]
)
def test_what_a_method_has_no_use_for_is_refused_also_where_it_is_the_default(target, draft, method, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is for .*, not for {method}: leave it out"):
        Decoder(target, draft, method=method, stages=2, **{name: value})


@pytest.mark.parametrize(
    ("drafter", "options", "message"),
    [
        ("ngram", {"sharpness": 1.0}, "sharpness is for guesses of a model: drafter 'ngram' has no use for it"),
        ("ngram", {"noise": "none"}, "noise is for guesses of a model"),
        (NGramDrafter(children=2), {"children": 2}, "children is not used beside a drafter of your own, which has its"),
        (NGramDrafter(children=2), {"sharpness": 2.0}, "sharpness is not used beside a drafter of your own"),
        (NGramDrafter(children=2), {"noise": "none"}, "noise is not used beside a drafter of your own"),
    ],
)
def test_what_a_drafter_has_no_use_for_is_refused(target, drafter, options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(target, drafter=drafter, stages=2, **options)


def test_what_others_guess_by_may_be_given_to_pp_and_is_not_read(target, draft):
    """So that methods are compared by their names alone."""
    unread = pipedec_jax.Model(draft.config, draft.tokenizer, lambda: pytest.fail("read weights"))
    others = {"width": 4, "children": 3, "drafter": "both", "sharpness": 2.0, "noise": "none", "draft_steps": 1}
    decoder = Decoder(target, unread, method="pp", stages=2, **others)
    assert decoder.draft is None
    decoder.prepare()


def test_plain_decoding_reads_no_draft_though_one_is_given(target, draft):
    blind = pipedec_jax.Model(draft.config, draft.tokenizer, lambda: pytest.fail("read weights"))
    decoder = Decoder(target, blind, method="pp", stages=2)
    assert decoder.draft is None
    assert len(decoder.devices) == 2
    decoder.prepare()


def test_guesses_come_as_many_ticks_later_as_the_exit_path_has_stages(target):
    for exit_stages in (1, 2):
        exit_ = {"exit_layer": 2, "exit_head": "target", "exit_stages": exit_stages}
        assert Decoder(target, method="ppsd", stages=exit_stages + 2, **exit_).lag == exit_stages
    assert Decoder(target, method="pp", stages=4).lag == 1


def test_a_tick_costs_less_where_stages_are_split(target):
    whole, halves = (Decoder(target, method="pp", stages=2, tensor_parallel=parts) for parts in (1, 2))
    costs = [decoder.settings.costs.stage.at(1) for decoder in (whole, halves)]
    assert costs[1] == pytest.approx(costs[0] / 2, rel=0.3)


@pytest.mark.parametrize("chunk", [0, 2.5, None])
def test_a_piece_of_a_stream_has_a_token_at_least(target, chunk):
    blind = pipedec_jax.Model(target.config, target.tokenizer, lambda: pytest.fail("read weights"))
    with pytest.raises(ValueError, match=f"chunk must be a whole number of at least 1, not {chunk}"):
        Decoder(blind, method="pp", stages=1).stream("x", max_new_tokens=8, chunk=chunk)


def test_a_whole_answer_is_decoded_in_shorter_pieces_where_a_stop_string_may_end_it(target, draft):
    """What is decoded beyond it is lost; a hierarchy's host waits for every tick in any case."""
    single = Decoder(target, method="pp", stages=1)
    several = pipedec_jax.HierarchyDecoder([draft, target], passes=[2])
    for decoder, tokens in ((single, INTERRUPT_TOKENS), (several, 100)):
        for stop, expected in (((), tokens), (("a",), STOP_TOKENS)):
            assert decoder._whole_chunk(decoder.request("x", max_new_tokens=100, stop=stop)) == expected
    assert STOP_TOKENS < INTERRUPT_TOKENS


def test_end_tokens_that_are_no_tokens_end_nothing(target):
    size = target.vocab_size
    model = pipedec_jax.Model(target.config, target.tokenizer, target.source.read, end_tokens=(1, size - 1, size, 999))
    assert Decoder(model, method="pp", stages=1).request("x", max_new_tokens=8).end_tokens == (1, size - 1)


def test_how_many_children_there_are_by_default(target, draft):
    """PPSD's follow its width, so that a width is never without effect; a number that is given stays."""

    def children(**options):
        return Decoder(target, stages=2, **options).children

    exit_ = {"exit_layer": 2, "exit_head": "target"}
    assert [children(draft=draft, width=width) for width in (None, 4, 32)] == [16, 16, 16]
    assert [children(method="ppsd", width=width, **exit_) for width in (None, 1, 4, 32)] == [1, 1, 4, 16]
    assert children(method="ppsd", width=np.int64(4), **exit_) == 4
    assert children(method="ppsd", width=4, children=1, **exit_) == 1
    assert children(method="eesd", **exit_) == 1
    for bad in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="width must be a whole number of at least 1"):
            children(method="ppsd", width=bad, **exit_)


def test_automatic_draft_steps_are_no_more_than_the_tree_has_places_for(target, draft):
    """A draft that costs next to nothing would make four steps; wide batches leave room for fewer."""
    times = {"layer": 1.0, "head": 1.0, "draft": 1e-3}
    found = {}
    for width in (16, 1800, 2300, 3100):
        decoder = Decoder(target, draft, stages=4, width=width, calibration=times)
        assert has_places(decoder.settings)
        found[width] = decoder.settings.draft_steps
    assert found == {16: 4, 1800: 3, 2300: 2, 3100: 1}
    with pytest.raises(ValueError, match="and 16384 are the most; lower width, stages, draft_steps or pool"):
        Decoder(target, draft, stages=4, width=3100, draft_steps=4, calibration=times)


def test_more_stages_than_devices_are_refused(draft):
    from pipedec_jax.config import LlamaConfig

    many = LlamaConfig(vocab_size=400, width=8, feed_forward=8, layers=40, heads=1, kv_heads=1, head_size=8, context=64)
    deep = pipedec_jax.Model(many, draft.tokenizer, lambda: pytest.fail("read weights"))
    with pytest.raises(ValueError, match=rf"{DEVICES + 1} devices are needed .* there are {DEVICES} .*XLA_FLAGS="):
        Decoder(deep, draft, stages=DEVICES)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([0, 400], {}, "prompt token 400 is none of the target's: ids go from 0 to 399"),
        ([-1], {}, "prompt token -1"),
        ([1, True], {}, "a prompt must be text or whole token ids"),
        ("x", {"max_new_tokens": 127}, r"prompt \(2 tokens\) and max_new_tokens \(127\) exceed .* 128"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        (b"x", {}, "a prompt must be text or token ids, not bytes"),
        ({1, 2}, {}, "a prompt must be text or token ids in their order, not a set"),
        ({"input_ids": [1]}, {}, "a prompt must be text or token ids in their order, not a dict"),
        ([{"role": "user", "content": "x"}], {}, r"those of a chat's messages are model.chat\(messages\)"),
        (np.asarray([[1, 2]]), {}, r"token ids must have one axis, not the shape \(1, 2\)"),
        (3, {}, "a prompt must be text or whole token ids"),
        ("x", {"logprobs": 1}, "logprobs must be True or False, not 1"),
        ("x", {"drafter_params": 1}, "drafter_params are for a drafter of your own"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"top_p": 0.0}, "top_p"),
        ("x", {"top_k": -1}, "top_k"),
        ("x", {"seed": -1}, "seed"),
        ("x", {"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ("x", {"stop": ["a", ""]}, "stop string must be text and not empty"),
        ("x", {"stop": [3]}, "stop string must be text and not empty, not 3"),
        ("x", {"stop": 3}, "stop string must be text and not empty, not 3"),
        ("x", {"stop": {"a": 1}}, r"stop string must be text and not empty, not \{'a': 1\}"),
        ("x", {"stop": iter(["a"])}, "stop string must be text and not empty, not <list_iterator"),
    ],
)
def test_bad_requests_are_refused_before_weights_are_read(target, prompt, options, message):
    blind = pipedec_jax.Model(target.config, target.tokenizer, lambda: pytest.fail("read weights"))
    with pytest.raises(ValueError, match=message):
        Decoder(blind, method="pp", stages=1).generate(prompt, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize("prompt", ["x = 1", [1, 2], np.asarray([1, 2]), None, b"x", {"prompt": "x"}])
def test_one_prompt_is_no_list_of_prompts(target, prompt):
    with pytest.raises(ValueError, match="a list of prompts is needed; generate takes one"):
        Decoder(target, method="pp").generate_many(prompt)


def test_all_of_many_prompts_are_checked_before_one_is_decoded(target):
    blind = pipedec_jax.Model(target.config, target.tokenizer, lambda: pytest.fail("read weights"))
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        Decoder(blind, method="pp").generate_many(["x", ""], max_new_tokens=2)


def test_numpy_numbers_and_ids_are_taken(target):
    numbers = {"stages": np.int64(2), "width": np.int32(4), "tensor_parallel": np.int64(1), "exit_layer": np.int64(2)}
    decoder = Decoder(target, exit_head="target", **numbers)
    request = decoder.request(np.asarray([1, 2]), max_new_tokens=np.int64(3))
    assert request.prompt == (1, 2)
    assert type(decoder.settings.exit_layer) is int
    decoding = Decoder(target, method="pp", stages=np.int64(2), tensor_parallel=np.int64(2))
    assert len(decoding.devices) == 4


def test_options_are_passed_on_under_the_names_and_types_that_request_has():
    """Editors and type checkers see the former."""
    taken = typing.get_type_hints(Decoder.request)
    for name in ("self", "prompt", "max_new_tokens", "return"):
        taken.pop(name, None)
    assert typing.get_type_hints(RequestOptions) == taken


def test_an_exit_head_in_memory_may_be_as_training_leaves_it(target):
    """JAX's arrays; what is no such head is refused before weights are read."""
    config = ExitHeadConfig(exit_layer=1, variant="block", width=8, feed_forward=8)
    params = initialize_head(config, target.config, target.source.read_all(), 0)
    settings = {"method": "ppsd", "stages": 2, "dtype": "float32"}
    plain = Decoder(target, method="pp", stages=1, dtype="float32").generate("x", max_new_tokens=6)
    found = Decoder(target, exit_head=ExitHead(config, params), **settings).generate("x", max_new_tokens=6)
    assert found.token_ids == plain.token_ids
    blind = pipedec_jax.Model(target.config, target.tokenizer, lambda: pytest.fail("read weights"))
    for wrong, message in (
        ({}, r"the exit head lacks \['final_norm', "),
        (params | {"map": np.zeros((3, 3))}, r"'map' of the exit head has shape \(3, 3\), a 1-block-8-ff8 head has"),
        (None, "the params of an ExitHead must be a nested dictionary of arrays, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(blind, exit_head=ExitHead(config, wrong), **settings)


def test_a_model_of_wrong_parts_is_refused(target):
    def weights():
        return target.source

    for parts, message in (
        ((target.config.to_dict(), target.tokenizer, weights), "config must be a pipedec_jax.LlamaConfig, not {"),
        ((target.config, target.tokenizer.backend, weights), "tokenizer must be a pipedec_jax.Tokenizer, not "),
        ((target.config, target.tokenizer, target.source), "weights must be a function that gives the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            pipedec_jax.Model(*parts)
    with pytest.raises(ValueError, match="end_tokens must be a list of token ids, not 3"):
        pipedec_jax.Model(target.config, target.tokenizer, weights, end_tokens=3)
    with pytest.raises(ValueError, match=r"weights must give a ParameterSource.*MemorySource.*, not dict"):
        Decoder(pipedec_jax.Model(target.config, target.tokenizer, dict), method="pp", stages=1).prepare()
    other = dataclasses.replace(target.config, rope_theta=3.0)
    with pytest.raises(ValueError, match="weights are of another geometry than the model"):
        Decoder(pipedec_jax.Model(other, target.tokenizer, weights), method="pp", stages=1).prepare()


def test_drafts_with_other_tokens_are_refused(target, draft, tmp_path):
    other = pipedec_jax.Tokenizer.load(write_byte_level(tmp_path, extra=("<|extra|>",)))
    stranger = pipedec_jax.Model(draft.config, other, lambda: pytest.fail("read weights"))
    with pytest.raises(ValueError, match="must have the same tokens: '!' is id 3 in the target's map and id 4"):
        Decoder(target, stranger, stages=2)
