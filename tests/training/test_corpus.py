import json

import pytest

from pipedec_jax.training import corpus


def make_library(root):
    files = {
        "alpha.py": "def one(a, b):\n    return a + b\n" * 30,
        "json/decoder.py": "class Decoder:\n    def decode(self, text):\n        return self.scan(text, 0)\n" * 5,
        "json/copied.py": "def one(a, b):\n    return a + b\n" * 20,
        "json/tests/inner.py": "x = 1\n",
        "encodings/table.py": "decoding_table = (\n    'abc'\n)\n",
        "test/test_alpha.py": "x = 2\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_tests_tables_and_copies_are_left_out_and_whole_packages_held_out(tmp_path):
    root = make_library(tmp_path / "lib")
    training, held_out = corpus.prepare(root, tmp_path / "out")
    assert [file.path for file in training] == ["alpha.py"]
    assert [file.path for file in held_out] == ["json/decoder.py"]
    report = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert (report["files"], report["kept"]) == (2, 1)
    assert report["report"][0]["path"] == "json/copied.py"
    assert report["report"][0]["share"] == 1.0


def test_lists_read_back_and_refuse_changed_or_missing_files(tmp_path):
    root = make_library(tmp_path / "lib")
    training, _ = corpus.prepare(root, tmp_path / "out")
    assert corpus.read_list(tmp_path / "out" / "train_files.txt") == training
    (root / "alpha.py").write_text("changed = True\n")
    with pytest.raises(ValueError, match="SHA-256"):
        corpus.read_text(root, training[0])
    (root / "alpha.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"alpha\.py"):
        corpus.read_text(root, training[0])


def test_overlap_counts_runs_of_thirteen_lexical_tokens():
    text = " ".join(f"w{number}" for number in range(20))
    other = " ".join(f"w{number}" for number in range(14)) + " end of shared text here now again once"
    (row,) = corpus.measure_overlap([text], [("file", other)])
    assert row.shared == 2
    assert row.sequences == len(other.split()) - 12
    assert row.kept
    (short,) = corpus.measure_overlap([text], [("short", "w1 w2")])
    assert (short.sequences, short.share, short.kept) == (0, 0.0, True)


def test_a_damaged_list_names_its_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("not a list\n")
    with pytest.raises(ValueError, match=r"list\.txt:1"):
        corpus.read_list(path)
