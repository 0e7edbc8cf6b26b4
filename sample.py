"""Write text with a trained run: one token after another, or by unmasking.

    python sample.py                    from the newest run under out/, or from a pre-trained diffusion model
    python sample.py --run=out/ar --prompt="Fellow citizens" --temperature=0.8 --top_p=0.9
    python sample.py --run=out/diffusion --infill="We the people ____ a more perfect union"
    python notebooks/watch.py out/ar out/diffusion           both side by side, as they write

An AR model writes one token in each forward pass. A diffusion model starts from masks: to unmask them one by
one, in a random order, is exact; several at once is faster, but they are drawn without knowing each other.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import UserError, choose_device, load_checkpoint, model_from_checkpoint, settle_threads
from model import write_atomic
from prepare import EOT, DataError, Tokenizer


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id from each row of logits (N, V); temperature 0 takes the likeliest. Returns (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()  # in float32 rare tokens would be drawn too seldom (arXiv 2409.02908)
    if top_k and top_k < logits.shape[-1]:  # among the k likeliest
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    p = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()  # at most 1: no overflow
    if top_p < 1:  # among the fewest with this probability together (arXiv 1904.09751)
        descending, ids = p.sort(descending=True)
        likelier = descending.cumsum(-1) - descending  # (..., V): what the tokens before each have together
        p = p.scatter(-1, ids, descending.masked_fill(likelier >= top_p * p.sum(-1, keepdim=True), 0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.no_grad()
def sample_ar(model, ids, length, use_cache=True, eot=-1, **how):  # [AR]
    """Continue ids (B, P) to (B, length), or until each row has eot; how: as pick.

    Returns ids and when (B, length): the forward pass that wrote each token, 0 for the prompt.
    """
    V, T, P = model.config.vocab_size, model.config.block_size, ids.shape[1]
    begin, unread = 0, None  # where the block begins; the tokens to read next, None: the block from there on
    while ids.shape[1] < length and (eot < 0 or not (ids[:, P:] == eot).any(1).all()):
        if ids.shape[1] - begin >= T:  # the block is full: its last T/2 tokens become the first of the next
            begin, unread = ids.shape[1] - T // 2, None
        if unread is None or not use_cache:
            unread = F.pad(ids[:, begin:], (1, 0), value=V)  # (B, <= T): the start symbol and the text so far
            cache = [[] for _ in model.blocks] if use_cache else None
        logits = model.head(model.hidden(unread, cache=cache)[:, -1]).to(ids.device)  # (B, V)
        unread = pick(logits, **how)[:, None]  # (B, 1): the cache has what is before it
        ids = torch.cat((ids, unread), dim=1)
    return ids, (torch.arange(ids.shape[1], device=ids.device) + 1 - P).clamp(min=0).expand(ids.shape)


@torch.no_grad()
def unmask(model, x, steps=0, order="random", temperature=1.0, generator=None, **how):  # [DIFFUSION]
    """Unmask x (B, L <= T) where it is V. Returns ids and when (B, L): the forward pass that wrote it, or 0.

    steps: forward passes; 0, or as many as a row has masks: one token of a row in each. order, of unmasking:
      random       one by one: exact. Else the reverse process: each mask with probability 1/(steps left)
      confidence   in even shares, first those whose drawn token is the most probable: likely text
      left         in even shares, from left to right
    """
    V, T, L = model.config.vocab_size, model.config.block_size, x.shape[1]
    when, most = torch.zeros_like(x), int((x == V).sum(1).max())
    fewer = 0 < steps < most
    if temperature == 0:  # nothing is left to chance then, nor is the order
        generator = torch.Generator(x.device).manual_seed(0)
    for left in range(steps if fewer else most, 0, -1):
        masked = x == V  # (B, L)
        chosen = masked  # where tokens are drawn: by confidence everywhere, and then some of them are kept
        quota = -(-masked.sum(1, keepdim=True) // left)  # (B, 1), rounded up: the last step leaves no mask
        if order == "random":
            shape = x.shape if temperature else (1, L)  # all rows alike at 0
            noise = torch.rand(shape, generator=generator, device=x.device, dtype=torch.float64).expand_as(x)
            chosen = masked & (noise < 1 / left) if fewer else lowest(noise, masked, quota)
        elif order == "left":
            chosen = lowest(torch.arange(L, device=x.device).expand_as(x).double(), masked, quota)
        if not chosen.any():
            continue  # nothing would change, so there is nothing to compute
        h = model.hidden(F.pad(x, (0, T - L), value=V))[:, :L]  # (B, L, C); it was trained on whole blocks
        logits = model.head(h[chosen.to(h.device)]).to(x.device)  # (M, V)
        drawn = pick(logits, temperature, generator=generator, **how)  # (M,)
        written = x.masked_scatter(chosen, drawn)  # (B, L)
        if order == "confidence":
            sure = logits.double().softmax(-1).gather(1, drawn[:, None])[:, 0]  # (M,), before the temperature
            chosen = lowest(torch.zeros_like(x).double().masked_scatter(chosen, -sure), masked, quota)
        x = torch.where(chosen, written, x)
        when[chosen] = when.max() + 1
    return x, when


def lowest(score, masked, quota):  # [DIFFUSION]
    """The quota (B, 1) masked positions of lowest score in each row; score, masked and result: (B, L)."""
    return score.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True).argsort(1) < quota


def sample_diffusion(model, ids, length=0, steps=0, order="random", eot=-1, **how):  # [DIFFUSION]
    """Unmask ids (B, P), continued to (B, length), in windows of T tokens; all else as in the two above."""
    V, T = model.config.vocab_size, model.config.block_size
    ids = F.pad(ids, (0, max(0, length - ids.shape[1])), value=V)
    when = torch.zeros_like(ids)
    while (ids == V).any() and not ((ids == eot) & (when > 0)).any(1).all():
        first_mask = int((ids == V).any(0).int().argmax())  # of all rows
        begin = max(0, min(first_mask - T // 2, ids.shape[1] - T))  # half a window goes before it
        window = slice(begin, begin + T)
        ids[:, window], now = unmask(model, ids[:, window], steps, order, **how)
        when[:, window] += (now + when.max()) * (now > 0)
    return ids, when


def encode(tokenizer, text):
    """Token ids of a text, a list, in which <|endoftext|> is the one token that ends a document."""
    ids = []
    for part in text.split(EOT):
        ids += [*tokenizer.encode(part), tokenizer.eot]
    return ids[:-1]


def encode_gaps(tokenizer, text, gap):
    """Token ids (L,) of a text with masks at its gaps: `gap` for ____, 7 for __7__ (see --help)."""
    gaps = r"_{2,}0*(\d+)_{2,}|_{4,}|(?<!\S)_{2,3}(?![^\s.,;:!?)])"
    parts = re.split(f" ?(?:{gaps})", text)  # text, length or none, text, ...
    lengths = [int(length[:9] if length else gap) for length in parts[1::2]]
    if not 1 <= min(lengths, default=0) <= sum(lengths) <= 10**6:
        raise UserError(f"--infill needs gaps like ____, 1 to 10^6 tokens long; it has {lengths}")
    ids = encode(tokenizer, parts[0])
    for length, part in zip(lengths, parts[2::2], strict=True):
        ids += [tokenizer.vocab_size] * length + encode(tokenizer, part)
    return torch.tensor(ids)


# ----- runs: their weights, and what their logs say in words and figures

PRETRAINED = Path("notebooks/checkpoints/diffusion.pt")  # beside it ar.pt; made by notebooks/watch.py --half
COLOURS = {"ar": "#0072B2", "diffusion": "#D55E00"}  # blue and vermilion of Okabe and Ito


def header(c):
    """The config of a run in a few lines."""
    millions, share = c["parameters"] / 1e6, c["flops"] / c["critical_flops"]
    there = f"the {c['train_tokens']:,} for training in " if "train_tokens" in c else ""  # unknown if old
    loss = "-log p" if c["objective"] == "ar" else "the bound"
    if c.get("batch", "get_batch") != "get_batch":  # another script's, notebooks/why.py, and its weights
        loss += f", with the batches {c['batch']}"
    elif c["objective"] == "diffusion" and c.get("mask_weight"):
        loss += f", masked tokens weigh min(1/t, {c['mask_weight']:g})"
    ours = c.get("critical_measured") or "not for this text"
    return (f"{c['objective']}, {millions:.2f}M parameters, {c['preset']} preset, seed {c['seed']}, "
            f"{c['optimizer']} lr {c['lr']:g}, weight decay {c['weight_decay']:g}, dropout {c['dropout']:g}\n"
            f"training loss: {loss}; "
            f"scored: {'averaged weights (EMA)' if c.get('ema') else 'the weights'}\n"
            f"{c['unique_tokens']:,} unique tokens of {there}{c['data']}, {c['epochs']:g} epochs, "
            f"{c['steps']:,} steps, {c['flops']:.2e} FLOPs\ncritical compute: by the paper's law "
            f"{c['critical_flops']:.1e} (extrapolated; this run takes {share:.2g} times that), "
            f"measured here: {ours}\n"
            f"evaluating {c['eval_tokens']:,} tokens of {c['split']}; their frequencies alone would score "
            f"{c['unigram_entropy']:.3f} nats per token (unigram entropy)\nrun directory {c['out']}")


def show(record, config, name="val"):
    """The loss of a record in words; the sign says whether the number is exact or a bound."""
    split, loss, bpb = config["split"], record[f"{name}_loss"], record[f"{name}_bpb"]
    if config["objective"] == "ar":
        return f"{split} = {loss:.3f} nats/token, = {bpb:.3f} bits/byte"
    return f"{split} <= {loss:.3f} ± {record[f'{name}_stderr']:.3f} nats/token, <= {bpb:.3f} bits/byte"


def read_log(run):
    """The log of the run in a folder, up to the first line that is no record; [] where there is none."""
    log = []
    with contextlib.suppress(OSError, TypeError, ValueError):
        for line in (Path(run) / "log.jsonl").read_bytes().splitlines():
            log.append(dict(json.loads(line)))
    return log if log and "config" in log[0] else []


def take_weights(model, run, tokenizer):
    """Begin with the best weights of another run. Raises UserError where tokenizer or shape do not fit."""
    if not run:
        return
    saved = load_checkpoint(find_checkpoint(run, None))
    if saved["tokenizer"] != tokenizer.spec:
        raise UserError(f"--init={run}: it has another tokenizer; prepare your text with its own, by "
                        f"python prepare.py --tokenizer={shlex.quote(saved['config']['data'])} --input FILE")
    shape = {name: saved["config"][name] for name in ("n_layer", "n_head", "n_embd", "rope_base")}
    if any(getattr(model.config, name) != value for name, value in shape.items()):  # some have no weights
        flags = " ".join(f"--{name}={value}" for name, value in shape.items())
        raise UserError(f"--init={run}: its network has another shape, {flags}")
    model.load_state_dict(saved.get("average", saved["model"]))


def curve(log, key="val_loss", x="epoch"):
    """A column of a log against another, (evaluations, 2)."""
    return np.array([(record[x], record[key]) for record in log[1:]])


def best_of(log):
    """The record of a log's lowest validation loss."""
    return min(log[1:], key=lambda record: record["val_loss"])


