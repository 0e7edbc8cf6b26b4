"""Experiments for notebook 04: train.py with other batches or another network, and a text of known entropy.

    python notebooks/why.py orders 4 --objective=ar --epochs=24         AR on 4 fixed orders, scored left to right
    python notebooks/why.py masks 4 --objective=diffusion --epochs=100  diffusion, every block under 4 masks
    python notebooks/why.py reveal 1 --objective=diffusion --epochs=64  diffusion that masks the ends of 1 order
    python notebooks/why.py bell 3 --objective=diffusion --epochs=48    diffusion that masks about half, mostly
    python notebooks/why.py hide 0.15 --objective=ar --epochs=24        AR that reads 15 % of its tokens masked
    python notebooks/why.py attention --objective=ar --dropout=0.2      AR with dropout in the attention alone
    python notebooks/why.py embedding 3 --objective=ar --epochs=24      three times the learning rate for the embedding
    python notebooks/why.py decay 0 --objective=ar --epochs=24          a learning rate that falls to 0 of its peak
    python notebooks/why.py source data/source                          write a corpus of a known Markov source

All other flags are train.py's. A batch here returns what train.get_batch does: the arguments of GPT.forward, and
the weight of each block.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, fields, make_model, mask_k, uniform_k  # noqa: E402


def fixed_orders(N, T, seed):
    """N orders of T tokens, (N, T) int64: from left to right, then random ones. All begin with the first token."""
    rng = np.random.default_rng(train.derive(seed, "orders"))
    orders = [np.arange(T)] + [np.append(0, 1 + rng.permutation(T - 1)) for _ in range(N - 1)]
    return torch.from_numpy(np.stack(orders))


def drawn_orders(N, config, step, rows):
    """An order for each block of a batch, drawn from fixed_orders anew in every step, (B, T)."""
    rng = np.random.default_rng(train.derive(config["seed"], "order of a block", step))
    drawn = rng.integers(N, size=config["batch_size"])[rows]
    return fixed_orders(N, config["block_size"], config["seed"])[drawn]


def orders(N):
    """A batch for train.train in which an AR network reads every block in one of N fixed orders (arXiv 2507.15857).

    Tokens and their positions are permuted together, so that the network knows where what it has read stands:
    position i + 1 for token i, as in the usual order, and 0 for the start symbol. The network has to be a
    PermutedGPT. Evaluation stays from left to right, one of the N.
    """
    def batch(config, tokens, step, rows=slice(None)):
        given, weight = train.get_batch(config, tokens, step, rows)  # x (B, T), and read where some is replaced
        order = drawn_orders(N, config, step, rows).to(tokens.device)  # (B, T)
        permuted = {name: value.gather(1, order) for name, value in given.items()}
        return permuted | {"position": F.pad(order[:, :-1] + 1, (1, 0))}, weight
    batch.__name__ = f"orders({N})"
    return batch


class PermutedGPT(GPT):
    """A GPT whose forward also takes position, (B, T): where the tokens it reads stand, if not at 0..T-1."""

    def __init__(self, config):
        super().__init__(replace(config, block_size=config.block_size + 1))  # positions 0..T: see orders
        self.config, self.position = config, None

    def forward(self, x, mask=None, read=None, position=None):
        self.position = position
        try:
            return super().forward(x, mask, read=read)
        finally:
            self.position = None

    def rotation(self, start, T):
        if self.position is None:
            return super().rotation(start, T)
        return self.cos[self.position][:, None], self.sin[self.position][:, None]  # (B, 1, T, D/2): for all heads


def permuted(config):
    """model.make_model, of a PermutedGPT."""
    return PermutedGPT(GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)}))


def masks(M):
    """A batch for train.train in which diffusion meets every block under M fixed masks in turn; 0: fresh ones.

    Blocks are cut at the same places in all epochs, so that a block comes back with exactly the tokens and, after
    M epochs, exactly the mask that it had.
    """
    def batch(config, tokens, step, rows=slice(None)):
        seed, B, T = config["seed"], config["batch_size"], config["block_size"]
        n = len(tokens) // T
        places = range(step * B, (step + 1) * B)[rows]
        block = [int(np.random.default_rng(train.derive(seed, "order", i // n)).permutation(n)[i % n]) for i in places]
        x = tokens[: n * T].view(n, T)[block]  # (B, T)
        drawn = {}
        for epoch in {i // n % (M or sys.maxsize) for i in places}:
            generator = torch.Generator().manual_seed(train.derive(seed, "fixed", epoch))
            drawn[epoch] = mask_k(uniform_k(n, T, generator), T, generator)  # (n, T)
        mask = torch.stack([drawn[i // n % (M or sys.maxsize)][b] for i, b in zip(places, block, strict=True)])
        weight = train.clipped(mask.sum(1), T, config["mask_weight"])
        given = {"x": x, "mask": mask.to(x.device)}
        if config["replace"]:
            given["read"] = train.replace_tokens(config, x, step, rows)
        return given, weight.to(x.device)
    batch.__name__ = f"masks({M})"
    return batch


def reveal(N):
    """A batch for train.train in which diffusion masks the last k tokens of one of N fixed orders; 0: of any order.

    With N = 1 those are suffixes, so that all it ever learns is to go on from a beginning, as AR does. The k are
    those of the usual masks.
    """
    def batch(config, tokens, step, rows=slice(None)):
        given, weight = train.get_batch(config, tokens, step, rows)
        if N:
            rank = drawn_orders(N, config, step, rows).argsort(1).to(tokens.device)  # (B, T) when it is unmasked
            mask = rank >= config["block_size"] - given["mask"].sum(1, keepdim=True)
            given |= {"mask": mask, "at": mask.flatten().nonzero().squeeze(1)}
        return given, weight
    batch.__name__ = f"reveal({N})"
    return batch


def bell(a):
    """A batch for train.train in which diffusion masks a share t ~ Beta(a, a) of a block, and all tokens weigh alike.

    What it descends is no bound: it hardly learns from blocks with little or nearly all of them masked (arXiv
    2605.13026). The k are the T quantiles of the distribution, in pairs of k and T+1-k, as it is symmetric.
    """
    t = np.linspace(0, 1, 4097)
    p = (t * (1 - t)) ** (a - 1)
    cdf = (np.cumsum(p) - p / 2) / p.sum()

    def batch(config, tokens, step, rows=slice(None)):
        (B, T), given = (config["batch_size"], config["block_size"]), train.get_batch(config, tokens, step, rows)[0]
        device = given["x"].device
        generator = torch.Generator().manual_seed(train.derive(config["seed"], "mask", step))
        u = (uniform_k(B, T, generator).numpy() - 0.5) / T  # spread evenly over 0..1, in pairs of u and 1 - u
        k = 1 + torch.from_numpy(T * np.interp(u, cdf, t)).long().clamp(max=T - 1)  # (B,)
        mask = mask_k(k, T, generator)
        return given | {"mask": mask[rows].to(device), "at": None}, (2 * k / T)[rows].to(device)
    batch.__name__ = f"bell({a})"
    return batch


def hide(share):
    """A batch for train.train in which a share of the tokens that AR reads is the start symbol, its mask."""
    def batch(config, tokens, step, rows=slice(None)):
        given, weight = train.get_batch(config, tokens, step, rows)
        shape = config["batch_size"], config["block_size"]
        u = np.random.default_rng(train.derive(config["seed"], "noise", step)).random(shape)[rows]
        hidden = torch.from_numpy(u < share).to(tokens.device)  # (B, T)
        return given | {"read": given.get("read", given["x"]).masked_fill(hidden, config["vocab_size"])}, weight
    batch.__name__ = f"hide({share})"
    return batch


def usual(name):
    """train.get_batch under another name, so that a run is resumed with what else is changed in it."""
    def batch(config, tokens, step, rows=slice(None)):
        return train.get_batch(config, tokens, step, rows)
    batch.__name__ = name
    return batch


def with_dropout_in_attention_only(config):
    """model.make_model, but of all places where the network drops values only the attention weights are left."""
    model = make_model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def embedding_rate(factor):
    """train.descend with `factor` times the learning rate for the embedding, which is the one that the log shows.

    Beside Muon the embedding has a group of its own, the first.
    """
    def descend(optimizers, lr):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                embedding = optimizer is optimizers[0] and group is optimizer.param_groups[0]
                group["lr"] = lr * factor if embedding else lr
            optimizer.step()
            optimizer.zero_grad()
    return descend


def decay_to(share, before=train.learning_rate):
    """train.learning_rate with a cosine down to this share of the peak, not to a tenth."""
    def learning_rate(step, steps, peak):
        lr = before(step, steps, peak)
        return lr if step < max(1, steps // 100) else peak * (share + (1 - share) * (lr / peak - 0.1) / 0.9)
    return learning_rate


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
    with prepare.new_folder(folder) as new:
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


def main():
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), sys.argv[1:]))
    given = sys.argv[1 + len(words):]
    match words:
        case ["source", folder] if not given:
            try:
                write_source(Path(folder))
            except (ValueError, prepare.DataError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            return 0
        case ["attention"]:
            objective, batch, train.make_model = "ar", usual("attention"), with_dropout_in_attention_only
        case ["embedding" | "decay" as kind, number] if number.replace(".", "", 1).isdecimal():
            objective, batch = "", usual(f"{kind}({number})")
            name, change = {"embedding": ("descend", embedding_rate), "decay": ("learning_rate", decay_to)}[kind]
            setattr(train, name, change(float(number)))
        case ["hide", share] if share.replace(".", "", 1).isdecimal() and float(share) <= 1:
            objective, batch = "ar", hide(float(share))
        case ["orders", number] if number.isdecimal() and number != "0":
            objective, batch, train.make_model = "ar", orders(int(number)), permuted
        case ["masks" | "reveal" | "bell" as kind, number] if number.isdecimal() and (kind, number) != ("bell", "0"):
            objective, batch = "diffusion", {"masks": masks, "reveal": reveal, "bell": bell}[kind](int(number))
        case _:
            print(__doc__)
            return 2
    if words[0] == "embedding" and "--optimizer=adamw" in given:
        print("error: embedding: it takes Muon, AdamW has the matrices in the embedding's group", file=sys.stderr)
        return 2
    if objective and not any(word == f"--objective={objective}" or word.startswith("--resume") for word in given):
        print(f"error: {' '.join(words)}: it takes --objective={objective}", file=sys.stderr)
        return 2
    return train.main(given, batch)


if __name__ == "__main__":
    sys.exit(main())
