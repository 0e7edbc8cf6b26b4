"""Write text with a trained run: left to right, or by unmasking.

    python sample.py                                         from the newest run under out/
    python sample.py --run=out/ar --prompt="Fellow citizens" --temperature=0.8 --top_p=0.9
    python sample.py --run=out/diffusion --infill="We the people ____ a more perfect union" --show
    python sample.py --compare out/ar out/diffusion          both, side by side
    python sample.py --run=out/ar --probe                    not text, but two measurements of what it knows

An AR model writes one token after another. A diffusion model begins with masks and uncovers some in every pass through
the network: one at a time, at random places, is exact; several are faster, but tokens uncovered together do not know of
each other. The samplers return ids and `when`, both (B, L): when is the pass that wrote a token, 0 if it was given.
"""

import argparse
import codecs
import itertools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

from model import UserError, choose_device, conditional_nll, load_checkpoint, model_from_checkpoint, precision
from prepare import DataError, Tokenizer, load


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id from each row of logits (..., V); temperature 0 takes the likeliest. Returns (...).

    top_k: among the k likeliest only; top_p: among the fewest that together have this probability (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()  # float32 noise would make the rare tokens rarer still (arXiv 2409.02908)
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    p = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()  # from 0 down: no overflow, however cold
    if top_p < 1:
        descending, ids = p.sort(descending=True)
        likelier = descending.cumsum(-1) - descending  # (..., V) what the tokens before each have together
        p = torch.zeros_like(p).scatter(-1, ids, descending.masked_fill(likelier >= top_p * p.sum(-1, keepdim=True), 0))
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


@torch.no_grad()
def sample_ar(model, ids, length, temperature=1.0, top_k=0, top_p=1.0, generator=None, use_cache=True):  # [AR]
    """Continue ids (B, P) to (B, length), one token a pass. Returns ids and when, both (B, length).

    When the block is full, the last T/2 tokens move to its beginning, behind a new start symbol. The cache saves most
    of the work and changes the logits by rounding only, so in float32 the text is the same without it.
    """
    V, T, P = model.config.vocab_size, model.config.block_size, ids.shape[1]
    begin, cache = 0, None
    while ids.shape[1] < length:
        if ids.shape[1] - begin >= T:
            begin, cache = ids.shape[1] - T // 2, None
        new = ids[:, -1:] if cache else F.pad(ids[:, begin:], (1, 0), value=V)  # (B, 1) or (B, <= T)
        cache = cache or [[] for _ in model.blocks] if use_cache else None
        logits = model.head(model.hidden(new, cache=cache)[:, -1])  # (B, V)
        ids = torch.cat((ids, pick(logits, temperature, top_k, top_p, generator)[:, None]), dim=1)
    return ids, (torch.arange(1, ids.shape[1] + 1, device=ids.device) - P).clamp(min=0).expand(ids.shape)


def first(score, masked, quota):  # [DIFFUSION]
    """The quota (B, 1) masked places of lowest score in each row; score, masked and result: (B, L)."""
    return score.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True).argsort(1) < quota


@torch.no_grad()
def unmask(model, x, steps=0, order="random", temperature=1.0, top_k=0, top_p=1.0, generator=None):  # [DIFFUSION]
    """Fill in the masks (id V) of x (B, L <= T); all other tokens stay as they are. Returns ids and when, both (B, L).

    steps: the passes to take; 0, or as many as a row has masks: one token of a row in each. order: which are next,
      random       any; one by one this samples exactly, and in fewer steps it is the reverse process from t = 1 to 0:
                   when n steps are left, each mask is uncovered with probability 1/n
      confidence   in even shares, those whose drawn token is the most probable; it favours likely tokens: not exact
      left         in even shares, from the left
    """
    V, T, L = model.config.vocab_size, model.config.block_size, x.shape[1]
    most, when = int((x == V).sum(1).max()), torch.zeros_like(x)
    fewer = 0 < steps < most
    if temperature == 0:  # nothing is left to chance then, nor is the order
        generator = torch.Generator(x.device).manual_seed(0)
    for left in range(steps if fewer else most, 0, -1):
        look = masked = x == V  # (B, L)
        quota = -(-masked.sum(1, keepdim=True) // left)  # (B, 1), rounded up, so that the last step leaves none
        if order == "random":
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
            look = masked & (noise < 1 / left) if fewer else first(noise, masked, quota)
        elif order == "left":
            look = first(torch.arange(L, device=x.device).expand_as(x).double(), masked, quota)
        if not look.any():
            continue  # nothing would change, so there is nothing to compute
        logits = model.head(model.hidden(F.pad(x, (0, T - L), value=V))[:, :L][look])  # (M, V); trained on whole blocks
        chosen, drawn = look, pick(logits, temperature, top_k, top_p, generator)  # (B, L), (M,)
        if order == "confidence":
            sure = logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]  # (M,), before the temperature
            chosen = first(torch.zeros(x.shape, device=x.device).double().masked_scatter(look, -sure), masked, quota)
        x = torch.where(chosen, x.masked_scatter(look, drawn), x)
        when[chosen] = when.max() + 1
    return x, when


