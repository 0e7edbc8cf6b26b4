"""How fast this machine trains, evaluates and samples, and how that compares with the plain way and with the machine.

    python tests/bench.py                                    every shape of the device, a few minutes
    python tests/bench.py --shapes=laptop,baby --json=bench.json

One table; every line is the median over repeats, with the quartiles of its time. Repeats are interleaved: each runs
every variant of a shape once, so whatever else the machine does meets all of them, and a ratio is the median of the
ratios within a repeat. Its columns:

  tok/s    tokens of text per second: of whole training steps (batch, forward, backward, clipping, optimizer, as
           train.train does them), of evaluation (one mask a token counts once), or of text written
  FLOP/s   of the model alone, for a training step (6 N + 12 L C T) B T - 6 (V C + M) (B T - scored tokens), where N
           counts all parameters and the last term is the output layer and the last block's MLP, of M parameters, which
           diffusion leaves out on the tokens it does not score (arXiv 2001.08361; attention as if nothing were masked).
           A third of it to evaluate. What the optimizer computes is not counted, though it takes time: Muon's
           Newton-Schulz steps are dozens of products
  peak     that, as a share of what one large matrix product reaches here, in the same repeats, in the same dtype
  memory   what two steps add to the peak memory: resident in a fresh process on a CPU, allocated on a GPU
  x ref    tok/s over those of the reference in the same dtype
  dif/AR   time of a diffusion step over that of an AR step, otherwise alike

The line `floor` does of the AR step above it only what no code can leave out that uses PyTorch's kernels (see
floor_step): no RMSNorm, rotation, dropout or loss. Its `x ref` is the most that could be gained on this machine.

The reference is written here as one would first write it: a GPT-2 with LayerNorm, GELU and learned positions, logits
for every position, windows copied from a memory map at random places, AdamW with a Python loop over the parameters.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import UserError, choose_device, evaluate, make_model, make_optimizers, precision  # noqa: E402
from sample import sample_ar, sample_diffusion  # noqa: E402
from train import accelerate, descend, get_batch, make_config, update_average  # noqa: E402

SHAPES = {  # name: (device kind, n_layer, n_head, n_embd, block_size T, batch_size B, vocab_size V)
    "laptop": ("cpu", 4, 2, 128, 128, 16, 512),
    "char": ("cpu", 4, 4, 128, 128, 16, 65),
    "v4096": ("cpu", 4, 4, 128, 128, 16, 4096),
    "baby": ("cpu", 6, 6, 384, 256, 8, 65),  # nanoGPT's name for it
    "gpu": ("cuda", 12, 6, 384, 256, 64, 4096),
    "25M": ("cuda", 8, 8, 512, 1024, 32, 4096),
    "124M": ("cuda", 12, 12, 768, 1024, 32, 50257),
    "tiny": (None, 2, 2, 64, 32, 4, 65),  # for the test of this file
}
UNIQUE = 2**17  # tokens of random text to train on
COLUMNS = "shape what who dtype optimizer ms quartiles tok/s GFLOP/s peak MB x_ref dif/AR".split()


class Reference(nn.Module):
    """A plain GPT-2 of the same shape, without biases or dropout, the embedding tied to the output layer."""

    def __init__(self, c):
        super().__init__()
        C, self.n_head = c["n_embd"], c["n_head"]
        self.tokens, self.positions = nn.Embedding(c["vocab_size"], C), nn.Embedding(c["block_size"], C)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(C, bias=False), "qkv": nn.Linear(C, 3 * C, bias=False),
            "proj": nn.Linear(C, C, bias=False), "norm2": nn.LayerNorm(C, bias=False),
            "up": nn.Linear(C, 4 * C, bias=False), "down": nn.Linear(4 * C, C, bias=False),
        }) for _ in range(c["n_layer"]))
        self.norm = nn.LayerNorm(C, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        """Mean loss of predicting y (B, T) from x (B, T), in nats per token."""
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]  # (B, T, C)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](h)).chunk(3, dim=2)  # each (B, T, C)
            q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # (B, T, C)
            h = h + block["proj"](a)
            h = h + block["down"](F.gelu(block["up"](block["norm2"](h))))
        logits = self.norm(h) @ self.tokens.weight.T  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def shape_config(shape, objective="ar"):
    """The config of train.py for a shape, and its vocab_size V."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "vocab_size")
    c = dict(zip(names, SHAPES[shape][1:], strict=True))
    return make_config("laptop", objective=objective, **{k: c[k] for k in names[:-1]}) | {"vocab_size": c["vocab_size"]}


