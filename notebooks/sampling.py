"""What fewer steps cost and save: the table of steps against quality in README and notebook 05.

    python notebooks/sampling.py --ar=out/ar --diffusion=out/diffusion

From a trained run of each objective it draws samples of one block, in every order with T, T/2, T/4, ..., 1
steps, and measures each kind by four numbers that a good text must satisfy together:

  seconds      to write them; cpu_seconds do not count the time in which other programs had the processor
  nll          nats per token under both models: exact for AR, a bound for diffusion. The model that did not
               write a text is the fairer judge of it. Dull and repeated text scores low here;
  distinct4    the share of different ones among all sequences of 4 tokens, finds that out: it falls then
  memorised    the share of sequences of 8 tokens that stand in the training text

Everything is written to notebooks/results/sampling.json, with the command, the seed and the settings. --remask
prints other rows instead: what a sampler that masks written tokens again gains, in the same number of steps.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import UserError, block_losses, evaluate, load_checkpoint, model_from_checkpoint  # noqa: E402
from prepare import load  # noqa: E402
from probe import memorised  # noqa: E402
from sample import pick, sample_ar, sample_diffusion  # noqa: E402
from tasks import gaps, mask_span, mean_interval  # noqa: E402

RESULT = ROOT / "notebooks" / "results" / "sampling.json"


def distinct(ids, n=4):
    """The share of different sequences among all sequences of n tokens in the rows of ids (B, L), in 0..1."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), n, axis=1).reshape(-1, n)
    return len(np.unique(windows, axis=0)) / len(windows)


def quality(ids, models, training):
    """The measurements of samples ids (B, T); models: {"ar": ..., "diffusion": ...}; training: (U,) ids."""
    row = {"distinct4": distinct(ids), "memorised": memorised(ids, training)}
    for name, model in models.items():
        row[f"nll_{name}"], row[f"nll_{name}_stderr"] = evaluate(model, ids, draws=4)
    return row


def write(model, B, seed, steps=0, order="random", use_cache=True, **how):
    """B samples of one block by one model: (ids (B, T), what it took)."""
    T, nothing = model.config.block_size, torch.empty(B, 0, dtype=torch.long)
    how["generator"] = torch.Generator().manual_seed(seed)
    wall, cpu = time.perf_counter(), time.process_time()
    if model.config.objective == "ar":
        ids, when = sample_ar(model, nothing, T, use_cache=use_cache, **how)
    else:
        ids, when = sample_diffusion(model, nothing, T, steps, order, **how)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return ids, {"seconds": wall, "cpu_seconds": cpu, "samples": B, "tokens_per_cpu_second": B * T / cpu,
                 "network_evaluations": int(when.max())}


