"""Beyond the loss: choices made from held-out text, gaps filled, and what a run completes verbatim.

    python notebooks/tasks.py out/pair-ar-s1 out/pair-diffusion-s1 --items=1000   best.pt and last.pt of both
    python notebooks/tasks.py out/pair-ar-s1 out/pair-ar-s2 --ensemble            choices of the two as one

Each item is a block of T tokens. One or two words in its middle are as written in choice 0, and replaced in
the others. The likeliest text is what the model chooses. The tasks:

  invented   a word, or the same with two neighbouring letters swapped, which is no word of the corpus
  letter     a word, or the same with one letter replaced by one that is drawn from the text
  agreement  one word of a pair in PAIRS, or the other
  order      two neighbouring words, or the same swapped
  cloze      a word, or three others of as many tokens and like frequency in the training text
  completed  no choice: the share of 8-token spans of training text (..., held out: of held-out text) written
             verbatim at temperature 0. AR reads what is before them, diffusion both sides; in "completed from
             the left" diffusion reads no more than AR
  gap, m     no choice: the share of held-out words that are found; how many tokens they have is known. Both
             objectives search with a beam of m candidates; "any" is the most that any search finds: see fill
  nats       no choice: -log p of these words in nats, given both sides (diffusion) or what is before (AR), and
             half the 95 % interval

All choices of an item have as many tokens and differ in one span. In any model the difference of their log p
is that of log p(span | the rest): AR is scored by the first, diffusion by the second. In agreement and cloze
each word is the true one equally often, so that knowing how frequent words are is worth nothing.

It prints a line of JSON for each run, checkpoint and task. Lines of three scorers that are no networks come
before the first run on a text: 4-gram and unigram, counted on its training tokens, and length (fewest bytes).

  items, chance       how many there are, and the accuracy of who guesses
  accuracy, interval  the share that is right, n equally likely choices counting 1/n; half its 95 % interval
  found               a digit an item: 0 if wrong, n if the truth is among n equally likely choices, mostly 1
  items_sha256        of the items: where it is the same, `found` can be compared item by item
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import shlex
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from laws import ngrams  # noqa: E402
from model import UserError  # noqa: E402
from probe import bar, conditional_nll, open_checkpoint, together  # noqa: E402
from sample import sample_ar, told, unmask  # noqa: E402

# Used where both have as many tokens: of the first five, which have not as many letters, only with BPE.
PAIRS = (("a", "an"), ("is", "are"), ("was", "were"), ("has", "have"), ("this", "these"),
         ("was", "are"), ("is", "be"), ("were", "been"), ("they", "them"), ("we", "us"), ("his", "him"))
CHANCE = {"invented": 1 / 2, "letter": 1 / 2, "agreement": 1 / 2, "order": 1 / 2, "cloze": 1 / 4}
PARTS = ("choices", "completed", "left", "gap", "nats")  # of what is measured
Unit = namedtuple("Unit", "begin end text")  # ids[begin:end] are the text: a space and a word, or two of them


def read_text(tokenizer, ids):
    """ids (n,) as a str with a character for each byte, and where in it tokens begin and end, (n + 1,)."""
    pieces = [tokenizer.pieces[i] for i in ids]
    return b"".join(pieces).decode("latin-1"), np.cumsum([0, *map(len, pieces)])


def find_units(tokenizer, ids, T, words):
    """Where ids (n,) have `words` lower-case words in a row, in the middle of T tokens of a passage: Units.

    No tokenizer here has a token that reaches from one word into the next. So if another word takes the place
    of one, all tokens around it stay as they are.
    """
    text, starts = read_text(tokenizer, ids)
    found = list(re.finditer(rf"(?=((?: [a-z]+){{{words}}})[ ,.;:!?\n])", text))
    passage = np.cumsum(ids == tokenizer.eot)
    begin = np.searchsorted(starts, [match.start(1) for match in found])
    end = np.searchsorted(starts, [match.end(1) for match in found])
    units = []
    for match, a, b in zip(found, begin.tolist(), end.tolist(), strict=True):
        first, whole = (a + b - T) // 2, starts[a] == match.start(1) and starts[b] == match.end(1)
        inside = 0 <= first and first + T <= len(ids) and b - a <= T // 2
        if whole and inside and passage[first] == passage[first + T - 1]:
            units.append(Unit(a, b, match[1]))
    return units


def swapped_letters(unit, known, encode, rng):
    """The word, if of 4 letters or more, with two neighbours swapped so that it is not known: a list."""
    text, length = unit.text, unit.end - unit.begin
    options = [text[:i] + text[i + 1] + text[i] + text[i + 2:] for i in range(1, len(text) - 1)]
    options = [other for other in options if other[1:] not in known and len(encode(other)) == length]
    return [str(rng.choice(options))] if len(text) > 4 and options else []


def other_letter(unit, units, rng):
    """The word with one letter replaced: a list. Both letters are drawn alike, neither is more frequent."""
    i, other = rng.integers(1, len(unit.text)), units[rng.integers(len(units))].text
    return [unit.text[:i] + other[rng.integers(1, len(other))] + unit.text[i + 1:]]


def cloze_groups(counts, found):
    """Fours of the 1,000 most frequent words, of as many tokens, none 1.5 times as frequent as another."""
    alike, groups = defaultdict(list), []
    for word, _ in counts.most_common(1000):
        if word in found:
            alike[found[word][0].end - found[word][0].begin].append(word)
    for words in alike.values():
        fours = (words[i:i + 4] for i in range(0, len(words) - 3, 4))
        groups += [four for four in fours if counts[four[0]] <= 1.5 * counts[four[3]]]
    return groups


def balanced(groups, found):
    """Yield (unit, the other words of its group), each unit once, in rounds of every word of each group."""
    left, before = {word: list(units) for word, units in found.items()}, None
    while before != (before := sum(map(len, left.values()))):  # until a round finds nothing
        for group in groups:
            if all(left.get(word) for word in group):
                for word in group:
                    yield left[word].pop(), [f" {other}" for other in group if other != word]


def make(data, split, T, items=1000, seed=0):
    """The items of each task: {task: (Q, K, T) ids}, Q <= items, choice 0 is what is written there.

    The same arguments give the same items. Raises UserError where the text has none for a task.
    """
    ids, (rng, *rngs) = np.asarray(data.splits[split], dtype=np.int64), np.random.default_rng(seed).spawn(3)
    counts = {name: Counter(re.findall("[a-z]+", read_text(data.tokenizer, part)[0].lower()))
              for name, part in data.splits.items()}
    known, encode = set().union(*counts.values()), functools.cache(data.tokenizer.encode)
    units, pairs = (find_units(data.tokenizer, ids, T, words) for words in (1, 2))
    units, pairs = ([some[i] for i in rng.permutation(len(some))] for some in (units, pairs))
    found = defaultdict(list)  # {word: its units}
    for unit in units:
        found[unit.text[1:]].append(unit)
    length = {word: some[0].end - some[0].begin for word, some in found.items()}
    groups = cloze_groups(counts["train"], found)
    asked = {"invented": ((unit, swapped_letters(unit, known, encode, rngs[0])) for unit in units),
             "letter": ((unit, other_letter(unit, units, rngs[1])) for unit in units),
             "agreement": balanced([(a, b) for a, b in PAIRS if length.get(a) == length.get(b)], found),
             "order": ((pair, [" " + " ".join(reversed(pair.text.split()))]) for pair in pairs),
             "cloze": balanced([groups[i] for i in rng.permutation(len(groups))], found)}
    made = {}
    for task, questions in asked.items():
        blocks, K = [], round(1 / CHANCE[task])
        for unit, others in questions:
            texts = [encode(text) for text in dict.fromkeys([unit.text, *others])]  # each once
            if len(texts) == K and all(len(text) == unit.end - unit.begin for text in texts):
                first = (unit.begin + unit.end - T) // 2
                block = np.tile(ids[first:first + T], (K, 1))  # (K, T)
                block[:, unit.begin - first:unit.end - first] = texts
                blocks.append(block)
            if len(blocks) == items:
                break
        if not blocks:
            raise UserError(f"the split {split!r} has no text for the task {task!r} in blocks of {T} tokens")
        made[task] = np.array(blocks)
    return made


def score(model, blocks, batch=64):
    """-log p in nats of the choices of items (Q, K, T), less a term that those of an item share: (Q, K).

    AR: the exact -log p of the block, without the tokens before the first that differs, which all share.
    Diffusion: that of the span that differs given all other tokens, by the chain rule from left to right.
    """
    x, (Q, K), device = torch.from_numpy(blocks), blocks.shape[:2], model.embed.weight.device
    differs = (x != x[:, :1]).any(1)  # (Q, T)
    target = differs.cumsum(1) > 0  # from the first that differs
    if model.config.objective == "diffusion":
        target &= differs.flip(1).cumsum(1).flip(1) > 0  # to the last
    nll = torch.zeros(Q, K, dtype=torch.float64)
    alike = target.sum(1).argsort(stable=True)  # spans of one length together: a forward pass for each token
    for part in bar(alike.split(max(1, batch // K)), "choices"):
        rows = x[part].flatten(0, 1).to(device), target[part].repeat_interleave(K, 0).to(device)  # (rows, T)
        nll[part] = conditional_nll(model, *rows).view(-1, K)
    return nll.numpy()


def score_ngrams(tokens, blocks, V, n=4):
    """As score, by the n-grams (n <= 4) of the training tokens (U,): laws.ngrams. (Q, K)"""
    T = blocks.shape[2]
    near = blocks[:, :, max(0, T // 4 - 3):3 * T // 4 + 3]  # the spans, and what sees them or is seen
    nll = ngrams(tokens.tolist(), near.reshape(-1, near.shape[2]).tolist(), V, n)
    return (nll * near.shape[2]).reshape(blocks.shape[:2])


def points(nll):
    """1/n where choice 0 is among the n likeliest by their -log p (Q, K), else 0: (Q,)."""
    best = np.isclose(nll, nll.min(1, keepdims=True), rtol=0, atol=1e-6)
    return best[:, 0] / best.sum(1)


def mask_span(x, begin, end, V):
    """x (B, T) with the mask, V, at positions begin to end - 1."""
    return torch.cat((x[:, :begin], torch.full_like(x[:, begin:end], V), x[:, end:]), dim=1)


@torch.no_grad()
def completed(model, ids, left=False, N=512, n=8, seed=0):
    """Which of N spans of n tokens of ids (U,) a model writes verbatim at temperature 0: (N,) of 1 and 0.

    The span is in the middle of a block. AR reads what is before it; diffusion, unless left, what follows, too.
    """
    V, T = model.config.vocab_size, model.config.block_size
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    starts = torch.from_numpy(np.random.default_rng(seed).integers(0, len(ids) - T + 1, N))
    begin, found = (T - n) // 2, []
    for some in bar(starts.split(64), "completed"):
        x = ids[some[:, None] + torch.arange(T)]  # (B, T)
        if model.config.objective == "ar":
            written = sample_ar(model, x[:, :begin], begin + n, temperature=0)[0]  # [AR]
        else:
            masked = mask_span(x, begin, begin + n, V)
            end = begin + n if left else T
            written = unmask(model, masked[:, :end], order="left", temperature=0)[0]  # [DIFFUSION]
        found.append((written[:, begin:begin + n] == x[:, begin:begin + n]).all(1))
    return torch.cat(found).double().numpy()


def gaps(data, split, T, items=1000, seed=0):
    """Blocks with a held-out word in their middle, {its number of tokens n: (Q, T) ids}, together Q <= items.

    The word begins, with the space before it, at position (T - n + 1) // 2.
    """
    ids, found = np.asarray(data.splits[split], dtype=np.int64), defaultdict(list)
    units = find_units(data.tokenizer, ids, T, 1)
    for i in np.random.default_rng(seed).permutation(len(units))[:items]:
        first = (units[i].begin + units[i].end - T) // 2
        found[units[i].end - units[i].begin].append(ids[first:first + T])
    return {n: np.array(found[n]) for n in sorted(found)}


@torch.no_grad()
def fill(model, x, n, widths=(1, 4, 16)):
    """Whether a model finds what stands in the gap of n tokens in blocks x (B, T): {width: (B,) bool}.

    A beam search writes the gap from left to right and keeps the likeliest candidates, as many as the width. What
    it finds is the likeliest of them at the end. Diffusion reads both sides all along. AR can only write from what
    is before a token; at the end it ranks its candidates by log p of the whole block, which has the right side, too.
    The last entry, "any": what stands there is found, or is likelier than what was. A wider beam, or any other
    search, finds no more than these.
    """
    V, (B, T), ar = model.config.vocab_size, x.shape, model.config.objective == "ar"
    begin, found = (T - n + 1) // 2, {}
    masked, truth = mask_span(x, begin, begin + n, V), x.new_zeros(B, dtype=torch.float32)
    for width in widths:
        texts, log_p = masked[:, None], x.new_zeros(B, 1, dtype=torch.float32)
        for i in range(begin, begin + n):
            total = log_p[..., None] + next_log_p(model, texts.flatten(0, 1), i).view(B, -1, V)  # (B, K, V)
            log_p, best = total.flatten(1).topk(min(width, total[0].numel()))  # (B, K), now with this token
            texts = texts.gather(1, (best // V)[..., None].expand(-1, -1, T))  # (B, K, T)
            texts[..., i] = best % V
        if ar:  # [AR]
            log_p = -T * torch.cat([model(part) for part in texts.flatten(0, 1).split(256)]).view(B, -1)
        best = log_p.max(1)  # of NaN, NaN: that finds nothing
        found[width] = (texts[torch.arange(B), best.indices] == x).all(1) & best.values.isfinite()
    for i in range(begin, begin + n) if not ar else ():  # [DIFFUSION]
        truth += next_log_p(model, masked, i).gather(1, x[:, i:i + 1])[:, 0]
        masked[:, i] = x[:, i]
    found["any"] = found[width] | ((-T * model(x) if ar else truth) > best.values)
    return found


def next_log_p(model, x, i):
    """log p (B, V) of the token at position i of x (B, T): given those before it (AR), or all unmasked ones."""
    if model.config.objective == "ar":
        x = F.pad(x[:, :i], (1, 0), value=model.config.vocab_size)  # [AR] the start symbol: i is now the last
    at = torch.arange(len(x), device=x.device) * x.shape[1] + i  # (B,)
    parts = zip(x.split(256), at.split(256), strict=True)
    return torch.cat([model.head(model.hidden(part, at=its - its[0] + i)).log_softmax(-1) for part, its in parts])


def word_nats(model, x, n):
    """-log p of the word in the gap of n tokens of blocks x (B, T) in nats, (B,): see the task nats above."""
    target, begin = torch.zeros_like(x, dtype=torch.bool), (x.shape[1] - n + 1) // 2
    target[:, begin:begin + n] = True
    last = begin + n if model.config.objective == "ar" else x.shape[1]  # AR: as if the block ended there
    return conditional_nll(model, x[:, :last], target[:, :last])


def fill_ngrams(data, tokens, gapped, most=200):
    """As fill, by 4-grams: the likeliest of the 200 most frequent words of n tokens in training tokens (U,). (Q,)"""
    units = find_units(data.tokenizer, tokens, stack(gapped).shape[1], 1)
    counts, found = Counter(tuple(tokens[unit.begin:unit.end]) for unit in units).most_common(), []
    for n, x in gapped.items():
        begin = (x.shape[1] - n + 1) // 2
        words = [word for word, _ in counts if len(word) == n][:most]
        if not words:
            found.append(np.zeros(len(x), dtype=bool))
            continue
        near = np.tile(x[:, None, begin - 3:begin + n + 3], (1, len(words), 1))  # (B, words, n + 6): all that sees it
        near[:, :, 3:3 + n] = words
        nll = ngrams(tokens.tolist(), near.reshape(-1, n + 6).tolist(), data.tokenizer.vocab_size)
        best = nll.reshape(near.shape[:2]).argmin(1)
        found.append((np.array(words)[best] == x[:, begin:begin + n]).all(1))
    return np.concatenate(found)


def mean_interval(values):
    """The mean of (Q,) points and half its 95 % interval, which is never 0: one more may be different."""
    return values.mean(), 1.96 * math.sqrt(max(values.var(), 1 / len(values)**2) / len(values))


def compare(a, b):
    """The mean of a - b over items, both (seeds, Q) points on the same items, and half its 95 % interval.

    Seeds are averaged first: the interval is over other items, not over other seeds.
    """
    return mean_interval(np.mean(a, 0) - np.mean(b, 0))


def read(path):
    """The lines that this program wrote: {(data, run without its seed, checkpoint, task): (seeds, Q) points}.

    Raises ValueError where lines of one data and task did not meet the same items.
    """
    found, items = defaultdict(dict), {}
    rows = [row for row in map(json.loads, Path(path).read_text().splitlines()) if row["task"] != "nats"]
    for row in rows:
        if items.setdefault((row["data"], row["task"]), row["items_sha256"]) != row["items_sha256"]:
            raise ValueError(f"{path}: {row['run']} met other items of {row['task']!r} than the lines before")
        name, each = Path(row["run"]).name, np.array([int(digit) for digit in row["found"]])
        key = row["data"], re.sub(r"-s\d+$", "", name), row["checkpoint"], row["task"]
        found[key][name] = (each > 0) / np.maximum(each, 1)
    return {key: np.array([*seeds.values()]) for key, seeds in found.items()}


def record(task, points, items, **more):
    """What a line tells of a task, see above. items: an array that tells which they are."""
    accuracy, interval = mean_interval(points)
    found = "".join(str(round(1 / p)) if p else "0" for p in points)
    return {"task": task, "items": len(points), "chance": CHANCE.get(task, 0), "accuracy": round(accuracy, 4),
            "interval": round(interval, 4), **more, "found": found,
            "items_sha256": hashlib.sha256(np.ascontiguousarray(items)).hexdigest()[:16]}


def stack(gapped):
    """All blocks of gaps, (Q, T)."""
    return np.concatenate([*gapped.values()])


def without_network(opened, made, gapped, only):
    """Yield the records of scorers that are no networks, with the texts of the first item of each task."""
    tokenizer, V = opened.data.tokenizer, opened.data.tokenizer.vocab_size
    size = np.array([len(piece) for piece in tokenizer.pieces])  # (V,) bytes
    for task, blocks in made.items() if "choices" in only else ():
        T = blocks.shape[2]
        example = [tokenizer.decode(choice[T // 2 - T // 6:T // 2 + T // 6]) for choice in blocks[0]]
        scores = {"4-gram": score_ngrams(opened.tokens, blocks, V), "length": size[blocks].sum(2),
                  "unigram": score_ngrams(opened.tokens, blocks, V, 1)}
        for name, nll in scores.items():
            yield {"run": name, "checkpoint": None} | record(task, points(nll), blocks, example=example)
    if "gap" not in only:
        return
    right = fill_ngrams(opened.data, np.asarray(opened.tokens), gapped)
    yield {"run": "4-gram", "checkpoint": None} | record("gap, 1", right * 1.0, stack(gapped))


def with_network(opened, made, gapped, only):
    """Yield the record of each task for an open checkpoint."""
    about = {"run": opened.run, "checkpoint": opened.checkpoint, "step": opened.step}
    held_out = opened.data.splits[opened.config["split"]]
    with opened.context():
        for task, blocks in made.items() if "choices" in only else ():
            yield about | record(task, points(score(opened.model, blocks)), blocks)
        for part, name in (("completed", "completed"), ("left", "completed from the left")):
            if part in only and (part == "completed" or opened.model.config.objective == "diffusion"):
                for task, ids in ((name, opened.tokens), (f"{name}, held out", held_out)):
                    yield about | record(task, completed(opened.model, ids, part == "left"), np.asarray(ids))
        device, right = opened.model.embed.weight.device, defaultdict(list)
        if "nats" in only:
            nats = torch.cat([word_nats(opened.model, torch.from_numpy(x).to(device), n) for n, x in gapped.items()])
            mean, half = mean_interval(nats.numpy())
            yield about | {"task": "nats", "items": len(nats), "mean": round(mean, 4), "interval": round(half, 4)}
        for n, x in bar([*gapped.items()] if "gap" in only else [], "gaps"):
            for part in torch.from_numpy(x).to(device).split(64):
                for width, filled in fill(opened.model, part, n).items():
                    right[width].append(filled.cpu())
        for width, filled in right.items():
            yield about | record(f"gap, {width}", torch.cat(filled).double().numpy(), stack(gapped))


def print_tasks(argv=None):
    """What the command line asks for."""
    parser = argparse.ArgumentParser(usage="python notebooks/tasks.py RUN [RUN ...] [FLAGS]",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory")
    parser.add_argument("--items", metavar="Q", type=int, default=1000, help="of each task, at most [1000]")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="one of them only [both]")
    parser.add_argument("--only", choices=PARTS, help="a part of it; left is of diffusion only [all]")
    parser.add_argument("--ensemble", action="store_true", help="the choices of all runs as one network [best]")
    args = parser.parse_args(argv)
    only = [args.only] if args.only else PARTS
    if args.items < 2:
        parser.error(f"--items={args.items}: an interval takes at least 2")
    if args.ensemble and args.only:
        parser.error("--ensemble makes the choices alone: leave out --only")
    command = shlex.join(["python", "notebooks/tasks.py", *(sys.argv[1:] if argv is None else argv)])
    made, counted = {}, set()
    for opened in [ensemble(args)] if args.ensemble else checkpoints(args):
        T, U = opened.config["block_size"], len(opened.tokens)
        text = opened.config["data_sha256"], T
        if text not in made:
            made[text] = [function(opened.data, "val", T, args.items) if {*needed} & {*only} else {}
                          for function, needed in ((make, ["choices"]), (gaps, ["gap", "nats"]))]
        first = [] if (text, U) in counted or args.ensemble else without_network(opened, *made[text], only)
        counted.add((text, U))
        about = {"data": Path(opened.config["data"]).name, "unique_tokens": U, "command": command}
        parts = ["choices"] if args.ensemble else only
        for row in itertools.chain(first, with_network(opened, *made[text], parts)):
            print(json.dumps(row | about), flush=True)


def checkpoints(args):
    """Yield the open checkpoints of each run: the last one only where it is not the best."""
    for run in args.runs:
        step = None
        for name in [args.checkpoint] if args.checkpoint else ["best", "last"]:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for JSON
                opened = open_checkpoint(run, name, split="val")
            if opened.step != step:
                yield opened
            step = opened.step


def ensemble(args):
    """All runs as one open checkpoint, called by how many they are and what they are."""
    name = args.checkpoint or "best"
    with contextlib.redirect_stdout(sys.stderr):
        opened = together([open_checkpoint(run, name, split="val") for run in args.runs])
    kinds = dict.fromkeys(re.sub(r"-s\d+$", "", run.name) for run in args.runs)
    opened.run = f"{len(args.runs)} x {' and '.join(kinds)}"
    return opened


def main(argv=None):
    return told(print_tasks, argv)


if __name__ == "__main__":
    sys.exit(main())
