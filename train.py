"""Train a GPT for many epochs on a small corpus, left to right or by filling in masks.

    python train.py --objective=diffusion --epochs=100
    python train.py --objective=ar --epochs=100

Everything random is a function of the seed and of where the run is: an epoch's order of (seed, epoch), masks and
dropout of (seed, step). There is no random state to save, a resumed run is the run that was never interrupted, and both
objectives start from the same weights and meet the same batches in the same order.
"""

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

FLAGS = {
    # name: (type, laptop, gpu, what is allowed: the choices or the least value, help)
    "objective": (str, "diffusion", "diffusion", ("ar", "diffusion"), "ar: the next token; diffusion: fill in masks"),
    "data": (str, "data/sotu-bpe512", "data/sotu-bpe4096", None, "folder that prepare.py made"),
    "unique_tokens": (int, 65536, 0, 0, "U: train on the first U tokens only; 0: on all"),
    "epochs": (float, 100.0, 200.0, 1e-6, "passes over the unique tokens"),
    "seed": (int, 1, 1, 0, "of the weights, the order of the data, the masks and dropout"),
    "n_layer": (int, 4, 12, 1, "transformer blocks"),
    "n_head": (int, 2, 6, 1, "attention heads"),
    "n_embd": (int, 128, 384, 1, "C, channels"),
    "block_size": (int, 128, 256, 1, "T, tokens per block"),
    "rope_base": (float, 20.0, 20.0, 1.01, "base of the rotary wavelengths"),
    "batch_size": (int, 16, 64, 2, "B, blocks per step; even, as masks are drawn in pairs"),
    "optimizer": (str, "muon", "muon", ("adamw", "muon"), "muon: for matrices, with adamw for the rest"),
    "lr": (float, 2e-3, 2e-3, 1e-9, "peak learning rate, after 1 % of the steps; then a cosine down to a tenth"),
    "weight_decay": (float, 0.1, 0.1, 0, "decoupled, on the matrices and the embedding"),
    "dropout": (float, 0.0, 0.0, 0, "on the embedding, the attention and both branches of every block"),
    "hide": (float, 0.0, 0.0, 0, "ar: share of the tokens it reads that are hidden, behind the start symbol"),
    "replace": (float, 0.0, 0.0, 0, "share of the tokens it reads that are replaced by random ones"),
    "eval_every": (float, 0.0, 0.0, 0, "epochs between evaluations; 0: after 1, 1.5, 2, 3, 4, 6, 8, 12, ... epochs"),
    "eval_blocks": (int, 512, 0, 0, "blocks to evaluate, spread evenly over the held-out split; 0: all of it"),
    "final_passes": (int, 24, 8, 2, "masks drawn for every block after the last step (diffusion); before it, 2"),
    "split": (str, "val", "val", ("val", "tune"), "held-out split: val to report, tune to choose settings by"),
    "device": (str, "auto", "auto", None, "auto, cpu, cuda, cuda:1, ..."),
    "dtype": (str, "auto", "auto", ("auto", "float32", "bfloat16"), "of the matrix products; weights are float32"),
    "compile": (bool, False, True, None, "run through torch.compile"),
    "out": (str, "", "", None, "run directory; default: a new one under out/"),
}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=("laptop", "gpu"), default=argparse.SUPPRESS,
                        help="values for all flags below (default: by device)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this directory")
    parser.add_argument("--eval_only", action="store_true", help="with --resume: score its checkpoints again and end; "
                        "another --split may be named")
    for name, (kind, laptop, gpu, _, text) in FLAGS.items():
        default = f"{laptop}" if laptop == gpu else f"laptop {laptop}, gpu {gpu}"
        extra = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        help_line = f"{text} [{default}]".replace("%", "%%")
        parser.add_argument(f"--{name}", help=help_line, default=argparse.SUPPRESS, **extra)
    return vars(parser.parse_args(argv))


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse(sys.argv[1:])  # help comes at once: importing torch takes a second or two

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
from model import UserError, chain_rule_nll, choose_device, draw_mask, evaluate, load_checkpoint, make_model
from model import make_optimizers, model_from_checkpoint, precision, save_checkpoint, write_atomic