def crossing(ar, diffusion):
    """The x at which diffusion's curve first goes under AR's, or None; curves: (n, 2), ascending x, loss."""
    (a, ar_loss), (d, diffusion_loss) = np.array(ar).T, np.array(diffusion).T
    x = np.union1d(a, d)
    x = np.log(x[(x >= max(a[0], d[0])) & (x <= min(a[-1], d[-1]))])  # where both have an x
    gap = np.interp(x, np.log(d), diffusion_loss) - np.interp(x, np.log(a), ar_loss)  # linear in log x
    under = np.flatnonzero((gap[:-1] > 0) & (gap[1:] <= 0))
    if len(under):
        i = under[0]
        return np.exp(x[i] + (x[i + 1] - x[i]) * gap[i] / (gap[i] - gap[i + 1]))


def crossings(ar, diffusion):
    """Where diffusion overtakes AR, in FLOPs or None: (at equal compute, AR's best: its lowest loss ever).

    The second counts if diffusion's best bound is under it by more than twice its error. All evaluations have
    the same few mask draws and err alike, so its curve is moved by what more draws have changed at its best.
    """
    curves, lowest = (curve(ar, x="flops"), curve(diffusion, x="flops")), best_of(ar)["val_loss"]
    bound = curves[1] + [0, diffusion[-1]["best_loss"] - best_of(diffusion)["val_loss"]]
    of_best = crossing([(1, lowest), (bound[-1, 0], lowest)], bound)
    under = diffusion[-1]["best_loss"] + 2 * diffusion[-1]["best_stderr"] < ar[-1]["best_loss"]
    return crossing(*curves), of_best if under else None


