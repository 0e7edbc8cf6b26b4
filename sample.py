"""Write text with a trained run: left to right, or by unmasking.

    python sample.py                                         from the newest run under out/
    python sample.py --run=out/ar --prompt="Fellow citizens" --temperature=0.8
    python sample.py --run=out/ar --probe                    not text, but two measurements of what it knows

An AR model writes one token after another. A diffusion model begins with a block of masks and uncovers some of them, at
random places, in every step: with as many steps as masks, one token at a time, it samples exactly from what it learned;
with fewer steps it is faster, and tokens uncovered in the same step do not know of each other.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

from model import UserError, choose_device, conditional_nll, load_checkpoint, model_from_checkpoint, precision
from prepare import DataError, Tokenizer, load


def pick(logits, temperature, top_k, generator):
    """Draw one id from each row of logits (..., V); temperature 0 takes the likeliest. Returns (...)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()  # float32 noise would make the rare tokens rarer still (arXiv 2409.02908)
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # from 0 down: no overflow, however cold
    return torch.multinomial(logits.exp().flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])


@torch.no_grad()
def sample_ar(model, ids, length, temperature=1.0, top_k=0, generator=None):  # [AR]
    """Continue ids (B, P) to (B, length), one token at a time; what no longer fits the block is forgotten."""
    V, T = model.config.vocab_size, model.config.block_size
    while ids.shape[1] < length:
        context = F.pad(ids[:, max(0, ids.shape[1] - (T - 1)):], (1, 0), value=V)  # (B, <= T): the start symbol first
        token = pick(model.logits(context)[:, -1], temperature, top_k, generator)  # (B,)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return ids


@torch.no_grad()
def unmask(model, x, steps=0, temperature=1.0, top_k=0, generator=None):  # [DIFFUSION]
    """Fill in the masks (id V) of x (B, T) in random order; all other tokens stay as they are. Returns (B, T).

    steps: the network passes to take. As many as there are masks, or 0, uncovers one token of a row in each and is
    exact. Fewer go along the reverse process from t = 1 to 0 in equal steps: with n steps left, a mask is uncovered
    with probability 1/n.
    """
    V = model.config.vocab_size
    most = int((x == V).sum(1).max())
    one_by_one = steps == 0 or steps >= most
    for left in range(most if one_by_one else steps, 0, -1):
        masked = x == V
        noise = torch.rand(x.shape, generator=generator, device=x.device).masked_fill(~masked, 2.0)  # (B, T)
        if one_by_one:
            chosen = masked & F.one_hot(noise.argmin(1), x.shape[1]).bool()
        else:
            chosen = masked & (noise < 1 / left)
        if chosen.any():
            x = x.clone()
            x[chosen] = pick(model.head(model.hidden(x)[chosen]), temperature, top_k, generator)
    return x


def sample_diffusion(model, ids, length, steps=0, temperature=1.0, top_k=0, generator=None):  # [DIFFUSION]
    """Continue ids (B, P) to (B, length): blocks of T, each begun with up to half a block of what came before it."""
    V, T = model.config.vocab_size, model.config.block_size
    while ids.shape[1] < length:
        context = ids[:, max(0, ids.shape[1] - T // 2):] if ids.shape[1] >= T else ids
        x = F.pad(context, (0, T - context.shape[1]), value=V)  # (B, T)
        x = unmask(model, x, steps, temperature, top_k, generator)
        ids = torch.cat((ids, x[:, context.shape[1]:]), dim=1)
    return ids[:, :length]


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


def newest_run():
    runs = sorted(Path("out").glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under out/: train one with python train.py, or name it with --run")
    return runs[-1].parent


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="run directory (default: the newest under out/)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best",
                        help="best: where the validation loss was lowest (default); last: where training ended")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--num_samples", type=int, default=3, help="how many texts [3]")
    parser.add_argument("--length", type=int, default=0, help="tokens of a text, the prompt included [twice the block]")
    parser.add_argument("--temperature", type=float, default=1.0, help="1: as learned, lower: safer, 0: the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest tokens only (0: all)")
    parser.add_argument("--steps", type=int, default=0,
                        help="diffusion: network passes per block (0: one for every token, which is exact)")
    parser.add_argument("--probe", action="store_true", help="measure instead: multiple choice on held-out text, and "
                        "how much of 64 samples is recited from the training text")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same text [1]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser.parse_args(argv)


def run(args):
    """Load the run of the command line, sample, print. Raises UserError or DataError for what a person can mend."""
    limits = {"num_samples": (1, 10**5), "length": (0, 10**6), "temperature": (0, 1e9), "top_k": (0, 2**31),
              "steps": (0, 10**6), "seed": (0, 2**62)}
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name}={getattr(args, name)}: it must be between {low} and {high:g}")
    path = (args.run or newest_run()) / f"{args.checkpoint}.pt"
    if args.checkpoint == "best" and not path.exists() and path.with_name("last.pt").exists():
        raise UserError(f"{path.parent} has not been evaluated yet: train on, or sample with --checkpoint=last")
    saved = load_checkpoint(path)
    device, dtype, _ = choose_device(args.device, saved["config"]["dtype"])
    model = model_from_checkpoint(saved).to(device)
    tokenizer = Tokenizer.from_dict(saved["tokenizer"])
    if args.probe:
        args.num_samples, args.length = 64, 0
    prompt = torch.as_tensor(tokenizer.encode(args.prompt), device=device)
    length = args.length or 2 * model.config.block_size
    if len(prompt) >= length:
        raise UserError(f"the prompt has {len(prompt)} tokens and --length={length} leaves nothing to write: raise it")
    ids = prompt.repeat(args.num_samples, 1)  # (B, P)
    options = {"temperature": args.temperature, "top_k": args.top_k,
               "generator": torch.Generator(device).manual_seed(args.seed)}
    step = saved["state"]["step"]
    print(f"{path}: {model.config.objective}, {model.num_params() / 1e6:.2f}M parameters, step {step:,}")
    with precision(device, dtype):
        if model.config.objective == "ar":
            ids = sample_ar(model, ids, length, **options)  # [AR]
        else:
            ids = sample_diffusion(model, ids, length, args.steps, **options)  # [DIFFUSION]
    if args.probe:
        probe(model, saved["config"], ids.cpu().numpy(), precision(device, dtype))
        return
    for i, row in enumerate(ids, 1):
        print(f"----- {i}\n{tokenizer.decode(row.cpu().numpy())}")


def probe(model, config, ids, context):
    """Print the two measurements of --probe for a model and its samples ids (B, L)."""
    data = load(config["data"])
    asked = questions(data, config["split"], config["block_size"])
    with context:
        right, interval = multiple_choice(model, asked)
    training = data.splits["train"][:config["unique_tokens"]]
    held_out = np.asarray(data.splits[config["split"]])[None]
    print(f"multiple choice: {right:.1%} ± {interval:.1%} of {len(asked)} right (chance 25 %)\n"
          f"recited: {memorised(ids, training):.1%} of the 8-token sequences in {len(ids)} samples stand in the "
          f"training text; of held-out text {memorised(held_out, training):.1%} do")


def main(argv=None):
    try:
        run(parse(argv))
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
