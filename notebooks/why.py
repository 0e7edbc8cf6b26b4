"""Experiments for notebook 04: train.py with other batches, and a text of known entropy.

    python notebooks/why.py orders 4 --objective=ar --epochs=24         AR on 4 fixed orders, scored from left to right
    python notebooks/why.py masks 4 --objective=diffusion --epochs=100  diffusion that meets every block under 4 masks
    python notebooks/why.py reveal 1 --objective=diffusion --epochs=64  diffusion that hides ends of 1 order: suffixes
    python notebooks/why.py attention --objective=ar --dropout=0.2      AR with its dropout in the attention alone
    python notebooks/why.py source data/source                          write a corpus of a known Markov source
    python notebooks/why.py mixture out/diffusion 8                     how loose the bound of a run is, with 8 orders;
                                                                        on its own split, or on val: add `val`;
                                                                        of an AR run: what 8 dropout masks gain

All other flags are train.py's.
"""

import itertools
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402
from model import UserError, conditional_nll, draw_mask, make_model  # noqa: E402


def fixed_orders(N, T, seed):
    """N orders of T tokens, (N, T) int64: left to right, then random ones. All begin with the first token."""
    rng = np.random.default_rng(train.derive(seed, "orders"))
    orders = [np.arange(T)] + [np.append(0, 1 + rng.permutation(T - 1)) for _ in range(N - 1)]
    return torch.from_numpy(np.stack(orders))


def orders(N):
    """A batch for train.train in which an AR network reads every block in one of N fixed orders (arXiv 2507.15857).

    Tokens and their positions are permuted together, so that the network knows where what it has read stands: position
    i + 1 for token i, as in the usual order, and 0 for the start symbol. The order of a block is drawn anew in every
    step. Evaluation stays left to right, one of the N.
    """
    def batch(config, tokens, step, rows=slice(None)):
        given = train.get_batch(config, tokens, step, rows)  # x (B, T), and seen where some of it is disturbed
        B, T = config["batch_size"], config["block_size"]
        drawn = np.random.default_rng(train.derive(config["seed"], "order of a block", step)).integers(N, size=B)[rows]
        order = fixed_orders(N, T, config["seed"])[drawn].to(tokens.device)  # (B, T)
        permuted = {name: value.gather(1, order) for name, value in given.items()}
        return permuted | {"position": F.pad(order[:, :-1] + 1, (1, 0))}
    batch.__name__ = f"orders({N})"
    return batch