def sample_diffusion(model, ids, length=0, steps=0, order="random", **how):  # [DIFFUSION]
    """Fill in the masks of ids (B, P) and continue it to (B, length). Returns ids and when; options as in unmask.

    Windows of T tokens are filled from left to right. Each sees half a block before its first mask, and what follows.
    """
    V, T = model.config.vocab_size, model.config.block_size
    ids = F.pad(ids, (0, max(0, length - ids.shape[1])), value=V)
    when = torch.zeros_like(ids)
    while (ids == V).any():
        first_mask = int((ids == V).any(0).int().argmax())  # of all rows
        window = slice(begin := max(0, min(first_mask - T // 2, ids.shape[1] - T)), begin + T)
        ids[:, window], now = unmask(model, ids[:, window], steps, order, **how)
        when[:, window] += (now + when.max()) * (now > 0)
    return ids, when


def encode_gaps(tokenizer, text, gap):
    """Token ids (L,) of a text with its gaps as masks: __ or more are `gap` tokens, __7__ seven."""
    parts = re.split(r" ?_{2,}(?:(\d+)_{2,})?", text)  # text, length or None, text, ...; tokens begin with their space
    lengths = [int(length or gap) for length in parts[1::2]]
    if not 1 <= min(lengths, default=0) <= sum(lengths) <= 10**6:
        raise UserError(f"--infill needs gaps like ____ or __7__ of 1 to a million tokens; it has {lengths or 'none'}")
    texts, masks = map(tokenizer.encode, parts[::2]), (np.full(n, tokenizer.vocab_size) for n in (*lengths, 0))
    return np.concatenate(list(itertools.chain(*zip(texts, masks, strict=True))))


def memorised(ids, training, n=8):
    """The share of the n-token sequences in the rows of ids (B, L) that occur verbatim in training (U,), in 0..1."""
    known = {row.tobytes() for row in sliding_window_view(np.asarray(training, dtype=np.int64), n)}
    rows = sliding_window_view(np.asarray(ids, dtype=np.int64), n, axis=1).reshape(-1, n)
    return sum(row.tobytes() in known for row in rows) / len(rows)


def questions(data, split, T, count=512, seed=0):
    """Multiple-choice questions from held-out documents: (Q, 4, T) ids, of which choice 0 is what was really written.

    Each begins with 3/4 T tokens that end with a sentence, the same in all four choices, and goes on for T/4 tokens: as
    the document does, or as three other documents do at such a place. All four are drawn alike, so that nothing but the
    context tells them apart. The same seed gives the same questions. Raises UserError without four such documents.
    """
    ids, pieces = np.asarray(data.splits[split], dtype=np.int64), data.tokenizer.pieces
    answer = T // 4
    stop = np.array([piece.rstrip()[-1:] in (b".", b"!", b"?") for piece in pieces])  # (V,): a sentence may end here,
    space = np.array([piece[:1].isspace() for piece in pieces])  # and this may follow it
    begins = np.flatnonzero(stop[ids[:-1]] & space[ids[1:]]) + 1
    document = np.searchsorted(data.meta["splits"][split]["document_starts"], np.arange(len(ids)), side="right")
    ends = np.cumsum(ids == data.tokenizer.eot)  # passages end there: a window within one has the same count throughout

    def whole(first, last):  # windows that stay within the text and within one passage
        inside = (first >= 0) & (last < len(ids))
        first, last = first.clip(0, len(ids) - 1), last.clip(0, len(ids) - 1)
        return inside & (ends[first] == ends[last])

    places = begins[whole(begins - (T - answer), begins + answer - 1)]
    places = [places[document[places] == d] for d in np.unique(document[places])]  # of each document that has any
    if len(places) < 4:
        raise UserError(f"the held-out split {split!r} has too few documents for questions of {T} tokens: it takes 4")
    rng, asked = np.random.default_rng(seed), []
    for _ in range(count):
        four = [rng.choice(places[d]) for d in rng.choice(len(places), 4, replace=False)]
        asked.append([np.concatenate((ids[four[0] - (T - answer):four[0]], ids[c:c + answer])) for c in four])
    return np.array(asked)


def multiple_choice(model, asked):
    """How often a model finds the true continuation the likeliest of four: (accuracy, half its 95 % interval).

    asked: (Q, 4, T) from questions(). Chance is 0.25. AR scores an answer in one network pass, diffusion in T/4.
    """
    device, T = model.embed.weight.device, asked.shape[2]
    target = torch.arange(T, device=device) >= T - T // 4
    scores = torch.cat([conditional_nll(model, x.to(device), target.expand(len(x), T)).cpu()
                        for x in torch.from_numpy(asked).flatten(0, 1).split(256)]).view(-1, 4)
    right = (scores.argmin(1) == 0).double().mean().item()
    return right, 1.96 * math.sqrt(max(right * (1 - right), 1 / len(asked)) / len(asked))


def probe(model, config, ids, context):
    """Print the two measurements of --probe for a model and its samples ids (B, L)."""
    data = load(config["data"], config["data_sha256"])
    asked = questions(data, config["split"], config["block_size"])
    with context:
        right, interval = multiple_choice(model, asked)
    training = data.splits["train"][:config["unique_tokens"]]
    held_out = np.asarray(data.splits[config["split"]])[None]
    print(f"multiple choice: {right:.1%} ± {interval:.1%} of {len(asked)} right (chance 25 %)\n"
          f"recited: {memorised(ids, training):.1%} of the 8-token sequences in {len(ids)} samples stand in the "
          f"training text; of held-out text {memorised(held_out, training):.1%} do")


def layout(tokenizer, ids, when, width):
    """A text (L,) as lines of `width` cells, broken at spaces; a cell is a character and the pass that wrote it."""
    decoder, text, passes = codecs.getincrementaldecoder("utf-8")("replace"), "", []
    for i, n in zip(ids.tolist(), when.tolist(), strict=True):
        piece = decoder.decode(tokenizer.pieces[i])  # "", where a character needs more bytes
        text += "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in piece)  # nothing steers the terminal
        passes += [n] * len(piece)
    cells = list(zip(text.replace("\n", " "), passes, strict=True))
    lines = [cells[m.start():m.end()] for m in re.finditer(rf".{{0,{width - 1}}}\s|.{{1,{width}}}", text)]
    return [line + [(" ", 0)] * (width - len(line)) for line in lines]


def paint(line, blank, now):
    """Cells during pass `now` as a str: dim blanks for what is to come, inverse what is new."""
    return "".join(f"\033[2m{blank}\033[m" if n > now else f"\033[7m{c}\033[m" if n == now > 0 else c for c, n in line)


def play(results, row, animate):
    """Print text `row` of each result of generate(), side by side; if asked, pass by pass for ten seconds at most."""
    size, last = shutil.get_terminal_size(), max(int(r["when"][row].max()) for r in results)
    width = max(8, (size.columns + 2) // len(results) - 3)
    texts = [layout(r["tokenizer"], r["ids"][row], r["when"][row], width) for r in results]
    blanks = [" " if r["record"]["objective"] == "ar" else "░" for r in results]
    for now in range(0 if animate else last + 1, last + 2):  # after the last pass nothing is new any more
        lines = [" │ ".join(map(paint, lines, blanks, [now] * len(lines)))
                 for lines in itertools.zip_longest(*texts, fillvalue=[(" ", 0)] * width)]
        if now <= last:
            lines = lines[:size.lines - 1]  # the next pass is drawn over this one, but not over what has scrolled away
            print(*lines, sep="\n", end=f"\n\033[{len(lines)}A", flush=True)
            time.sleep(min(0.4, 10 / last))
    print(*lines, sep="\n")


def newest_run():
    runs = sorted(Path("out").glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under out/: train one with python train.py, or name it with --run")
    return runs[-1].parent


NUMBERS = {  # flag: (type, default, least, greatest, help)
    "gap": (int, 8, 1, 10**6, "tokens of a gap that does not say [8]"),
    "num_samples": (int, 3, 1, 10**5, "how many texts [3]"),
    "length": (int, 0, 0, 10**6, "tokens of a text, the prompt included [twice the block]"),
    "temperature": (float, 1.0, 0, 1e9, "1: as learned, lower: safer, 0: the likeliest, and nothing random"),
    "top_k": (int, 0, 0, 2**31, "choose among the k likeliest tokens only (0: all)"),
    "top_p": (float, 1.0, 1e-9, 1, "choose among the fewest tokens that have this probability together [1]"),
    "steps": (int, 0, 0, 10**6, "diffusion: network passes per block (0: one for every token, which is exact)"),
    "seed": (int, 1, 0, 2**62, "the same seed gives the same text [1]")}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    def fail(message):  # one line in place of the whole usage
        raise UserError(f"{message}; see python sample.py --help")
    parser.error = fail
    which, what, shown = (parser.add_mutually_exclusive_group() for _ in range(3))
    which.add_argument("--run", type=Path, help="run directory (default: the newest under out/)")
    which.add_argument("--compare", type=Path, nargs=2, metavar=("RUN_A", "RUN_B"), help="two runs side by side")
    what.add_argument("--prompt", default="", help="text to continue")
    what.add_argument("--infill", metavar="TEXT", help="diffusion: fill the gaps of this text, or of @FILE: ____ is "
                      "one of --gap tokens, __7__ one of 7; a space before a gap is part of it, all else is kept")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="best (by validation, default)")
    for name, (kind, default, _, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__, help=text)
    parser.add_argument("--order", choices=("random", "confidence", "left"), help="diffusion: the next masks [random]")
    shown.add_argument("--show", action="store_true", help="watch the text develop, where there is a terminal")
    shown.add_argument("--json", action="store_true", help="print samples, settings and speed as JSON, a line each run")
    shown.add_argument("--probe", action="store_true", help="measure instead: multiple choice, and recited passages")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(argv)
    for name, (_, _, low, high, _) in NUMBERS.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name}={getattr(args, name)}: it must be between {low:g} and {high:g}")
    return args


def given(args, model, tokenizer):
    """What the command line gives to a model: ids (P,), with masks for gaps, and the length to continue them to."""
    if model.config.objective == "ar" and args.infill is not None:
        raise UserError("an AR run can not fill a gap: it sees what is before, not what follows; take a diffusion run")
    if model.config.objective == "ar" and not args.compare and (args.steps or args.order):
        raise UserError("--steps and --order are for diffusion: an AR run takes a pass per token, from left to right")
    if args.infill is not None:
        text = Path(args.infill[1:]).read_text("utf-8") if args.infill.startswith("@") else args.infill
        return encode_gaps(tokenizer, text, args.gap), args.length
    ids, length = tokenizer.encode(args.prompt), args.length or 2 * model.config.block_size
    if len(ids) >= length:
        raise UserError(f"the prompt has {len(ids)} tokens and --length={length} leaves nothing to write: raise it")
    return ids, length


def generate(args, folder):
    """Let the run in a folder write what the command line asks for: samples, how they came about, how fast."""
    path = folder / f"{args.checkpoint}.pt"
    if args.checkpoint == "best" and not path.exists() and path.with_name("last.pt").exists():
        raise UserError(f"{path.parent} has not been evaluated yet: train on, or sample with --checkpoint=last")
    saved, device = load_checkpoint(path), choose_device(args.device)[0]
    model, tokenizer = model_from_checkpoint(saved).to(device), Tokenizer(saved["tokenizer"])
    # It writes in float32 on any device: bf16 rounds a cached past differently, so the text would depend on the cache.
    ids, length = given(args, model, tokenizer)
    ids = torch.as_tensor(ids, device=device).repeat(args.num_samples, 1)  # (B, P)
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
           "generator": torch.Generator(device).manual_seed(args.seed)}
    began = time.perf_counter()
    if model.config.objective == "ar":
        order, (ids, when) = "left", sample_ar(model, ids, length, **how)  # [AR]
    else:
        order = args.order or "random"
        ids, when = sample_diffusion(model, ids, length, args.steps, order, **how)  # [DIFFUSION]
    ids, when, seconds = ids.cpu(), when.cpu(), time.perf_counter() - began  # in this order: the first waits for a GPU
    record = {name: getattr(args, name) for name in ("checkpoint", "prompt", "infill", "device", *NUMBERS)} | {
        "run": str(folder), "order": order, "objective": model.config.objective, "parameters": model.num_params(),
        "step": saved["state"]["step"], "length": ids.shape[1], "seconds": seconds,
        "network_evaluations": int(when.max()), "tokens_per_second": int((when > 0).sum()) / seconds,
        "samples": [tokenizer.decode(row) for row in ids.numpy()]}
    return {"record": record, "saved": saved, "model": model, "tokenizer": tokenizer, "ids": ids, "when": when}


def run(args):
    """Do what the command line asks for. Raises UserError or DataError for what a person can mend."""
    if args.probe:
        if args.prompt or args.infill is not None:
            raise UserError("--probe measures what a run writes from nothing: leave out --prompt and --infill")
        args.num_samples, args.length = 64, 0
    results = [generate(args, folder) for folder in args.compare or [args.run or newest_run()]]
    for r in (result["record"] for result in results):
        print(json.dumps(r) if args.json else f"{r['run']}/{r['checkpoint']}.pt: {r['objective']}, "
              f"{r['parameters'] / 1e6:.2f}M parameters, step {r['step']:,}")
    for result in results if args.probe else ():
        device, dtype, _ = choose_device(args.device, result["saved"]["config"]["dtype"])
        probe(result["model"], result["saved"]["config"], result["ids"].numpy(), precision(device, dtype))
    for row in range(0 if args.probe or args.json else args.num_samples):
        print(f"----- {row + 1}")
        if args.compare or args.show and sys.stdout.isatty():
            play(results, row, args.show and sys.stdout.isatty())
        else:
            print(results[0]["record"]["samples"][row])


def main(argv=None):
    try:
        run(parse(argv))
    except (UserError, DataError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