def verdict(ar, diffusion):
    """Both crossings in two lines, and a third where the networks differ in size."""
    def at(flops):
        return f" at {flops:.2g} FLOPs, epoch {flops * end['epoch'] / end['flops']:.3g}" if flops else ""

    end, (equal, of_best) = diffusion[-1], crossings(ar, diffusion)
    low, high = max(ar[1]["flops"], diffusion[1]["flops"]), min(ar[-1]["flops"], end["flops"])
    a, d = (np.interp(low, *curve(log, x="flops").T) for log in (ar, diffusion))  # where both begin
    first = f"At equal compute diffusion does not overtake AR (up to {high:.2g} FLOPs)"
    if low > high:
        first = "Diffusion and AR have no compute in common"
    elif equal:
        first = f"At equal compute diffusion overtakes AR{at(equal)}"
        a, d = (np.interp(high, *curve(log, x="flops").T) for log in (ar, diffusion))
        first += f", but at {high:.2g} FLOPs AR is ahead again" if d > a else ""
    elif d <= a:
        first = "At equal compute diffusion begins ahead of AR, so it does not overtake it"
    best, error = ar[-1]["best_loss"], end["best_stderr"]
    gap, bound = end["best_loss"] - best, f"diffusion's best, <= {end['best_loss']:.3f} ± {error:.3f},"
    second = f"is not overtaken: {bound} is {gap:.3f} above it (a bound, so open)"
    if gap < -2 * error:
        second = f"is overtaken{at(of_best)}: {bound} is {-gap:.3f} under it"
    elif gap <= 2 * error:
        second = f"is reached, not overtaken: {bound} is within its error"
    sizes = [log[0]["config"]["parameters"] for log in (ar, diffusion)]
    third = "" if sizes[0] == sizes[1] else "\nTheir networks differ: {:,} and {:,} parameters".format(*sizes)
    return f"{first}\nAR's best, {best:.3f}, {second}{third}"


