"""train.py with other batches, for notebook 04: each objective with more, or fewer, orders and masks.

    python notebooks/why.py orders 4 --objective=ar --epochs=24         AR on 4 fixed orders, scored from left to right
    python notebooks/why.py masks 4 --objective=diffusion --epochs=100  diffusion that meets every block under 4 masks

All other flags are train.py's.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train  # noqa: E402
from model import draw_mask  # noqa: E402


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


def main():
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), sys.argv[1:]))
    if len(words) != 2 or words[0] not in ("orders", "masks") or not words[1].isdecimal():
        print(__doc__)
        return 2
    (kind, number), given = words, sys.argv[3:]
    objective = {"orders": "ar", "masks": "diffusion"}[kind]
    if kind == "orders" and number == "0" or not any(w == f"--objective={objective}" or "--resume" in w for w in given):
        print(f"error: {kind} {number}: it takes --objective={objective}, and orders at least 1", file=sys.stderr)
        return 2
    return train.main(given, {"orders": orders, "masks": masks}[kind](int(number)))


if __name__ == "__main__":
    sys.exit(main())