def masks(M):
    """A batch for train.train in which diffusion meets every block under M fixed masks in turn; 0: under fresh ones.

    Blocks are cut at the same places in all epochs, so that a block comes back with exactly the tokens and, after M
    epochs, exactly the mask that it had.
    """
    def batch(config, tokens, step, rows=slice(None)):
        seed, B, T = config["seed"], config["batch_size"], config["block_size"]
        n = len(tokens) // T
        places = range(step * B, (step + 1) * B)[rows]
        block = [int(np.random.default_rng(train.derive(seed, "order", i // n)).permutation(n)[i % n]) for i in places]
        x = tokens[: n * T].view(n, T)[block]  # (B, T)
        drawn = {epoch: draw_mask(n, T, torch.Generator().manual_seed(train.derive(seed, "fixed", epoch)))
                 for epoch in {i // n % (M or sys.maxsize) for i in places}}
        mask = torch.stack([drawn[i // n % (M or sys.maxsize)][b] for i, b in zip(places, block, strict=True)])
        return {"x": x, "mask": mask.to(x.device)}
    batch.__name__ = f"masks({M})"
    return batch


def reveal(N):
    """A batch for train.train in which diffusion hides the last k tokens of one of N fixed orders; 0: of any order.

    With N = 1 those are suffixes, so that all it ever learns is to go on from a beginning, as AR does. The sizes k are
    those of the usual masks.
    """
    def batch(config, tokens, step, rows=slice(None)):
        given = train.get_batch(config, tokens, step, rows)
        if N:
            T, x = config["block_size"], given["x"]
            rng = np.random.default_rng(train.derive(config["seed"], "order of a block", step))
            drawn = rng.integers(N, size=config["batch_size"])[rows]
            rank = fixed_orders(N, T, config["seed"]).argsort(1)[drawn].to(x.device)  # (B, T) when a token is revealed
            mask = rank >= T - given["mask"].sum(1, keepdim=True)
            given |= {"mask": mask, "index": mask.flatten().nonzero().squeeze(1)}
        return given
    batch.__name__ = f"reveal({N})"
    return batch


def attention(config, tokens, step, rows=slice(None)):
    """train.get_batch under a name of its own, so that such a run is resumed with its own kind of dropout."""
    return train.get_batch(config, tokens, step, rows)


def with_dropout_in_attention_only(config):
    """model.make_model, but of all places where the network drops values only the attention weights are left."""
    model = make_model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def markov(K=16, seed=1, concentration=0.1):
    """A random second-order Markov source over K symbols: p(next | last two), (K, K, K) float64, rows sum to 1."""
    return np.random.default_rng(seed).dirichlet(np.full(K, concentration), size=(K, K))


def stationary(p):
    """The distribution of two neighbouring symbols, (K, K), by power iteration. Raises ValueError if it finds none."""
    pair = np.full(p.shape[:2], 1 / p[..., 0].size)
    for _ in range(10_000):
        pair, before = np.einsum("ab,abc->bc", pair, p), pair
        if np.abs(pair - before).sum() < 1e-13:
            return pair
    raise ValueError("the source settles into no stationary distribution: take another seed")


def block_entropy(p, T):
    """Entropy of T >= 2 tokens of the source in nats per token: no model's loss can be lower on average, in any order.

    H(x_1..x_T) = H(x_1, x_2) + (T - 2) H(x_3 | x_1, x_2), exact, as the source is of second order.
    """
    pair = stationary(p)
    first, rate = (-np.sum(q * np.log(np.where(q > 0, q, 1))) for q in (pair, pair[..., None] * p))
    return (first + (T - 2) * (rate - first)) / T


def source_nll(p, x):
    """-log p of blocks x (N, T) under the source itself, in nats per token, (N,)."""
    first = np.log(stationary(p)[x[:, 0], x[:, 1]])
    return -(first + np.log(p[x[:, :-2], x[:, 1:-1], x[:, 2:]]).sum(1)) / x.shape[1]


def write_source(folder, train_tokens=65_536, held_out=65_536):
    """Prepare a corpus of markov()'s source as prepare.py would: three texts of its own, without <|endoftext|>."""
    p, sizes = markov(), {"train": train_tokens, "val": held_out, "tune": held_out}
    rng = np.random.default_rng(2)
    coder = prepare.Tokenizer({"kind": "char", "characters": "abcdefghijklmnop"})
    cumulative = p.cumsum(2)
    with prepare.replacing(folder) as new:
        splits = {}
        for name, size in sizes.items():
            a, b = divmod(rng.choice(p[..., 0].size, p=stationary(p).ravel()), len(p))
            x = [a, b]
            for u in rng.random(size - 2):
                x.append(min(int(np.searchsorted(cumulative[x[-2], x[-1]], u)), len(p) - 1))
            text = bytes(ord("a") + i for i in x)
            splits[name] = prepare.write_split(new / f"{name}.bin", coder, [(0, text)], size)
        meta = {"format": prepare.FORMAT, "version": prepare.VERSION, "dataset": "source", "dtype": coder.dtype.name,
                "command": f"python notebooks/why.py source {folder}", "splits": splits, "tokenizer": coder.spec}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))


def mixture(run, K, split=None, N=64):
    """-log p in nats of each of N held-out blocks under a run's best network: from left to right, in K random orders.

    To reveal tokens one by one in a random order, as the exact sampler does in a text of one block, is to draw from a
    mixture over orders. Its -log p is that of the mean of p over them, which is under the mean of -log p, the bound;
    with K of the orders it still comes out too high. An AR network knows one order only, and has no others. One trained
    with dropout is scored once more with the mean of its predictions over K dropout masks (arXiv 1506.02142): averaged.
    split: val or tune, or None for the run's own. Returns a dict: left (N numbers), orders (K lists of N), averaged (N
    numbers, or none). Raises UserError or DataError where train.py would.
    """
    saved = train.load_checkpoint(Path(run) / "best.pt")
    config = saved["config"] | ({"split": split} if split else {})
    device, dtype, _ = train.choose_device(config["device"], config["dtype"])
    blocks = train.open_data(config | {"eval_blocks": N})[2]
    model, rng = train.model_from_checkpoint(saved).to(device), np.random.default_rng(1)
    left_to_right = np.indices(blocks.shape)[1]  # (N, T): 0 for the token that is revealed first, and so on
    ar = config["objective"] == "ar"
    ranks = [left_to_right] + [rng.permuted(left_to_right, axis=1) for _ in range(0 if ar else K)]

    def score(rank):
        parts = zip(blocks.to(device).split(32), torch.from_numpy(rank).to(device).split(32), strict=True)
        nll = torch.cat([conditional_nll(model, x, x >= 0, rank) for x, rank in parts])
        return [round(value, 3) for value in nll.tolist()]

    with train.precision(device, dtype):
        left, *orders = [score(rank) for rank in tqdm(ranks, unit="order", disable=None)]
        averaged = []
        if ar and config["dropout"] and K:
            torch.manual_seed(0)
            single = model.train().logits
            model.logits = lambda idx: sum(single(idx).softmax(-1) for _ in range(K)).log()  # conditional_nll norms it
            averaged = score(left_to_right)
    return {"run": run, "command": shlex.join(["python", "notebooks/why.py", *sys.argv[1:]]), "split": config["split"],
            "block_size": blocks.shape[1], "left": left, "orders": orders, "averaged": averaged}


def main():
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), sys.argv[1:]))
    given = sys.argv[1 + len(words):]
    match words:
        case ["source", _] | ["mixture", _, _] | ["mixture", _, _, "val" | "tune"] if not given:
            try:
                if words[0] == "source":
                    write_source(Path(words[1]))
                else:
                    print(json.dumps(mixture(words[1], int(words[2]), *words[3:])))
            except (UserError, ValueError, prepare.DataError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            return 0
        case ["attention"]:
            objective, batch, train.make_model = "ar", attention, with_dropout_in_attention_only
        case ["orders" | "masks" | "reveal" as kind, number] if number.isdecimal():
            objective = "ar" if kind == "orders" else "diffusion"
            batch = {"orders": orders, "masks": masks, "reveal": reveal}[kind](int(number))
        case _:
            print(__doc__)
            return 2
    if words == ["orders", "0"] or not any(w == f"--objective={objective}" or "--resume" in w for w in given):
        print(f"error: {' '.join(words)}: it takes --objective={objective}, and orders at least 1", file=sys.stderr)
        return 2
    return train.main(given, batch)


if __name__ == "__main__":
    sys.exit(main())