def draw_losses(ax, *logs):
    """Draw logs against epochs on matplotlib's ax: validation losses (dashed: regularised), training dotted.

    Seeds share a label. The crossings of the first pair: at equal compute (circle), of AR's best (diamond).
    """
    first, labels = {}, {}
    for log in logs:
        c, end, color = log[0]["config"], log[-1], COLOURS[log[0]["config"]["objective"]]
        regularised = c["dropout"] > 0 or c.get("replace", 0) > 0 or c["weight_decay"] > 0.5
        ax.plot(*curve(log, "train_loss").T, ":", color=color, lw=1, alpha=0.5 if regularised else 1)
        mark = "." if len(log) < 3 else None  # a line of one point would not be seen
        ax.plot(*curve(log).T, "--" if regularised else "-", color=color, lw=1.8, marker=mark)
        label = "AR{} (exact)" if c["objective"] == "ar" else "diffusion{} (bound)"
        labels.setdefault(label.format(", regularised" * regularised), (end["val_loss"], end["epoch"], color))
        first.setdefault(c["objective"], log)
    high = max(log[-1]["epoch"] for log in logs)
    ax.set(xscale="log", xlabel="epochs", ylabel="nats per token (dotted: training)")
    ax.set_xlim(right=high * max(2, high) ** 0.42)  # room for the labels
    free, apart = -np.inf, 0.06 * np.ptp(ax.get_ylim())
    for label, (y, x, color) in sorted(labels.items(), key=lambda item: item[1]):  # upwards, without overlaps
        free = max(y, free + apart)
        ax.annotate(label, (x, free), (6, 0), textcoords="offset points", color=color, va="center",
                    bbox={"color": "white", "alpha": 0.8, "pad": 1})
    rates = {round(log[-1]["flops"] / log[-1]["epoch"]) for log in logs}  # FLOPs an epoch
    if len(rates) == 1:  # else an epoch does not cost all of them the same
        rate = rates.pop()
        ax.secondary_xaxis("top", functions=(lambda e: e * rate, lambda f: f / rate)).set_xlabel("FLOPs")
    best = best_of(first["ar"]) if len(first) == 2 else min(map(best_of, logs), key=lambda r: r["val_loss"])
    ax.axhline(best["val_loss"], color=COLOURS[min(first)], lw=0.8, zorder=0)
    if len(first) == 1:
        ax.set_title(f"Lowest validation loss {best['val_loss']:.3f}, epoch {best['epoch']:.3g}", loc="left")
        return
    ar, diffusion = first["ar"], first["diffusion"]
    for flops, mark in zip(crossings(ar, diffusion), ("o", "D"), strict=True):
        if flops:
            x = flops * diffusion[-1]["epoch"] / diffusion[-1]["flops"]
            y = np.interp(np.log(x), np.log(curve(diffusion)[:, 0]), curve(diffusion)[:, 1])
            ax.plot(x, y, mark, color="black", mfc="white", ms=9)
    words = re.sub("(<=|±) | (?=±)", "\\1\xa0", verdict(ar, diffusion))  # no line begins with ±
    title = [part for line in words.split("\n") for part in textwrap.wrap(line, 90)]
    ax.set_title("\n".join(title), loc="left", fontsize=10)


