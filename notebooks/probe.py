"""Measure finished runs: the held-out loss, multiple choice, memorised text, the likelihood over orders.

    python notebooks/probe.py out/ar out/diffusion                best.pt and last.pt of both, without orders
    python notebooks/probe.py out/ar --split=val --only=loss      settings chosen on tune, reported on val
    python notebooks/probe.py out/diffusion --checkpoint=best --only=orders --orders=64
    python notebooks/probe.py out/ar-s1 out/ar-s2 out/ar-s3 --ensemble   the loss of all of them as one

It prints a line of JSON for each checkpoint; where the last network is the best, one line. In it are

  loss, stderr, bpb   the held-out loss in nats per token, its standard error, and in bits per byte; exact for
                      AR, a bound for diffusion. With the mask draws of the last evaluation of the run: these
                      are the best_* and final_* of its log, which train.py --eval_only printed before
  left_to_right       diffusion: the exact loss if tokens are unmasked from left to right, nats per token
  multiple_choice     the share of 512 questions in which the true end of a held-out passage is the likeliest
  ..._interval        of four, and half its 95 % interval. Chance is 0.25
  memorised           the share of the 8-token sequences in 64 samples, of two blocks each, that stand in the
  memorised_held_out  training text; that of the held-out text: the level of a writer who memorises nothing
  left                --orders=K: -log p in nats of each of 64 held-out blocks of block_size tokens from left
  orders, averaged    to right; diffusion: in each of K random orders; AR with dropout: see mixture()
  mask_rate           --only=rates, diffusion: shares of masked tokens, and at each of them the loss of the
  training, held_out  masked tokens of training text and of held-out text, nats per token
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from numpy.lib.stride_tricks import sliding_window_view  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from model import GPT, UserError, block_losses, choose_device, evaluate, load_checkpoint, mask_k  # noqa: E402
from model import model_from_checkpoint, precision  # noqa: E402
from prepare import open_data, scored_bytes  # noqa: E402
from sample import sample_ar, sample_diffusion, told  # noqa: E402


def open_checkpoint(run, checkpoint="best", **other):
    """A checkpoint of a run with what it takes to measure it, as a namespace.

    It has run, checkpoint, step, config, model, data, training tokens (U,), held-out blocks (N, T) and
    context() to score in. other: settings in place of the run's own, such as split, device and data (the folder
    where its data lie now); None: its own. Raises UserError or DataError, also if that is other data.
    """
    saved = load_checkpoint(run if Path(run).suffix == ".pt" else Path(run) / f"{checkpoint}.pt")
    config = train.as_of_now(saved["config"]) | {name: value for name, value in other.items() if value is not None}
    device, dtype, _ = choose_device(config["device"], config["dtype"])
    data, tokens, blocks = open_data(config)
    return SimpleNamespace(run=str(run), checkpoint=checkpoint, step=saved["state"]["step"], config=config,
                           model=model_from_checkpoint(saved).to(device), data=data, tokens=tokens,
                           blocks=blocks, context=lambda: precision(device, dtype))


@torch.no_grad()
def conditional_nll(model, x, target, rank=None):
    """-log p(target tokens | the other tokens) in nats, (B,) on the CPU, by the chain rule over the targets.

    x: (B, T) token ids; target: (B, T) bool. Diffusion: any positions, one forward pass for each target, from
    left to right; rank (B, T), 0 at the first target of a row, 1 at the second, ..., is another order of
    unmasking. AR: only a suffix of the block, as it can not see what follows; ValueError otherwise.
    """
    V, T = model.config.vocab_size, x.shape[1]
    if model.config.objective == "ar":
        if (target[:, :-1] & ~target[:, 1:]).any():
            raise ValueError("an AR model conditions on the past alone: the target must end the block")
        past = F.pad(x[:, :-1], (1, 0), value=V)  # [AR]
        nll = F.cross_entropy(model.logits(past).transpose(1, 2), x, reduction="none")  # (B, T)
        return (nll.cpu().double() * target.cpu()).sum(1)  # on the CPU: not every device has float64
    rank = target.long().cumsum(1) - 1 if rank is None else rank  # (B, T)
    total = torch.zeros(len(x), dtype=torch.float64)
    for j in range(int(target.sum(1).max())):  # [DIFFUSION] from the j-th on targets are masked
        now = (target & (rank == j)).flatten().nonzero().squeeze(1)  # (M,) of rows that have a j-th target
        h = model.hidden(x.masked_fill(target & (rank >= j), V), at=now)  # (M, C)
        nll = F.cross_entropy(model.head(h), x.flatten()[now], reduction="none")  # (M,)
        total[(now // T).cpu()] += nll.cpu().double()
    return total


def chain_rule_nll(model, x):
    """Exact -log p of blocks x (B, T) from left to right, (B,) in nats per token.

    For diffusion, in T forward passes, this is a second honest number beside the bound: the likelihood of one
    order of unmasking. It may lie on either side of the bound, which is a mean over all orders.
    """
    return conditional_nll(model, x, torch.ones_like(x, dtype=torch.bool)) / x.shape[1]


class Ensemble(GPT):
    """Networks of one kind as one, which predicts the mean of their probabilities at every position.

    Its loss is exact for AR; for diffusion it is a bound, order by order.
    """

    def __init__(self, models):
        torch.nn.Module.__init__(self)
        self.config, self.embed, self.models = models[0].config, models[0].embed, torch.nn.ModuleList(models)
        self.eval()

    def hidden(self, idx, cache=None, at=None):
        return torch.cat([model.hidden(idx, at=at) for model in self.models], dim=-1)  # (..., sum of the C)

    def head(self, h):
        parts = zip(self.models, h.split([model.config.n_embd for model in self.models], dim=-1), strict=True)
        return torch.stack([model.head(part).log_softmax(-1) for model, part in parts]).logsumexp(0)  # (..., V)


def together(opened):
    """Several open checkpoints as one, whose model is their Ensemble. Raises UserError if they do not fit."""
    first, blocks = opened[0], opened[0].blocks
    for other in opened[1:]:
        same = ("objective", "data_sha256", "unique_tokens", "block_size")
        if any(other.config[name] != first.config[name] for name in same) or not torch.equal(other.blocks, blocks):
            raise UserError(f"{other.run} and {first.run} differ in objective, text or held-out blocks: an "
                            "ensemble is of runs that differ in the seed or the network")
    return SimpleNamespace(**vars(first) | {"model": Ensemble([one.model for one in opened])})


def bar(parts, name):
    """Go through the parts of a measurement, with a progress bar where standard error is a terminal."""
    return tqdm(parts, name, leave=False, disable=None)


def score_again(opened):
    """The held-out loss of an open checkpoint, as after the last step of its run: a dict, see above."""
    blocks, draws = opened.blocks, opened.config["final_draws"]
    config = opened.config | {"eval_tokens": blocks.numel()}
    config |= scored_bytes(opened.data, config["split"], blocks)
    result = train.score(config, opened.model, blocks, draws)
    if opened.config["objective"] == "diffusion":
        device = opened.model.embed.weight.device
        with opened.context():
            nll = [chain_rule_nll(opened.model, x.to(device)) for x in bar(blocks.split(64), "left to right")]
        result["left_to_right"] = torch.cat(nll).mean().item()
    return result


def questions(data, split, T, count=512, seed=0):
    """Multiple-choice questions from held-out documents: (Q, 4, T) ids, choice 0 is what was really written.

    Each begins with 3/4 T tokens that end with a sentence, the same in all four choices. It goes on for T/4
    tokens: as the document does, or as three other documents do at such a position. All four are drawn alike,
    so that nothing but the context tells them apart. The same seed gives the same questions. Raises UserError
    without four such documents.
    """
    ids, pieces, answer = np.asarray(data.splits[split], dtype=np.int64), data.tokenizer.pieces, T // 4
    stop = np.array([piece.rstrip()[-1:] in (b".", b"!", b"?") for piece in pieces])  # (V,): a sentence may
    space = np.array([piece[:1].isspace() for piece in pieces])  # end with this, and this may follow it
    begins = np.flatnonzero(stop[ids[:-1]] & space[ids[1:]]) + 1  # where an answer may begin
    begins = begins[(begins >= T - answer) & (begins + answer <= len(ids))]
    passage = np.cumsum(ids == data.tokenizer.eot)  # the same throughout a window within one passage
    begins = begins[passage[begins - (T - answer)] == passage[begins + answer - 1]]
    document = np.searchsorted(data.meta["splits"][split]["document_starts"], begins, side="right")
    begins = [begins[document == d] for d in np.unique(document)]  # of each document that has any
    if len(begins) < 4 or not answer:
        raise UserError(f"the held-out split {split!r} has too few documents for questions of {T} tokens: "
                        "it takes 4 (--only=loss and --only=memorised do without)")
    rng, asked = np.random.default_rng(seed), []
    for _ in range(count):
        four = [rng.choice(begins[d]) for d in rng.choice(len(begins), 4, replace=False)]
        context = ids[four[0] - (T - answer):four[0]]
        asked.append([np.concatenate((context, ids[begin:begin + answer])) for begin in four])
    return np.array(asked)


def multiple_choice(model, asked):
    """How often a model finds the true answer the likeliest of four: (share, half its 95 % interval).

    asked: (Q, 4, T) from questions(). Chance is 0.25. An answer takes AR one forward pass, diffusion T/4.
    """
    device, T = model.embed.weight.device, asked.shape[2]
    target = torch.arange(T, device=device) >= T - T // 4
    scores = []
    for x in bar(torch.from_numpy(asked).flatten(0, 1).split(256), "multiple choice"):
        scores.append(conditional_nll(model, x.to(device), target.expand(len(x), T)))
    right = (torch.cat(scores).view(-1, 4).argmin(1) == 0).double().mean().item()
    variance = max(right * (1 - right), 1 / len(asked))
    return right, 1.96 * math.sqrt(variance / len(asked))


def memorised(ids, training, n=8):
    """The share, 0 to 1, of the n-token sequences in the rows of ids (B, L) that stand in training (U,)."""
    known = {row.tobytes() for row in sliding_window_view(np.asarray(training, dtype=np.int64), n)}
    rows = sliding_window_view(np.asarray(ids, dtype=np.int64), n, axis=1).reshape(-1, n)
    return sum(row.tobytes() in known for row in rows) / len(rows)


def write(model, B=64, seed=1):
    """B samples of two blocks each, (B, 2T) ids: the texts of sample.py --num_samples=B --seed=SEED."""
    nothing = torch.empty(B, 0, dtype=torch.long)
    writer = sample_ar if model.config.objective == "ar" else sample_diffusion
    generator = torch.Generator().manual_seed(seed)
    return writer(model, nothing, 2 * model.config.block_size, generator=generator)[0].numpy()


def mixture(run, K, split=None, N=64, checkpoint="best", **other):
    """-log p in nats of each of N held-out blocks: from left to right, and in K random orders.

    To unmask tokens one by one in a random order, as the exact sampler does in a text of one block, is to
    draw from a mixture over orders. Its -log p is that of the mean of p over them, which is under the mean of
    -log p, the bound; with K of the orders it still comes out too high. An AR network knows one order only.
    One trained with dropout is scored once more, with the mean of its predictions over K dropout masks (arXiv
    1506.02142): averaged. Returns a dict: split, block_size, left (N numbers), orders (K lists of N; none for
    AR), averaged (N numbers, or none). other, and what it raises: as in open_checkpoint.
    """
    opened = open_checkpoint(run, checkpoint, split=split, eval_blocks=N, **other)
    model, blocks, ar = opened.model, opened.blocks, opened.config["objective"] == "ar"
    rng, device = np.random.default_rng(1), model.embed.weight.device
    left_to_right = np.indices(blocks.shape)[1]  # (N, T): 0 for the token that is unmasked first, and so on
    ranks = [left_to_right] + [rng.permuted(left_to_right, axis=1) for _ in range(0 if ar else K)]

    def score(rank):
        parts = zip(blocks.to(device).split(32), torch.from_numpy(rank).to(device).split(32), strict=True)
        nll = torch.cat([conditional_nll(model, x, x >= 0, rank) for x, rank in parts])
        return [round(value, 3) for value in nll.tolist()]

    averaged = []
    with opened.context():
        left, *orders = [score(rank) for rank in bar(ranks, "orders")]
        if ar and opened.config["dropout"] and K:
            torch.manual_seed(0)
            single = model.train().logits
            # The log of a sum in place of a mean: cross-entropy takes any logits, and norms them.
            model.logits = lambda idx: sum(single(idx).softmax(-1) for _ in range(K)).log()
            averaged = score(left_to_right)
    return {"split": opened.config["split"], "block_size": blocks.shape[1], "left": left, "orders": orders,
            "averaged": averaged}


def mask_rates(opened, bins=8, draws=2):
    """Diffusion's loss by the share t of tokens that are masked, as a dict of lists of min(bins, T) numbers.

    mask_rate: the middle of each bin of t; training, held_out: the mean loss of masked tokens there, in nats
    per token, of as many training blocks as there are held-out ones, if there are so many. The mean over the
    bins is the bound of that text, where their number divides T.
    """
    if opened.config["objective"] == "ar":
        raise UserError(f"{opened.run}: an AR model has no mask rates")
    T, model = opened.blocks.shape[1], opened.model
    bins = min(bins, T)
    rates = (torch.arange(bins) + 0.5) / bins
    training = opened.tokens[:len(opened.tokens) // T * T].view(-1, T)[:len(opened.blocks)]
    result = {"mask_rate": rates.tolist()}
    for name, blocks in (("training", training), ("held_out", opened.blocks)):
        generator, blocks = torch.Generator().manual_seed(0), blocks.repeat(draws, 1)
        losses = []
        for i in range(bins):
            k = torch.randint(i * T // bins + 1, (i + 1) * T // bins + 1, (len(blocks),), generator=generator)
            with opened.context(), torch.no_grad():
                losses.append(block_losses(model, blocks, mask_k(k, T, generator), 32).mean().item())
        result[name] = losses
    return result


MEASURES = ("loss", "choice", "memorised", "orders", "rates")


def measure(opened, what, K):
    """What a line tells of an open checkpoint; what: some of MEASURES; K: see mixture."""
    model, data, split, row = opened.model, opened.data, opened.config["split"], {}
    for name in bar(what, f"{opened.run}/{opened.checkpoint}.pt"):
        if name == "loss":
            row |= score_again(opened)
        elif name == "choice":
            with opened.context():
                right, interval = multiple_choice(model, questions(data, split, model.config.block_size))
            row |= {"multiple_choice": right, "multiple_choice_interval": interval}
        elif name == "memorised":
            row["memorised"] = memorised(write(model), opened.tokens)
            row["memorised_held_out"] = memorised(data.splits[split][None], opened.tokens)
        elif name == "rates":
            row |= mask_rates(opened)
        else:
            other = {name: opened.config[name] for name in ("device", "data")}
            row |= mixture(opened.run, K, split, checkpoint=opened.checkpoint, **other)
    return row


def print_measures(argv=None):
    """What the command line asks for."""
    usage = "python notebooks/probe.py RUN [RUN ...] [FLAGS]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="one of them only [both]")
    parser.add_argument("--split", choices=("val", "tune"), help="held-out split [the run's own]")
    parser.add_argument("--only", choices=MEASURES, action="append", help="measure this alone; repeatable")
    parser.add_argument("--orders", metavar="K", type=int, default=0, help="orders; AR: dropout masks [0]")
    parser.add_argument("--ensemble", action="store_true", help="the loss of all runs as one network [best]")
    parser.add_argument("--device", help="auto, cpu, cuda, ... [the run's own]")
    parser.add_argument("--data", metavar="FOLDER", help="where the data of the runs lie now [where they lay then]")
    args = parser.parse_args(argv)
    what = args.only or [*MEASURES][:4 if args.orders else 3]
    if args.orders < 0 or ("orders" in what) != (args.orders > 0):
        parser.error("--only=orders and --orders=K, with K of at least 1, go together")
    if args.ensemble and (args.only or args.orders):
        parser.error("--ensemble measures the loss alone: leave out --only and --orders")
    command = shlex.join(["python", "notebooks/probe.py", *(sys.argv[1:] if argv is None else argv)])
    if args.ensemble:
        name, other = args.checkpoint or "best", {"split": args.split, "device": args.device, "data": args.data}
        with contextlib.redirect_stdout(sys.stderr):
            opened = [open_checkpoint(run, name, **other) for run in args.runs]
            one = together(opened)
            with one.context():
                loss, stderr = evaluate(one.model, one.blocks, one.config["final_draws"])
            row = {"run": [*map(str, args.runs)], "checkpoint": name, "split": one.config["split"], "loss": loss,
                   "stderr": stderr, "command": command}
        print(json.dumps(row), flush=True)
        return
    for run in args.runs:
        step = None
        for name in [args.checkpoint] if args.checkpoint else ["best", "last"]:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for JSON
                opened = open_checkpoint(run, name, split=args.split, device=args.device, data=args.data)
                if opened.step == step:
                    continue  # the last network is the best
                step = opened.step
                row = {"run": str(run), "checkpoint": name, "step": step, "split": opened.config["split"],
                       **measure(opened, what, args.orders), "command": command}
            print(json.dumps(row), flush=True)


def main(argv=None):
    return told(print_measures, argv)


if __name__ == "__main__":
    sys.exit(main())
