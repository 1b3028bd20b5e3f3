"""What documents become before exit heads learn from them."""

import numpy as np

from pipedec_jax.tokenizer import Tokenizer
from pipedec_jax.training.exit_data import HELD_OUT_SHARE, encode_documents, open_data


def test_documents_begin_and_end_with_the_tokens_for_that_and_empty_ones_are_left_out(byte_level_dir):
    tokenizer = Tokenizer.load(byte_level_dir)
    texts = ["x = 1\n", "", "y = 2\n"]
    ended, open_ended = (encode_documents(tokenizer, texts, end) for end in (1, None))
    assert [one.dtype for one in ended] == [np.int32] * 2
    for document, plain, text in zip(ended, open_ended, ("x = 1\n", "y = 2\n"), strict=True):
        assert document.tolist() == [*tokenizer.encode(text), 1]
        assert plain.tolist() == tokenizer.encode(text)
        assert document[0] == 0


def test_what_is_held_out_is_not_learnt_from(byte_level_dir, tmp_path):
    tokenizer, names = Tokenizer.load(byte_level_dir), []
    for number in range(2 * HELD_OUT_SHARE):
        path = tmp_path / f"{number}.py"
        path.write_text(f"x{number} = {number}\n" * 9)
        names.append(str(path))
    found = open_data(tokenizer, 1, names)
    last = [tokenizer.encode(f"x{number} = {number}\n" * 9) for number in (38, 39)]
    assert [document.tolist()[:-1] for document in found.held_out] == last
    alone = open_data(tokenizer, 1, names[:38], held_out=names[38:])
    assert alone.digest == found.digest
    assert open_data(tokenizer, 1, names, held_out=names[38:]).digest != found.digest