def plot_losses(path, *logs):
    """Write draw_losses of logs to a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, whose choice of a window or a notebook is the caller's
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    draw_losses(figure.subplots(), *logs)
    write_atomic(Path(path), lambda f: figure.savefig(f, format="png", dpi=130))


def obstacle(a, b):
    """Why two logs can not be compared, or None if they can: they must have had the same task."""
    if not all(log and "best_loss" in log[-1] for log in (a, b)):
        return "one of them holds no run that has ended"
    a, b = a[0]["config"], b[0]["config"]
    if a.get("init") or b.get("init"):
        return "one began with the weights of another run, whose compute it does not count"
    if a["objective"] == b["objective"]:
        return f"both are {a['objective']} runs, it takes one of each objective"
    for key in ("data_sha256", "unique_tokens", "block_size", "split", "eval_tokens"):
        if a.get(key) != b.get(key):
            return f"{key} is {a.get(key)} for one and {b.get(key)} for the other"


def compare(a, b):
    """Draw the runs in the folders a and b into b/crossing.png; return both crossings in words."""
    logs = read_log(a), read_log(b)
    if reason := obstacle(*logs):
        raise UserError(f"{a} and {b} can not be compared: {reason}")
    ar, diffusion = sorted(logs, key=lambda log: log[0]["config"]["objective"])
    plot_losses(Path(b) / "crossing.png", ar, diffusion)
    return f"{verdict(ar, diffusion)}\nboth curves in {b}/crossing.png"


def conclude(log):
    """Draw the curve of a run that has ended, with that of the newest comparable run; return what to say."""
    c, out, name = log[0]["config"], Path(log[0]["config"]["out"]), shlex.quote(log[0]["config"]["out"])
    if "best_loss" not in log[-1]:
        script = "train.py"
        if c["batch"] != "get_batch":  # another script's, such as python notebooks/why.py orders 4
            words = shlex.split(c["command"])[1:]
            script = shlex.join(itertools.takewhile(lambda word: not word.startswith("--"), words))
        return f"\nsaved; go on with: python {script} --resume={name}"
    plot_losses(out / "loss.png", log)
    lines = [f"best   epoch {best_of(log)['epoch']:.4g}: {show(log[-1], c, 'best')}",
             f"final  epoch {log[-1]['epoch']:.4g}: {show(log[-1], c, 'final')}",
             f"curve in {out}/loss.png; text from it: python sample.py --run={name}"]
    newest = sorted(out.parent.glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    other = next((path.parent for path in newest if not obstacle(read_log(path.parent), log)), None)
    beside = [f"beside {other}:", compare(other, out)] if other else []
    return "\n".join(lines + beside)


# ----- machinery: the command line

NUMBERS = {  # flag: (type, default, least, greatest, help)
    "gap": (int, 8, 1, 10**6, "tokens of a gap and the space before it [8]"),
    "num_samples": (int, 3, 1, 10**5, "how many texts [3]"),
    "length": (int, 0, 0, 10**6, "tokens of a text, the prompt included [twice the block]"),
    "temperature": (float, 1.0, 0, 1e9, "1: as learned, lower: safer, 0: the likeliest, whatever the seed"),
    "top_k": (int, 0, 0, 2**31, "choose among the k likeliest tokens only (0: all)"),
    "top_p": (float, 1.0, 1e-9, 1, "choose among the fewest tokens that have this probability together [1]"),
    "steps": (int, 0, 0, 10**6, "diffusion: forward passes for T tokens and each T/2 more (0: one a token)"),
    "seed": (int, 1, 0, 2**62, "the same seed gives the same text [1]")}


def parse(argv):
    """The flags of the command line. Where one is wrong, the script says so and ends."""
    parser = argparse.ArgumentParser(usage="python sample.py [FLAGS]", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    parser.add_argument("--run", help="run directory or checkpoint [the newest under out/, or pre-trained]")
    what.add_argument("--prompt", default="", metavar="TEXT", help="text to continue, or @FILE")
    what.add_argument("--infill", metavar="TEXT", help="diffusion: fill the gaps of this text or @FILE; a "
                      "gap is 4 underscores or more, 2 or 3 only as a word of their own, or __7__ (7 tokens)")
    parser.add_argument("--stop_at_eot", action="store_true", help=f"end a text with the first {EOT} written")
    for name, (kind, default, _, _, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__, help=text)
    parser.add_argument("--order", choices=("random", "confidence", "left"), help="of unmasking [random]")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="[best]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, ...")
    parser.add_argument("--json", action="store_true", help="print samples, settings and speed, one line")
    args = parser.parse_args(argv)
    for name, (_, _, low, high, _) in NUMBERS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name}={getattr(args, name)}: it must be between {low:g} and {high:g}")
    return args


def new_run_dir(objective):
    """Make out/ar, or out/ar-2, ...: the first that is not taken, also by a run that starts just now."""
    for number in range(1, 10**6):
        path = Path("out", f"{objective}-{number}".removesuffix("-1"))
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def find_checkpoint(run, name):
    """The path of the checkpoint best or last of a run: of a folder, of that file, or of the newest run."""
    runs = [last.parent for last in sorted(Path("out").glob("*/last.pt"), key=os.path.getmtime)]
    path = Path(os.path.expanduser(run or [PRETRAINED, *runs][-1]))
    if path.suffix != ".pt" or path.is_dir():
        path /= f"{name or 'best'}.pt"
    if name not in (None, path.stem):
        raise UserError(f"{path} is one checkpoint, --checkpoint={name} asks for another: leave that out")
    if path.exists():
        if path == PRETRAINED and not run:
            print(f"no run under out/ yet, so a pre-trained one writes: {path}", file=sys.stderr)
        return path
    if path.name == "best.pt" and path.with_name("last.pt").exists():
        raise UserError(f"{path.parent} has not been evaluated yet: train on, or take {path.parent}/last.pt")
    there = {str(file.parent) for place in (path.parent.parent, Path("out")) for file in place.glob("*/*.pt")}
    found = ", ".join(sorted(there)[:9]) or "no run under out/, train one with python train.py"
    raise UserError(f"{path}: no such checkpoint; found {found}")


@contextlib.contextmanager
def fitting_threads(model, B):
    """The context of work on B texts at a time: as many CPU threads as are fastest, and then as before."""
    threads, block = torch.get_num_threads(), torch.zeros(B, model.config.block_size, dtype=torch.long)
    if model.embed.weight.device.type == "cpu":
        with torch.no_grad():
            settle_threads(lambda: model.head(model.hidden(block)[:, -1]), threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generate(args, run, alone=True):
    """Let a run write. Returns what --json prints, the tokenizer, and ids and when of each text.

    alone: refuse diffusion's flags for AR; watch.py, which shows both, gives them to one of the two.
    """
    path, device = find_checkpoint(run, args.checkpoint), choose_device(args.device)[0]
    saved = load_checkpoint(path)
    # In float32 on any device: bf16 rounds a cached past differently, so the text would depend on the cache.
    model, tokenizer = model_from_checkpoint(saved).to(device), Tokenizer(saved["tokenizer"])
    ar = model.config.objective == "ar"
    if ar and (args.infill is not None or alone and (args.steps or args.order)):
        raise UserError("--infill, --steps and --order are for diffusion: AR writes from left to right")
    text = args.infill or args.prompt
    text = Path(os.path.expanduser(text[1:])).read_text("utf-8-sig") if text.startswith("@") else text
    if args.infill is not None:
        ids, length = encode_gaps(tokenizer, text, args.gap), args.length
    else:
        ids, length = encode(tokenizer, text), args.length or 2 * model.config.block_size
        if len(ids) >= length:
            raise UserError(f"--length={length} leaves nothing to write after a prompt of {len(ids)} tokens")
    ids = torch.as_tensor(ids, dtype=torch.long).repeat(args.num_samples, 1)  # (B, P), on the CPU
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
           "generator": torch.Generator().manual_seed(args.seed)}
    order, eot = "left" if ar else args.order or "random", tokenizer.eot if args.stop_at_eot else -1
    with fitting_threads(model, args.num_samples):
        began = time.perf_counter()
        if ar:
            ids, when = sample_ar(model, ids, length, eot=eot, **how)  # [AR]
        else:
            ids, when = sample_diffusion(model, ids, length, args.steps, order, eot=eot, **how)  # [DIFFUSION]
        seconds = time.perf_counter() - began
    record = vars(args) | {"run": str(path.parent), "checkpoint": path.stem, "order": order,
        "objective": model.config.objective, "length": max(length, ids.shape[1]),
        "parameters": model.num_params(), "step": saved["state"]["step"], "seconds": seconds,
        "network_evaluations": int(when.max()), "tokens_per_second": int((when > 0).sum()) / seconds}
    stop = (ids == eot) & (when > 0)  # (B, L), where a text may end
    kept = stop.cumsum(1) - stop.long() == 0  # (B, L): no stop comes before
    ids, when = ([row[keep] for row, keep in zip(x, kept, strict=True)] for x in (ids, when))
    record["samples"] = [tokenizer.decode(row.tolist()) for row in ids]
    return record, tokenizer, ids, when


def told(work, *arguments):
    """Do a command's work and return its exit code; what a person can mend is told in a line."""
    try:
        work(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough: nothing is left to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, DataError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def write(argv):
    """What the command line asks for."""
    args = parse(argv)
    record, *_ = generate(args, args.run)
    if args.json:
        print(json.dumps(record))
        return
    texts = [f"----- {number}\n{text}" for number, text in enumerate(record["samples"], 1)]
    text = "\n".join((f"{record['run']}/{record['checkpoint']}.pt: {record['objective']}, "
                      f"{record['parameters'] / 1e6:.2f}M parameters, step {record['step']:,}", *texts))
    if sys.stdout.isatty():  # which no text may steer: ESC is printed as the four characters \x1b
        text = re.sub(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]",
                      lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n").expandtabs())
    print(text)


def main(argv=None):
    return told(write, argv)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="backslashreplace")  # where it can not encode a character
    sys.exit(main())