FREE_ON_RESUME = {"device", "compile"}  # what may differ between a run and its resumption
SAVE_SECONDS = 600  # the longest a single process goes without saving


def make_config(preset=None, **given):
    """Every flag of a run: the preset's values (laptop or gpu; by device if None), overridden by the given ones.

    Raises UserError with the value and the remedy.
    """
    if preset is None:
        device = given.get("device", "auto")
        preset = "gpu" if device.startswith("cuda") or device == "auto" and torch.cuda.is_available() else "laptop"
    if preset not in ("laptop", "gpu"):
        raise UserError(f"preset={preset}: choose laptop or gpu")
    if unknown := set(given) - set(FLAGS):
        raise UserError(f"unknown setting {min(unknown)!r}: see python train.py --help")
    config = {name: row[1 if preset == "laptop" else 2] for name, row in FLAGS.items()} | given
    for name, (kind, _, _, allowed, _) in FLAGS.items():
        value = config[name]
        if isinstance(allowed, tuple) and value not in allowed:
            raise UserError(f"--{name}={value}: choose one of {', '.join(allowed)}")
        if kind in (int, float) and not allowed <= value < 2**62:
            raise UserError(f"--{name}={value}: it must be a number from {allowed} to 2^62")
    if config["batch_size"] % 2:
        raise UserError(f"--batch_size={config['batch_size']}: masks are drawn in pairs, so it must be even")
    if config["hide"] + config["replace"] > 1 or config["hide"] and config["objective"] != "ar":
        raise UserError(f"--hide={config['hide']} --replace={config['replace']}: shares of what a network reads, "
                        "together at most 1; and diffusion hides tokens anyway")
    return {"preset": preset} | config