def halvings(T):
    """T, T/2, T/4, ..., 1."""
    return [T // 2**i for i in range(T.bit_length()) if T // 2**i]


def measure(models, training, held_out, count, seed, orders=("random", "confidence", "left")):
    """All rows of the table: held-out text, AR with and without its cache, diffusion by order and steps."""
    T = models["ar"].config.block_size
    rows = [{"writer": "held-out text"} | quality(held_out[:count], models, training)]
    for use_cache in (True, False):
        ids, took = write(models["ar"], count, seed, use_cache=use_cache)
        rows.append({"writer": "ar", "cache": use_cache} | took | quality(ids, models, training))
        one = write(models["ar"], 1, seed, use_cache=use_cache)[1]
        rows[-1]["tokens_per_cpu_second_alone"] = one["tokens_per_cpu_second"]
    for order in orders:
        for steps in halvings(T):
            ids, took = write(models["diffusion"], count, seed, steps, order)
            row = {"writer": "diffusion", "order": order, "steps": steps} | took
            rows.append(row | quality(ids, models, training))
            print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def remask(model, x, steps, sigma, generator):
    """Unmask x (B, T) where it is V in steps forward passes; written tokens may be masked again. Returns ids.

    ReMDM-cap (arXiv 2503.00307): on average the share a of the text is unmasked, and b in the next step. A token
    that was written is masked again with probability min(sigma, (1 - b) / a), and a mask is unmasked with the
    probability that keeps this average. With sigma = 0 it is sample.unmask in random order.
    """
    V, free = model.config.vocab_size, x == model.config.vocab_size
    for left in range(steps, 0, -1):
        a, b = 1 - left / steps, 1 - (left - 1) / steps
        again = min(sigma, (1 - b) / a) if a > 0 else 0
        masked, noise = x == V, torch.rand(x.shape, generator=generator, dtype=torch.float64)
        chosen = masked & (noise < (b - (1 - again) * a) / (1 - a))
        drawn = pick(model.head(model.hidden(x)[chosen]), generator=generator)  # (M,)
        x = x.masked_fill(free & ~masked & (noise < again), V).masked_scatter(chosen, drawn)
    return x


def measure_remasking(models, training, gapped, count, seed):
    """Yield rows of remask: texts of one block, by quality; and the share of held-out words found in gaps.

    gapped: tasks.gaps, {n: (Q, T) ids with a word of n tokens in the middle}.
    """
    model, (V, T) = models["diffusion"], (models["ar"].config.vocab_size, models["ar"].config.block_size)
    for steps in (T, T // 4, T // 8):
        for sigma in (0, 0.01, 0.03, 0.1):
            generator = torch.Generator().manual_seed(seed)
            ids = remask(model, torch.full((count, T), V), steps, sigma, generator)
            row = {"what": "texts", "steps": steps, "sigma": sigma, "samples": count}
            half = mean_interval(block_losses(models["ar"], ids, None, 32).detach().numpy())[1]
            yield row | quality(ids, models, training) | {"nll_ar_interval": half}
    for steps in (8, 32):
        for sigma in (0, 0.03, 0.1, 0.3):
            generator, right = torch.Generator().manual_seed(seed), []
            for n, x in gapped.items():
                begin = (T - n + 1) // 2
                for part in torch.from_numpy(x).split(64):
                    written = remask(model, mask_span(part, begin, begin + n, V), steps, sigma, generator)
                    right.append((written == part).all(1))
            share, half = mean_interval(torch.cat(right).double().numpy())
            row = {"what": "gaps", "steps": steps, "sigma": sigma, "words": sum(map(len, right))}
            yield row | {"found": share, "interval": half}


def table(rows):
    """The rows as lines of Markdown."""
    lines = ["| writer | forward passes | seconds | nats/token: AR | diffusion | distinct 4 | memorised |",
             "|---|---|---|---|---|---|---|"]
    for r in rows:
        name = r["writer"] + (f", {r['order']}" if "order" in r else "")
        name += ", no cache" if r.get("cache") is False else ""
        evaluations = r.get("network_evaluations", "")
        seconds = f"{r['cpu_seconds']:.2f}" if "cpu_seconds" in r else ""
        lines.append(f"| {name} | {evaluations} | {seconds} | = {r['nll_ar']:.2f} | "
                     f"<= {r['nll_diffusion']:.2f} | {r['distinct4']:.1%} | {r['memorised']:.1%} |")
    return "\n".join(lines)


def expanded(word):
    """A path from the command line: in --flag=~/x a shell leaves the ~."""
    return Path(word).expanduser()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ar", type=expanded, default=Path("out/ar"), help="run directory of an AR run [out/ar]")
    parser.add_argument("--diffusion", type=expanded, default=Path("out/diffusion"), help="... [out/diffusion]")
    parser.add_argument("--data", help="folder where the data of the runs lie now [where they lay then]")
    parser.add_argument("--count", type=int, default=64, help="samples of every kind [64]")
    parser.add_argument("--seed", type=int, default=1, help="[1]")
    parser.add_argument("--remask", action="store_true", help="print rows of a sampler that masks again")
    parser.add_argument("--json", type=expanded, default=RESULT, help="[notebooks/results/sampling.json]")
    args = parser.parse_args(argv)
    try:
        saved = {name: load_checkpoint(getattr(args, name) / "best.pt") for name in ("ar", "diffusion")}
        models = {name: model_from_checkpoint(state) for name, state in saved.items()}
        configs = {name: state["config"] for name, state in saved.items()}
        c = configs["diffusion"]
        if args.count < 1:
            raise UserError(f"--count={args.count}: it must be at least 1")
        args.json.parent.mkdir(parents=True, exist_ok=True)
        if args.json.is_dir() or not os.access(args.json.parent, os.W_OK):
            raise UserError(f"--json={args.json}: no file can be written there")
        if [configs[name]["objective"] for name in configs] != list(configs):
            raise UserError("--ar takes an AR run and --diffusion a diffusion run")
        same = ("data_sha256", "block_size", "unique_tokens", "split")
        if any(configs["ar"][name] != c[name] for name in same):
            raise UserError(f"the two runs can not be compared, they differ in one of {', '.join(same)}")
        data, T = load(args.data or ROOT / c["data"], c["data_sha256"]), c["block_size"]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # several would wait for each other, and processor seconds count the waiting
    split = torch.from_numpy(data.splits[c["split"]].astype(np.int64))
    blocks = split[:len(split) // T * T].view(-1, T)
    held_out = blocks[torch.linspace(0, len(blocks) - 1, args.count).long()]
    training = data.splits["train"][:c["unique_tokens"]]
    flags = [f"--data={args.data}"] * bool(args.data) + ["--remask"] * args.remask
    command = shlex.join(["python", "notebooks/sampling.py", f"--ar={args.ar}", f"--diffusion={args.diffusion}",
                          f"--count={args.count}", f"--seed={args.seed}", *flags])
    if args.remask:
        for row in measure_remasking(models, training, gaps(data, c["split"], T), args.count, args.seed):
            print(json.dumps(row | {"command": command}), flush=True)
        return 0
    rows = measure(models, training, held_out, args.count, args.seed)
    told = ("command", "seed", "objective", "parameters", "block_size", "unique_tokens", "epochs", "split")
    runs = {name: {"step": saved[name]["state"]["step"]} | {key: config[key] for key in told}
            for name, config in configs.items()}
    result = {"command": command, "seed": args.seed, "temperature": 1.0, "checkpoint": "best",
              "threads": torch.get_num_threads(), "runs": runs, "rows": rows,
              "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}}
    print(table(rows))
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
