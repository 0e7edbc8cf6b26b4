"""What several tests share: small networks, and the loss along every order of their tokens.

One thread a process, as the networks are so small that threads would only wait for each other.
"""

import hashlib
import itertools
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the commands that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def tiny(objective, V=3, T=5, seed=0, **shape):
    """A random network whose predictions are far from uniform, in float64 so that sums can be compared closely."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(objective, V, T, **({"n_layer": 2, "n_head": 2, "n_embd": 16} | shape))).double().eval()
    for p in model.parameters():
        p.data *= 20 if p.dim() == 2 else 1
    return model


def any_order_losses(model, x):
    """The chain rule along every order of revealing the tokens: (T!,) -log p in nats per token; x: (T,)."""
    T, V = len(x), model.config.vocab_size
    losses = []
    with torch.no_grad():
        for order in itertools.permutations(range(T)):
            seen, total = torch.full((T,), V), 0.0
            for i in order:
                total += F.cross_entropy(model.logits(seen[None])[0, i], x[i]).item()
                seen = seen.clone()
                seen[i] = x[i]
            losses.append(total / T)
    return torch.tensor(losses, dtype=torch.float64)


def change_one_id(folder):
    """Change one id of val in a prepared folder, and its hash in meta.json so that it fits."""
    ids = np.fromfile(folder / "val.bin", dtype="<u2")
    ids[5] = (ids[5] + 1) % 8
    ids.tofile(folder / "val.bin")
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["val"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a small corpus of characters."""
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["the union ", "has peace ", "keeps law.\n\n"], 4000)
    (folder / "text.txt").write_text("".join(words))
    prepare.prepare(inputs=[folder / "text.txt"], tokenizer="char", out=folder / "data")
    return folder / "data"


def run(corpus, out, **given):
    """A short run; its log."""
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "unique_tokens": 1024,
             "eval_blocks": 32, "epochs": 10.0, "lr": 0.01, "dtype": "float32", "device": "cpu", "ema": 0.0}
    return train.train(train.make_config("laptop", **(small | {"data": str(corpus), "out": str(out)} | given)))