def derive(seed, purpose, *index):
    """A 64-bit seed for one purpose at one place (an epoch or a step), independent of every other."""
    words = [seed, int.from_bytes(purpose.encode(), "big"), *index]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, U, T):
    """Where the blocks of an epoch start, (U // T,): a permutation of the blocks, cut at a random offset.

    The unique tokens are a ring, so that every epoch has the same number of blocks and every token the same chances.
    """
    rng = np.random.default_rng(derive(seed, "order", epoch))
    return (rng.permutation(U // T) * T + rng.integers(U)) % U


def batch_starts(seed, step, U, T, B):
    """Starts of the blocks of a step, (B,): blocks step*B..(step+1)*B of the endless stream of epochs."""
    n = U // T
    return np.array([epoch_order(seed, i // n, U, T)[i % n] for i in range(step * B, (step + 1) * B)])


def send(x, device):
    """A tensor from the CPU to the device. A GPU takes it when it gets there, and nobody waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def get_batch(config, tokens, step, rows=slice(None)):
    """What a step learns from, as arguments of GPT.forward, on the device of tokens (U,): blocks (B, T) and more.

    Diffusion gets masks and their index; either gets what it reads, if some of that is to be hidden or replaced. rows:
    the part of the batch that is wanted, from an even row to an even row.
    """
    seed, B, T, U = config["seed"], config["batch_size"], config["block_size"], len(tokens)
    start = send(torch.from_numpy(batch_starts(seed, step, U, T, B)[rows]), tokens.device)  # (B,)
    x = tokens[(start[:, None] + torch.arange(T, device=tokens.device)) % U]  # (B, T)
    batch = {"x": x}  # [AR] no more than this
    if config["objective"] == "diffusion":
        mask = draw_mask(B, T, torch.Generator().manual_seed(derive(seed, "mask", step)))[rows]  # [DIFFUSION]
        index = mask.flatten().nonzero().squeeze(1)  # counted on the CPU, where that costs no waiting
        batch |= {"mask": send(mask, x.device), "index": send(index, x.device)}
    if config["hide"] + config["replace"]:
        V, rng = config["vocab_size"], np.random.default_rng(derive(seed, "noise", step))
        noise = rng.random((B, T)), rng.integers(V, size=(B, T))
        u, other = (send(torch.from_numpy(values[rows]), x.device) for values in noise)
        batch["seen"] = torch.where(u < config["hide"], V, torch.where(u > 1 - config["replace"], other, x))
    return batch


def compiled(model, batch, device, dtype):
    """The model through torch.compile, tried on a batch; where that fails the model itself, and a line that says so."""
    run = torch.compile(model, options={"fallback_random": True})  # dropout drops what it drops without
    try:
        with precision(device, dtype):
            run(**batch).mean().backward()
    except Exception as error:  # no compiler, no backend for this system, ...: all mean the same to us
        reason = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        print(f"--compile does not work here: {': '.join(reason)}")
        run = model
    model.zero_grad()
    return run


def learning_rate(step, steps, peak):
    """Linear warm-up over 1 % of the steps, then a cosine down to a tenth of the peak (as in the paper)."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def read_log(path):
    """The records of a log.jsonl up to the first torn line (a crash can tear only the last)."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_losses(records, path):
    """loss.png: training and validation loss against epochs (FLOPs above), the lowest validation loss marked."""
    from matplotlib.figure import Figure  # not pyplot, whose choice of a window or a notebook is the caller's
    config, rows = records[0]["config"], records[1:]
    best, scale = min(rows, key=lambda r: r["val_loss"]), rows[-1]["flops"] / rows[-1]["epoch"]
    bound = " (bound)" if config["objective"] == "diffusion" else ""
    fig = Figure(figsize=(7, 4.5), layout="constrained")
    ax = fig.subplots()
    for name, style in (("train", "--"), ("val", "-")):
        ax.plot([r["epoch"] for r in rows], [r[f"{name}_loss"] for r in rows], style, color="black", label=name + bound)
    ax.plot(best["epoch"], best["val_loss"], "o", color="black",
            label=f"lowest: {best['val_loss']:.3f} at epoch {best['epoch']:.4g}")
    ax.axhline(config["unigram_entropy"], color="0.7", label="unigram entropy")
    ax.set(xscale="log", xlabel="epochs", ylabel="nats per token", title=f"{config['objective']}, "
           f"{config['parameters'] / 1e6:.2g}M parameters, {config['unique_tokens']:,} unique tokens")
    ax.secondary_xaxis("top", functions=(lambda e: e * scale, lambda f: f / scale)).set_xlabel("FLOPs")
    ax.legend(frameon=False)
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=120))


def open_data(config):
    """The corpus of a run: (Data, training tokens (U,), held-out blocks (N, T)), the tokens as int64 tensors.

    Prepares the preset's own corpus if it is not there yet. Raises UserError when sizes do not fit.
    """
    folder, T, B = Path(config["data"]), config["block_size"], config["batch_size"]
    default = FLAGS["data"][1 if config["preset"] == "laptop" else 2]
    if not folder.exists() and config["data"] == default:
        print(f"{folder} is not there yet: preparing the default corpus")
        size = default.split("bpe")[1]
        prepare.prepare(vocab_size=int(size), out=folder, command=f"python prepare.py --vocab_size={size}")
    data = prepare.load(folder, config.get("data_sha256"))
    there, U = len(data.splits["train"]), config["unique_tokens"] or len(data.splits["train"])
    if U > there:
        raise UserError(f"--unique_tokens={U}: {folder} has {there:,} training tokens; ask for fewer, or 0 for all")
    if U // T < B:
        raise UserError(f"--batch_size={B} times --block_size={T} is {B * T:,} tokens, there are {U:,}: lower one")
    n = len(data.splits[config["split"]]) // T
    if n < 1:
        raise UserError(f"--block_size={T}: the held-out split {config['split']!r} of {folder} has only "
                        f"{len(data.splits[config['split']])} tokens; use shorter blocks or more text")
    chosen = np.linspace(0, n - 1, min(n, config["eval_blocks"] or n)).round().astype(int)
    held_out = np.asarray(data.splits[config["split"]][: n * T]).reshape(n, T)[chosen].astype(np.int64)
    return data, torch.from_numpy(data.splits["train"][:U].astype(np.int64)), torch.from_numpy(held_out)


def size_of(blocks, data):
    """How much text is evaluated: its tokens and their bytes."""
    return {"eval_tokens": blocks.numel(), "eval_bytes": int(data.tokenizer.token_bytes()[blocks.numpy()].sum())}


def describe(config, data, tokens, blocks, model):
    """The config of a run with all that is known before its first step: the log's first record."""
    counts = torch.bincount(blocks.flatten()).double()
    p = counts[counts > 0] / counts.sum()
    U, B, T = len(tokens), config["batch_size"], config["block_size"]
    steps = max(1, round(config["epochs"] * (U // T) / B))
    return config | {
        "data_sha256": prepare.fingerprint(data), "unique_tokens": U, "vocab_size": data.tokenizer.vocab_size,
        "parameters": model.num_params(), "steps": steps, "flops": 6 * model.num_params() * steps * B * T,
        "critical_flops": 2.12e15 * (U / 1e6) ** 2.174, "unigram_entropy": -(p * p.log()).sum().item(),
        **size_of(blocks, data),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}}


def print_header(c, device_line):
    """The run in a few lines: what is learned from what, how much work it is, what the paper's law says of it."""
    per_epoch = c["unique_tokens"] // c["block_size"] / c["batch_size"]
    print(f"{device_line}; preset {c['preset']}\n"
          f"objective {c['objective']}, {c['parameters'] / 1e6:.2f}M parameters, {c['optimizer']} lr {c['lr']:g}, "
          f"weight decay {c['weight_decay']:g}, dropout {c['dropout']:g}, seed {c['seed']}\n"
          f"{c['unique_tokens']:,} unique tokens of {c['data']}, {c['epochs']:g} epochs of {per_epoch:.1f} steps of "
          f"{c['batch_size']} x {c['block_size']} tokens: {c['steps']:,} steps\n"
          f"{c['flops']:.2e} FLOPs, {c['flops'] / c['critical_flops']:.2g} times the paper's critical compute for this "
          f"many tokens ({c['critical_flops']:.1e}, extrapolated)\n"
          f"evaluating {c['eval_tokens']:,} tokens of {c['split']}; knowing their frequencies only would score "
          f"{c['unigram_entropy']:.3f} nats per token (unigram entropy)\nrun directory {c['out']}", flush=True)


class Interrupted(Exception):
    """A signal asked the run to end, and it has been saved; args: the signal's number, the run directory."""


def show(record, objective, name="val"):
    """One line for one evaluation; the sign says whether the number is exact or a bound."""
    sign, error = ("<=", f" ± {record[f'{name}_stderr']:.3f}") if objective == "diffusion" else ("=", "")
    return f"val {sign} {record[f'{name}_loss']:.3f}{error} nats/token, {sign} {record[f'{name}_bpb']:.3f} bits/byte"


def evaluation_steps(config):
    """The steps after which to evaluate: every eval_every epochs, or after 1, 1.5, 2, 3, 4, 6, ...; and the last."""
    steps, per_epoch = config["steps"], config["unique_tokens"] // config["block_size"] / config["batch_size"]
    if config["eval_every"]:
        every = max(1, config["eval_every"] * per_epoch)
        due = {round(every * i) for i in range(1, int(steps / every) + 1)}
    else:
        due = {round(per_epoch * m * 2**j) for j in range(32) for m in (1, 1.5)}
    return {step for step in due if 0 < step < steps} | {steps}


def score(config, model, blocks, device, dtype, passes=2):
    """The held-out loss of a model: nats per token, its standard error, bits per byte."""
    with precision(device, dtype):
        loss, stderr = evaluate(model, blocks, passes)
    return {"loss": loss, "stderr": stderr, "bpb": loss * config["eval_tokens"] / config["eval_bytes"] / math.log(2)}


def agreed(number, device):
    """The largest of the numbers that the processes bring, the same for all of them."""
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


@contextlib.contextmanager
def run_directory(out):
    """Make the directory of a run and hold it; the lock goes when the process does, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another run: wait for it, or choose another --out") from None
        yield


def join_processes(config):
    """(rank, world) of this process under torchrun, (0, 1) without. Raises UserError if the batch can not be shared."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config["batch_size"] % (2 * world):
        raise UserError(f"--batch_size={config['batch_size']}: {world} processes need a multiple of {2 * world}")
    if world > 1:
        if gpu := torch.cuda.is_available() and config["device"] in ("auto", "cuda"):
            if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
                raise UserError(f"process {local} has no GPU, there are {torch.cuda.device_count()}: start fewer")
            torch.cuda.set_device(local)
        if not dist.is_initialized():  # an hour, as the others wait while rank 0 prepares a corpus or evaluates
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1))
    return rank, world


def train(config, saved=None, stop=lambda: 0, batch=None):
    """Run what make_config describes, or go on from a saved checkpoint; return the log (rank 0), a list of records.

    stop() is asked after every step and returns the number of a signal to end on, or 0. batch: in place of get_batch,
    for experiments. Under torchrun every process computes its rows of each batch; rank 0 alone evaluates and writes.
    Raises UserError for what the caller can mend, prepare.DataError for the corpus, Interrupted after a signal.
    """
    config, batch = dict(config), batch or get_batch
    if config.setdefault("batch", batch.__name__) != batch.__name__:
        raise UserError(f"this run was begun with other batches, {config['batch']}: resume it with the same script")
    rank, world = join_processes(config)
    device, dtype, device_line = choose_device(config["device"], config["dtype"])
    if rank:
        dist.barrier()  # rank 0 first: it prepares a corpus that is not there yet
    data, tokens, blocks = open_data(config)
    if world > 1 and not rank:
        dist.barrier()
    out = Path(config["out"] or new_run_dir(config["objective"]))
    torch.manual_seed(derive(config["seed"], "weights"))
    try:
        model = make_model(config | {"vocab_size": data.tokenizer.vocab_size})
    except RuntimeError as error:
        raise UserError(f"no memory for {config['n_layer']} layers of {config['n_embd']} channels: {error}") from None
    if saved:
        state = saved["state"]
        model.load_state_dict(saved["model"])
    else:
        state = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_steps": 0, "best": None}
        config = config | {"out": str(out), "dtype": str(dtype).removeprefix("torch."), "processes": world}
        config = describe(config, data, tokens, blocks, model)
    model.to(device)
    tokens = tokens.to(device)
    optimizers = make_optimizers(model, config["optimizer"], config["lr"], config["weight_decay"])
    for optimizer, values in zip(optimizers, saved["optimizers"] if saved else [], strict=bool(saved)):
        optimizer.load_state_dict(values)
    steps, B, due = config["steps"], config["batch_size"], evaluation_steps(config)
    rows, per_step = slice(rank * B // world, (rank + 1) * B // world), B * config["block_size"]
    run = compiled(model, batch(config, tokens, 0, rows), device, dtype) if config["compile"] else model
    if world > 1:
        run = torch.nn.parallel.DistributedDataParallel(run)
    loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=device)  # stays there: to read it is to wait
    started, begun = time.perf_counter() - state["seconds"], state["step"]
    since = time.perf_counter(), begun  # the last pause of training, to tell its speed

    def save(name):
        state.update(loss_sum=loss_sum.item(), seconds=time.perf_counter() - started)
        content = {"config": config, "tokenizer": data.tokenizer.spec, "state": state, "model": model.state_dict()}
        if name == "last.pt":
            content["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(out / name, content)

    def check(**values):
        if not all(map(math.isfinite, values.values())):
            raise UserError(f"{', '.join(f'{name} {value:.4g}' for name, value in values.items())} at step "
                            f"{state['step']}, learning rate {lr:.2g}: begin anew with --lr={config['lr'] / 3:.2g}; "
                            f"{out / 'last.pt'} holds the last good state")

    def report():
        """Evaluate, keep the best checkpoint, log one record."""
        seen = state["step"] * per_step
        record = {"epoch": seen / (len(tokens) // config["block_size"] * config["block_size"]),
                  "step": state["step"], "tokens": seen, "flops": 6 * config["parameters"] * seen,
                  "train_loss": loss_sum.item() / state["loss_steps"],
                  **{f"val_{k}": v for k, v in score(config, model, blocks, device, dtype).items()}, "lr": lr}
        check(train_loss=record["train_loss"], val_loss=record["val_loss"])
        loss_sum.zero_()
        state["loss_steps"] = 0
        if state["best"] is None or record["val_loss"] < state["best"]["val_loss"]:
            state["best"] = dict(record)
            save("best.pt")
        if state["step"] == steps:  # once more with more masks, alike for the final and the best model
            final = best = score(config, model, blocks, device, dtype, config["final_passes"])
            if state["best"]["step"] < steps:
                best = model_from_checkpoint(load_checkpoint(out / "best.pt")).to(device)
                best = score(config, best, blocks, device, dtype, config["final_passes"])
            record |= {f"final_{k}": v for k, v in final.items()} | {f"best_{k}": v for k, v in best.items()}
        record["seconds"] = round(time.perf_counter() - started, 1)
        records.append(record)
        with open(out / "log.jsonl", "ab") as f:
            f.write(json.dumps(record).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        bar.write(f"epoch {record['epoch']:7.2f}  train {record['train_loss']:.3f}  "
                  + show(record, config["objective"]))

    with (contextlib.nullcontext() if rank else run_directory(out),
          tqdm(total=steps * per_step, initial=begun * per_step, unit="tok", unit_scale=True,
               disable=True if rank else None, dynamic_ncols=True) as bar):
        if not rank:
            print_header(config, device_line)
            if not saved:
                if (out / "log.jsonl").exists() or (out / "last.pt").exists():
                    raise UserError(f"{out} holds a run: go on with --resume={out}, or choose another --out")
                save("last.pt")  # before the log, so that whatever has a log can be resumed
            logged = {r["step"]: r for r in read_log(out / "log.jsonl") if isinstance(r, dict) and "step" in r}
            if state["best"] and state["best"]["step"] not in logged:
                raise UserError(f"{out / 'log.jsonl'} lacks what was evaluated before step {begun}: put it back")
            records = [{"config": config}] + [row for step, row in logged.items() if step <= begun]
            write_atomic(out / "log.jsonl", lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in records))
        while state["step"] < steps:
            lr = learning_rate(state["step"], steps, config["lr"])
            if config["dropout"]:
                torch.manual_seed(derive(config["seed"], "dropout", state["step"], rank))
            with precision(device, dtype):
                loss = run(**batch(config, tokens, state["step"], rows)).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            look = device.type == "cpu" or state["step"] % 50 == 0  # a GPU has to wait for an answer: not every step
            if look:
                check(loss=loss.item(), gradient_norm=norm.item())
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
            state["step"] += 1
            state["loss_steps"] += 1
            bar.update(per_step)
            if state["step"] == begun + 20 and not rank:
                minutes = (time.perf_counter() - since[0]) / (begun + 20 - since[1]) * (steps - begun - 20) / 60
                bar.write(f"about {minutes:.1f} minutes to go, evaluations not counted")
            signum = stop()
            if world > 1:  # all end after the same step
                signum = agreed(signum, device) if look else 0
            if state["step"] in due or signum:
                if world > 1:
                    dist.all_reduce(loss_sum)
                    loss_sum /= world
                check(loss=loss_sum.item(), gradient_norm=norm.item())
                if rank:
                    loss_sum.zero_()
                else:
                    if state["step"] in due:
                        report()
                    save("last.pt")
                since = time.perf_counter(), state["step"]
            elif world == 1 and time.perf_counter() - since[0] > SAVE_SECONDS:
                save("last.pt")
                since = time.perf_counter(), state["step"]
            if signum and state["step"] < steps:
                raise Interrupted(signum, out)
    if rank:
        return []
    plot_losses(records, out / "loss.png")
    return records


def reopen(run, given, name="last.pt", free=FREE_ON_RESUME):
    """The config and the checkpoint to resume a run with. Raises UserError if a flag that is not free contradicts."""
    saved = load_checkpoint(Path(run) / name)
    config = saved["config"]
    if missing := set(FLAGS) - set(config):
        raise UserError(f"{run}/{name} knows no --{min(missing)}: an older version wrote it, train it anew")
    if name == "last.pt" and "optimizers" not in saved:
        raise UserError(f"{run}/last.pt has no optimizer state, so nothing can go on from it: is it a copy of best.pt?")
    different = [f"--{key}={value} (the run has {config[key]})" for key, value in given.items()
                 if key not in free and value != config[key]]
    if different:
        raise UserError(f"{run} can not go on with other settings: {', '.join(different)}; leave them out")
    return config | {key: given[key] for key in free & set(given)} | {"out": str(run)}, saved


def score_again(run, given):
    """Evaluate the best and the last checkpoint of a run as after its last step, and print a JSON line for each.

    With another --split than the run's: settings and the best epoch chosen on tune can be reported on val. For
    diffusion also left_to_right, its exact loss when the tokens are revealed from left to right (T passes a block).
    """
    step, result = None, {}
    for name in ("best", "last"):
        config, saved = reopen(run, given, f"{name}.pt", FREE_ON_RESUME | {"split"})
        if saved["state"]["step"] != step:  # or the best is the last: told again, not computed again
            step = saved["state"]["step"]
            device, dtype, _ = choose_device(config["device"], config["dtype"])
            data, _, blocks = open_data(config)
            config |= size_of(blocks, data)
            model = model_from_checkpoint(saved).to(device)
            result = score(config, model, blocks, device, dtype, config["final_passes"])
            if config["objective"] == "diffusion":
                with precision(device, dtype):
                    exact = [chain_rule_nll(model, x.to(device)) for x in blocks.split(64)]
                result["left_to_right"] = torch.cat(exact).mean().item()
        print(json.dumps({"run": str(run), "checkpoint": name, "step": step, "split": config["split"], **result}))


def new_run_dir(objective):
    """out/ar, out/ar-2, ...: the first that is not taken."""
    paths = (Path("out") / (f"{objective}-{i}" if i > 1 else objective) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


def main(argv=None, batch=None):
    given = parse(argv)
    run, eval_only = given.pop("resume"), given.pop("eval_only")
    signals = []

    def note(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the first lets the step end and saves, a second ends at once

    try:
        if run == "":
            raise UserError("--resume= names no run: is a variable empty?")
        if eval_only:
            if not run:
                raise UserError("--eval_only scores a run that is there: name it with --resume=out/NAME")
            score_again(run, given)
            return 0
        config, saved = reopen(run, given) if run else (make_config(**given), None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)
        records = train(config, saved, stop=lambda: signals[0] if signals else 0, batch=batch)
    except (UserError, prepare.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}\nwhat was written before is whole: mend that, then go on with --resume", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        number, out = stopped.args
        if not int(os.environ.get("RANK", 0)):
            print(f"\nsaved; go on with: python train.py --resume={shlex.quote(str(out))}")
        return 128 + number
    except KeyboardInterrupt:  # before the first step, or in --eval_only: there is nothing to save
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        print(f"error: {str(error).strip().partition(chr(10))[0]}\nlikely another process of this run has ended and "
              "took this one along; what was saved is whole: go on with --resume", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not records:  # those of rank 0 tell
        return 0
    objective, last = records[0]["config"]["objective"], records[-1]
    best, out = min(records[1:], key=lambda r: r["val_loss"]), run or records[0]["config"]["out"]
    print(f"best   epoch {best['epoch']:.4g}: {show(last, objective, 'best')}\n"
          f"final  epoch {last['epoch']:.4g}: {show(last, objective, 'final')}\n"
          f"curve in {out}/loss.png; text from it: python sample.py --run={shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # no tidying up: a thread of Gloo's that does so late aborts the process (PyTorch #190489)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