def reference_step(c, device, dtype):
    """(model, a function that takes one training step) of the reference."""
    model, rng = Reference(c).to(device), np.random.default_rng(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False)
    file = tempfile.NamedTemporaryFile(suffix=".bin")
    np.random.default_rng(0).integers(c["vocab_size"], size=UNIQUE).astype(np.uint16).tofile(file.name)
    T = c["block_size"]

    def step():
        data = np.memmap(file.name, dtype=np.uint16, mode="r")
        starts = rng.integers(0, len(data) - T, c["batch_size"])
        x = torch.stack([torch.from_numpy(data[i: i + T].astype(np.int64)) for i in starts]).to(device)
        y = torch.stack([torch.from_numpy(data[i + 1: i + 1 + T].astype(np.int64)) for i in starts]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def our_step(c, device, dtype, optimizer, fuse):
    """(model, a function that takes one training step) as train.train does it; fuse: with its torch.compile."""
    model = make_model(c).to(device)
    tokens = torch.randint(c["vocab_size"], (UNIQUE,), device=device)
    optimizers = make_optimizers(model, optimizer, 1e-3, c["weight_decay"])
    network = accelerate(model, get_batch(c, tokens, 0)[0], fuse, dtype)
    average = copy.deepcopy(model)
    loss_sum, done = torch.tensor(0.0, dtype=torch.float64, device=device), 0

    def step():
        nonlocal loss_sum, done
        inputs, weight = get_batch(c, tokens, done)
        with precision(device, dtype):
            loss = network(**inputs)
        (weight * loss).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        descend(optimizers, 1e-3)
        update_average(average, model, 0.01)
        loss = loss.detach().mean()
        if device.type == "cpu":
            loss.item(), norm.item()
        loss_sum += loss
        done += 1

    return model, step


def floor_step(c, device, dtype):
    """A function that does of an AR step only what no code can leave out that uses PyTorch's products and attention.

    Three products for each matrix: its output, and the gradients of its input and of itself. Attention, clipping and
    AdamW. Changing weights and their gradients between float32 and a smaller dtype. Adding what attention and the MLP
    give to the residual stream, and their gradients. SiLU and its gradient, and that of the factor it gates.
    """
    B, T, H, C = c["batch_size"], c["block_size"], c["n_head"], c["n_embd"]
    model = make_model(c).to(device)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    products = [[torch.randn(size, device=device, dtype=dtype) for size in ((B * T, i), (o, i), (B * T, o))]
                for o, i in (*shapes, (c["vocab_size"], C))]
    qkv = [torch.randn(B, H, T, C // H, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    stream, added = torch.randn(B * T, C, device=device), torch.randn(B * T, C, device=device, dtype=dtype)
    gates = torch.randn(2, B * T, model.blocks[0].mlp.down.in_features, device=device, dtype=dtype)
    optimizers = make_optimizers(model, "adamw", 1e-3, 0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def step():
        for x, weight, gradient in products:
            x @ weight.T, gradient @ weight, gradient.T @ x
        if dtype != torch.float32:
            for p in model.parameters():
                p.detach().to(dtype).float()
        for _ in range(c["n_layer"]):
            for _ in range(2 * 2):  # attention and the MLP, forward and backward
                torch.add(stream, added, out=stream)
            F.silu(gates[0]), torch.ops.aten.silu_backward(gates[1], gates[0]), gates[0] * gates[1]
        with precision(device, dtype):
            for _ in range(c["n_layer"]):
                y = F.scaled_dot_product_attention(*qkv, is_causal=True)
                torch.autograd.grad(y, qkv, y)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return step


def build(shape, who, dtype, optimizer, fuse, device):
    """(model, step) of one line of the table; who: reference, ar or diffusion."""
    torch.manual_seed(1)
    if who == "reference":
        return reference_step(shape_config(shape), device, dtype)
    return our_step(shape_config(shape, who), device, dtype, optimizer, fuse)


def flops(c, who, parameters):
    """FLOPs of a training step: see FLOP/s above."""
    L, C, T, tokens = c["n_layer"], c["n_embd"], c["block_size"], c["batch_size"] * c["block_size"]
    scored = c["batch_size"] * (T + 1) // 2 if who == "diffusion" else tokens
    with torch.device("meta"):
        mlp = sum(p.numel() for p in make_model(c).blocks[-1].mlp.parameters())
    return (6 * parameters + 12 * L * C * T) * tokens - 6 * (c["vocab_size"] * C + mlp) * (tokens - scored)


def child_memory(shape, *variant):
    """Bytes that two steps add to the peak memory of this process, which must be fresh; the CPU only."""
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    build("tiny", *variant, torch.device("cpu"))[1]()  # loads what PyTorch loads on first use
    before, (_, step) = peak(), build(shape, *variant, torch.device("cpu"))
    step(), step()
    return peak() - before


def peak_memory(fork, device, *variant):
    """Bytes that two steps of a variant add to the peak memory: of a process on a CPU, allocated on a GPU."""
    if device.type == "cpu":
        with fork.Pool(1) as pool:
            return pool.apply(child_memory, variant)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _, step = build(*variant, device)
    step(), step()
    return torch.cuda.max_memory_allocated(device) - before


def matrix_product(device, dtype):
    """A function that multiplies two large square matrices, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def evaluations(shape, device, dtype):
    """The lines of a shape beside training, as dicts with call, tokens, FLOPs: evaluation, and sampling of one text."""
    for who in ("ar", "diffusion"):
        torch.manual_seed(1)
        c = shape_config(shape, who)
        T, V, model = c["block_size"], c["vocab_size"], make_model(c).to(device).eval()
        blocks = torch.randint(V, (4 * c["batch_size"], T))
        draws = 2 if who == "diffusion" else 1
        work = flops(c, who, model.num_params()) / 3 * 4 * draws
        yield {"what": "evaluate", "who": who, "call": lambda m=model, x=blocks: evaluate(m, x, 2),
               "tokens": draws * blocks.numel(), "flops": work}
        start = torch.zeros(1, 0, dtype=torch.int64)
        if who == "diffusion":
            ways = {f"{n} steps": (sample_diffusion, {"steps": n}) for n in (T, T // 4, T // 16)}
        else:
            ways = {"cache": (sample_ar, {}), "no cache": (sample_ar, {"use_cache": False})}
        for name, (sample, options) in ways.items():
            yield {"what": f"sample, {name}", "who": who, "tokens": T, "flops": None,
                   "call": lambda m=model, s=sample, o=options, n=T, ids=start: s(m, ids, n, **o)}


def measure(rows, repeats, device, least):
    """Call row["call"] of all rows in turns and set row["times"], seconds a call: `repeats` numbers.

    One of them is the mean over as many calls as take `least` seconds; 0: one call, with none before it that goes
    uncounted.
    """
    def timed(row, calls):
        with precision(device, row["torch_dtype"]) if row["what"][0] in "es" else nullcontext():
            begun = time.perf_counter()
            for _ in range(calls):
                row["call"]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - begun) / calls

    for row in rows:
        row["calls"], row["times"] = 1, []
        if least:
            timed(row, 1)  # the first call compiles and allocates
            row["calls"] = max(1, min(100, round(least / timed(row, 1))))
    for repeat in range(repeats):
        for row in rows[:: 1 if repeat % 2 else -1]:  # to and fro, so that nobody always follows the same neighbour
            row["times"].append(timed(row, row["calls"]))


def bench_shape(shape, device, best, fuse, repeats, fork):
    """All lines of one shape: a list of dicts, as they are in the JSON file."""
    torch._dynamo.reset()  # or it would compile a second shape for any shape, and give up after eight networks
    dtypes = [torch.float32] + [best] * (best != torch.float32)
    variants = [(who, dtype, "adamw", fuse) for dtype in dtypes for who in ("reference", "ar", "diffusion")]
    variants += [(who, best, "muon", fuse) for who in ("ar", "diffusion")]
    memory = {v: peak_memory(fork, device, shape, *v) for v in variants}
    rows = []
    for dtype in dtypes:
        call, work = matrix_product(device, dtype)
        rows.append({"what": "product", "who": "machine", "torch_dtype": dtype, "call": call, "flops": work})
    c = shape_config(shape)
    for variant in variants:
        who, dtype, optimizer, _ = variant
        model, step = build(shape, *variant, device)
        n = sum(p.numel() for p in model.parameters())
        rows.append({"what": "train", "who": who, "torch_dtype": dtype, "optimizer": optimizer, "call": step,
                     "parameters": n, "tokens": c["batch_size"] * c["block_size"], "flops": flops(c, who, n),
                     "memory": memory[variant]})
        if who == "ar" and optimizer == "adamw":
            rows.append(rows[-1] | {"who": "floor", "optimizer": "", "memory": None,
                                    "call": floor_step(shape_config(shape, "ar"), device, dtype)})
    measure(rows, repeats, device, least=0.2)
    others = [row | {"torch_dtype": best} for row in evaluations(shape, device, best)]
    measure(others, min(3, repeats), device, least=0)
    rows += others
    find = {(r["what"], r["who"], r["torch_dtype"], r.get("optimizer")): r["times"] for r in rows}
    for row in rows:
        key, times = (row["what"], row["torch_dtype"], row.get("optimizer")), row["times"]
        product = find["product", "machine", row["torch_dtype"], None]
        reference = find.get((key[0], "reference", key[1], "adamw"))
        ar = find.get((key[0], "ar", *key[1:])) if row["who"] == "diffusion" and row["what"] == "train" else None
        row |= {"shape": shape, "dtype": str(row.pop("torch_dtype")).removeprefix("torch."),
                "seconds": statistics.median(times), "quartiles": np.quantile(times, (0.25, 0.75)).tolist(),
                "x_ref": reference and statistics.median(r / t for r, t in zip(reference, times, strict=True)),
                "diffusion_over_ar": ar and statistics.median(t / a for t, a in zip(times, ar, strict=True))}
        row["tokens_per_s"] = row["tokens"] / row["seconds"] if "tokens" in row else None
        row["flops_per_s"] = row["flops"] / row["seconds"] if row["flops"] else None
        row["share_of_peak"] = row["flops_per_s"] / (rows[0 if row["dtype"] == "float32" else 1]["flops"]
                                                     / statistics.median(product)) if row["flops"] else None
        del row["call"], row["calls"]
    return rows


def line(row):
    """One line of the table."""
    def show(value, form, scale=1):
        return "" if value is None else format(value * scale, form)

    low, high = row["quartiles"]
    return [row["shape"], row["what"], row["who"], row["dtype"], row.get("optimizer", ""),
            show(row["seconds"], ".2f", 1e3), f"{low * 1e3:.2f}-{high * 1e3:.2f}", show(row["tokens_per_s"], ",.0f"),
            show(row["flops_per_s"], ",.1f", 1e-9), show(row["share_of_peak"], ".0%"),
            show(row.get("memory"), ",.0f", 1e-6), show(row["x_ref"], ".2f"), show(row["diffusion_over_ar"], ".2f")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="", help=f"some of {', '.join(SHAPES)} [those of the device]")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each training line [5]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="train ours through torch.compile, as train.py --compile does [on a GPU only]: on two CPU "
                        "cores that adds minutes; the reference never is")
    parser.add_argument("--json", metavar="FILE", help="also write every number there")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        device, best, device_line = choose_device(args.device)
        if device.type == "mps":
            raise UserError("--device=mps: neither its memory nor its time is measured here; take --device=cpu")
        shapes = args.shapes.split(",") if args.shapes else [s for s in SHAPES if SHAPES[s][0] == device.type]
        if unknown := [s for s in shapes if s not in SHAPES]:
            raise UserError(f"--shapes={unknown[0]}: choose among {', '.join(SHAPES)}")
        if args.repeats < 1:
            raise UserError(f"--repeats={args.repeats}: it takes at least 1")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fuse = device.type == "cuda" if args.compile is None else args.compile
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch._dynamo", "__main__"])  # what else every fresh process would import anew
    print(f"{device_line}; torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.repeats}"
          f"{', ours compiled' * fuse}")
    widths = [7, 18, 9, 8, 9, 9, 17, 9, 9, 5, 7, 5, 6]
    print("  ".join(f"{name:>{w}}" for name, w in zip(COLUMNS, widths, strict=True)), flush=True)
    rows = []
    for shape in shapes:
        rows += (new := bench_shape(shape, device, best, fuse, args.repeats, fork))
        for row in new:
            print("  ".join(f"{cell:>{w}}" for cell, w in zip(line(row), widths, strict=True)), flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    if args.json:
        machine = {"device": device_line, "processor": platform.processor() or platform.machine(),
                   "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        if device.type == "cuda":
            machine["gpu"] = torch.cuda.get_device_name(device)
        content = {"machine": machine, "compiled": fuse, "shapes": {s: shape_config(s) for s in shapes}, "rows": rows}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
