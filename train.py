"""Train a GPT for many epochs on a small corpus, autoregressively or by masked diffusion.

    python train.py --objective=diffusion --epochs=100
    python train.py --objective=ar --epochs=100

Everything random is a function of the seed and of where the run is: the order of an epoch of (seed, epoch),
masks of (seed, step), dropout of (seed, step, process). So there is no random state to save: with the same
number of threads a resumed run is the run that was never interrupted, and both objectives start from the same
weights and meet the same batches in the same order.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
import sample
from model import UserError, choose_device, evaluate, join_processes, load_checkpoint, make_model
from model import make_optimizers, mask_k, model_from_checkpoint, precision, processes, save_checkpoint
from model import settle_threads, uniform_k, write_atomic

SAVE_SECONDS = 600  # the longest a run goes without saving
SETTLE_SECONDS = 20  # until it looks again how many threads of the CPU are the fastest
FLAGS = {
    # name: (type, laptop, gpu, what is allowed: the choices or the least value, help)
    "objective": (str, "diffusion", "diffusion", ("ar", "diffusion"), "to predict next or masked tokens"),
    "data": (str, "data/sotu-bpe512", "data/sotu-bpe4096", None, "folder that prepare.py made"),
    "unique_tokens": (int, 65536, 0, 0, "U: train on the first U tokens; 0: on all, as for your own text"),
    "epochs": (float, 100.0, 200.0, 1e-6, "how often to go through the unique tokens"),
    "seed": (int, 1, 1, 0, "of the weights, the order of the data, the masks and dropout"),
    "n_layer": (int, 4, 12, 1, "transformer blocks"),
    "n_head": (int, 2, 6, 1, "attention heads"),
    "n_embd": (int, 128, 384, 1, "C, channels"),
    "block_size": (int, 128, 256, 1, "T, tokens per block"),
    "rope_base": (float, 20.0, 20.0, 1.01, "base of the rotary wavelengths"),
    "batch_size": (int, 16, 64, 2, "B, blocks per step; even, as masks are drawn in pairs"),
    "optimizer": (str, "muon", "muon", ("adamw", "muon"), "muon: matrices by it, the rest by adamw"),
    "lr": (float, 2e-3, 2e-3, 1e-9, "peak learning rate, after 1 % of the steps; then a cosine to a tenth"),
    "weight_decay": (float, 0.5, 0.5, 0, "decoupled, on the matrices and the embedding"),
    "dropout": (float, 0.0, 0.0, 0, "on the embedding, the attention and both branches of every block"),
    "replace": (float, 0.0, 0.0, 0, "share of the tokens it reads that are replaced by random ones"),
    "mask_weight": (float, 1.5, 1.5, 0, "a masked token weighs min(1/t, this) in training; 0: 1/t (bound)"),
    "ema": (float, 0.2, 0.2, 0, "share of the steps so far that the EMA spans, at most 0.8; 0: no EMA"),
    "eval_every": (float, 0.0, 0.0, 0, "epochs between evaluations; 0: after 1, 1.25, 1.5, 1.75, 2, ..."),
    "eval_blocks": (int, 512, 0, 0, "blocks to evaluate, spread evenly over the held-out split; 0: all"),
    "final_draws": (int, 24, 8, 2, "mask draws a block after the last step (diffusion); before it, 2"),
    "split": (str, "val", "val", ("val", "tune"), "held-out split: val to report, tune to choose settings"),
    "device": (str, "auto", "auto", None, "auto, cpu, cuda, cuda:1, mps, ..."),
    "dtype": (str, "auto", "auto", ("auto", "float32", "bfloat16"), "of matrix products, not of weights"),
    "compile": (bool, False, True, None, "run through torch.compile"),
    "init": (str, "", "", None, "begin with the weights (best.pt) of the run in this directory"),
    "out": (str, "", "", None, "run directory; default: a new one under out/"),
}
MOST = {"dropout": 0.99, "replace": 1, "ema": 0.8}  # the greatest values: all are shares
# What runs that are older than a flag did in its place. A new flag gets a value here: so they can be resumed.
BEFORE = {"batch": "get_batch", "replace": 0.0, "final_draws": 24, "init": "", "mask_weight": 0.0, "ema": 0.0}


def derive(seed, purpose, *index):
    """A 63-bit seed for one purpose at one place (an epoch or a step), independent of every other."""
    words = [seed, int.from_bytes(purpose.encode(), "big"), *index]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, U, T):
    """Where the blocks of an epoch start, (U // T,), in random order.

    The unique tokens are a ring, cut into blocks from a random offset on: every epoch has the same number of
    blocks and every token the same chance.
    """
    rng = np.random.default_rng(derive(seed, "order", epoch))
    return (rng.permutation(U // T) * T + rng.integers(U)) % U


def batch_starts(seed, step, U, T, B):
    """Starts of the blocks of a step, (B,): blocks step*B..(step+1)*B of the endless stream of epochs."""
    n = U // T
    return np.array([epoch_order(seed, i // n, U, T)[i % n] for i in range(step * B, (step + 1) * B)])


def draw_mask(B, T, generator, mask_weight=0.0):  # [DIFFUSION]
    """Training masks of B blocks, (B, T) bool, and the weight of each in the loss that is descended, (B,).

    A weight multiplies the mean over the k masked tokens of a block. With k uniform on 1..T, weight 1 is the
    bound: with t = k/T each masked token weighs 1/t. Where few are masked each counts for much, which makes
    the gradient noisy. If it weighs min(1/t, mask_weight), this is no bound, and the network learns sooner.
    k with another probability P(k) and weight 1 / (T P(k)) would be the bound again.
    Whatever stands here, evaluate draws its own masks. The train_loss of the log is the mean without weights:
    an estimate of the bound while k is uniform on 1..T (a block in which nothing is masked would count 0).
    """
    k = uniform_k(B, T, generator)
    return mask_k(k, T, generator), clipped(k, T, mask_weight)


def clipped(k, T, mask_weight):  # [DIFFUSION]
    """The weights (B,) of blocks with k (B,) masked tokens: min(1, mask_weight t), t = k/T; 1 without it."""
    return (mask_weight * k / T).clamp(max=1) if mask_weight else torch.ones(len(k))


def get_batch(config, tokens, step, rows=slice(None)):
    """What a step learns from: the arguments of GPT.forward as a dict, and the weight of each block, (B,).

    tokens: (U,) ids on the device. rows: the part of the batch that this process takes.
    """
    seed, B, T, U = config["seed"], config["batch_size"], config["block_size"], len(tokens)
    start = send(torch.from_numpy(batch_starts(seed, step, U, T, B)[rows]), tokens.device)  # (B,)
    x = tokens[(start[:, None] + torch.arange(T, device=tokens.device)) % U]  # (B, T)
    inputs, weight = {"x": x}, torch.ones(B)  # [AR] takes no more
    if config["replace"]:
        inputs["read"] = replace_tokens(config, x, step, rows)
    if config["objective"] == "diffusion":  # [DIFFUSION] all of this
        generator = torch.Generator().manual_seed(derive(seed, "mask", step))
        mask, weight = draw_mask(B, T, generator, config["mask_weight"])
        if weight.shape != (B,):
            raise ValueError(f"draw_mask gave a weight of shape {tuple(weight.shape)}, it takes ({B},)")
        at = mask[rows].flatten().nonzero().squeeze(1)  # (M,), on the CPU: a GPU would stall
        inputs |= {"mask": send(mask[rows], x.device), "at": send(at, x.device)}
    return inputs, send(weight[rows].float(), x.device)


def replace_tokens(config, x, step, rows):
    """x (B, T) with a share of its tokens replaced by random ones: read in its place, it regularises."""
    rng = np.random.default_rng(derive(config["seed"], "noise", step))
    shape = config["batch_size"], config["block_size"]
    u, other = rng.random(shape), rng.integers(config["vocab_size"], size=shape)
    chosen = send(torch.from_numpy(u[rows] > 1 - config["replace"]), x.device)  # (B, T)
    return torch.where(chosen, send(torch.from_numpy(other[rows]), x.device), x)


def send(x, device):
    """A tensor from the CPU to the device. A GPU copies it from pinned memory while the CPU goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def learning_rate(step, steps, peak):
    """Linear warm-up over 1 % of the steps, then a cosine down to a tenth of the peak (as in the paper)."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def descend(optimizers, lr):
    """One step of every optimizer with this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def update_average(average, model, rate):
    """Move the weights of average towards those of model by rate (EMA, exponential moving average)."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, rate)


def train(config, saved=None, stop=lambda: False, get_batch=get_batch):
    """Run what make_config describes, or go on from a saved checkpoint; return the log, a list of records.

    stop() is asked after every step: if it says so, the run saves and ends. get_batch: another one, for
    experiments. Under torchrun every process computes its rows of each batch; rank 0 evaluates and writes.
    Raises UserError for what the caller can mend, prepare.DataError for the corpus.
    """
    rank, world = join_processes(config["device"], config["batch_size"])
    device, dtype, device_line = choose_device(config["device"], config["dtype"])
    data, tokens, blocks = prepare.open_data(config)  # training tokens (U,), held-out blocks (N, T)
    torch.manual_seed(derive(config["seed"], "weights"))
    model = make_model(config | {"vocab_size": data.tokenizer.vocab_size})
    if saved is None:  # else the config has what describe adds: the number of steps, the vocabulary, ...
        sample.take_weights(model, config["init"], data.tokenizer)
        config = describe(config, data, tokens, blocks, model, dtype, get_batch)
    model, tokens = model.to(device), tokens.to(device)
    optimizers = make_optimizers(model, config["optimizer"], config["lr"], config["weight_decay"])
    rows = slice(rank * config["batch_size"] // world, (rank + 1) * config["batch_size"] // world)
    due = evaluation_steps(config)

    with Run(config, saved, model, optimizers, data.tokenizer, blocks, device_line) as run:
        network = run.ready(get_batch(config, tokens, 0, rows)[0], dtype)  # the model, compiled if asked for
        for step in range(run.step, config["steps"]):
            inputs, weight = get_batch(config, tokens, step, rows)
            torch.manual_seed(derive(config["seed"], "dropout", step, rank))  # a resumed run drops the same
            with precision(device, dtype):
                loss = network(**inputs)  # (B,) of each block, in nats per token
            (weight * loss).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descend(optimizers, learning_rate(step, config["steps"], config["lr"]))
            if config["ema"]:  # run.scored, the copy that is evaluated: a mean over some ema * step steps
                update_average(run.scored, model, 1 / (1 + config["ema"] * step))

            run.finish_step(loss.detach().mean(), norm)  # the rest is bookkeeping; run.step is step + 1 now
            if run.step in due:
                run.evaluate()  # and log
            ending = run.agree(stop())  # all processes end together
            if run.step in due or ending or run.unsaved_for_long():
                run.save()
            if ending:
                break
    return run.log


# ----- machinery: settings, the run directory, processes, the command line


def make_config(preset=None, **given):
    """Every flag of a run: a preset's values (laptop, gpu; None: by device), overridden by the given ones.

    Raises UserError with the value and the remedy.
    """
    device = given.get("device", "auto")
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    preset = preset or ("gpu" if gpu else "laptop")
    if preset not in ("laptop", "gpu"):
        raise UserError(f"preset={preset}: choose laptop or gpu")
    if unknown := set(given) - set(FLAGS):
        raise UserError(f"unknown setting {min(unknown)!r}: see python train.py --help")
    config = {name: row[1 if preset == "laptop" else 2] for name, row in FLAGS.items()} | given
    if "unique_tokens" not in given and prepare.is_own(config["data"]):
        config["unique_tokens"] = 0
    for name, (kind, _, _, allowed, text) in FLAGS.items():
        value = config[name]
        if isinstance(allowed, tuple) and value not in allowed:
            raise UserError(f"--{name}={value}: choose one of {', '.join(allowed)}")
        if kind in (int, float) and not allowed <= value <= MOST.get(name, 2**62):
            most = MOST.get(name, "2^62")
            raise UserError(f"--{name}={value}: it must be a number from {allowed} to {most} ({text})")
    return {"preset": preset} | config


def describe(config, data, tokens, blocks, model, dtype="auto", get_batch=get_batch):
    """The config of a new run with all that is known before its first step: the log's first record."""
    unigram = torch.bincount(blocks.flatten()).double() / blocks.numel()  # how frequent each token is
    U, B, T, N = len(tokens), config["batch_size"], config["block_size"], model.num_params()
    steps = max(1, round(config["epochs"] * (U // T) / B))
    corpus = data.meta["dataset"], data.tokenizer.kind, data.tokenizer.vocab_size
    out = config["out"]
    if not out and not processes()[0]:
        out = str(sample.new_run_dir(config["objective"]))
    return config | {
        "out": out, "processes": processes()[1], "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."), "batch": get_batch.__name__,
        "data_sha256": prepare.fingerprint(data), "unique_tokens": U,
        "train_tokens": len(data.splits["train"]), "vocab_size": data.tokenizer.vocab_size,
        "parameters": N, "steps": steps, "flops": 6 * N * steps * B * T,
        "critical_flops": 2.12e15 * (U / 1e6) ** 2.174,  # C_crit(U), fitted in arXiv 2507.15857
        "critical_measured": measured_critical(U, *corpus),
        "eval_tokens": blocks.numel(),
        **prepare.scored_bytes(data, config["split"], blocks),
        "unigram_entropy": torch.special.entr(unigram).sum().item(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "numpy": np.__version__}}


def measured_critical(U, dataset, kind, vocab_size):
    """From how many FLOPs on diffusion overtakes plain AR's best, as measured in notebook 03, in words.

    512 to 16,384 characters: by its power law, a range with all seeds. More: what was spent without crossing.
    """
    law = 5.2e11 * (U / 4096) ** 1.25
    if (dataset, kind) == ("sotu", "char") and 512 <= U <= 16_384:
        return f"{0.65 * law:.1e} to {1.7 * law:.1e} with 0.17M parameters"
    if (dataset, kind) == ("sotu", "char") and 32_768 <= U <= 65_536:
        return "more than 1.2e+14 with 0.17M parameters"
    if (dataset, kind, vocab_size) == ("sotu", "bpe", 512) and 16_384 <= U <= 131_072:
        return "reached by one run of twelve (of 16,384 tokens), 0.82M parameters"
    return "not for this text"


def evaluation_steps(config):
    """The steps after which to evaluate: every eval_every epochs, or after 1, 1.25, 1.5, 1.75, 2, 2.5, ...

    An AR model that overfits has its lowest loss for a few epochs only: larger steps would miss it.
    """
    steps = config["steps"]
    per_epoch = config["unique_tokens"] // config["block_size"] / config["batch_size"]
    if config["eval_every"]:
        every = max(1, config["eval_every"] * per_epoch)
        due = {round(every * i) for i in range(1, int(steps / every) + 1)}
    else:
        due = {round(per_epoch * m * 2**j) for j in range(32) for m in (1, 1.25, 1.5, 1.75)}
    return {step for step in due if 0 < step < steps} | {steps}


def reopen(run, given, get_batch=get_batch):
    """The config and the checkpoint to resume a run with. Raises UserError if a flag contradicts the run."""
    if not run:
        raise UserError("--resume names no run: is a variable empty?")
    run = Path(run).parent if str(run).endswith("last.pt") else run
    if str(run).endswith(".pt"):
        raise UserError(f"a run goes on from its last.pt: --resume=FOLDER; from these weights: --init={run}")
    saved = load_checkpoint(Path(run) / "last.pt")
    config = as_of_now(saved["config"])
    if "optimizers" not in saved:
        raise UserError(f"{run}/last.pt has no optimizer state to go on from: is it a copy of best.pt?")
    if saved.get("records") and not (Path(run) / "best.pt").is_file():
        raise UserError(f"{run} has no best.pt, which is scored at its end: copy it beside last.pt, too, "
                        f"or begin a new run with these weights by --init={run}/last.pt")
    if "records" not in saved:
        raise UserError(f"{run} is of an older version: begin a new run with its weights by --init={run}")
    if config["batch"] != get_batch.__name__:
        raise UserError(f"{run} was begun with the batches {config['batch']}: resume it with the same script")
    different = [f"--{name}={value} (the run has {config[name]})" for name, value in given.items()
                 if name not in ("data", "device", "compile") and value != config[name]]
    if different:
        raise UserError(f"{run} can not go on with other settings: {', '.join(different)}; leave them out, "
                        f"or begin a new run with its weights by --init={run}")
    return config | given | {"out": str(run)}, saved


def as_of_now(config):
    """The config of an older run with today's flags: one that it lacks has the value meaning "as before"."""
    before = BEFORE | {"final_draws": config.get("final_passes", 24)}
    if config.get("hide"):  # once a flag of train.py, today notebooks/why.py hide
        config = config | {"batch": f"hide({config['hide']})"}
    return config | {name: value for name, value in before.items() if name not in config}


def say(*lines):
    """Print beside the progress bar, at once also into a file; nobody needs to be there to read it."""
    try:
        tqdm.write("\n".join(lines))
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # a stdout that is closed, as after | head
        sys.stdout = open(os.devnull, "w")


class Run:
    """The directory of a run with its log and checkpoints, and how far the run is.

    Every process has one; that of rank 0 alone evaluates, writes and prints.
    """

    def __init__(self, config, saved, model, optimizers, tokenizer, blocks, device_line):
        self.config, self.out, self.saved = config, Path(config["out"]), saved
        self.model, self.optimizers, self.tokenizer, self.blocks = model, optimizers, tokenizer, blocks
        self.scored = model  # what is evaluated and kept as best
        if config["ema"]:
            self.scored = make_model(config).to(model.embed.weight.device)
            self.scored.load_state_dict(model.state_dict())
        self.state = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_steps": 0}
        self.log, self.device_line = [{"config": config}], device_line
        if saved:
            saved = copy.deepcopy(saved)  # the caller's may serve again
            self.state, self.log = saved["state"], self.log + saved["records"]
            model.load_state_dict(saved["model"])
            if config["ema"]:
                self.scored.load_state_dict(saved["average"])
            for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
                for new, group in zip(optimizer.param_groups, values["param_groups"], strict=True):
                    if "adjust_lr_fn" in new:  # None in a run that our own Muon of before began
                        group["adjust_lr_fn"] = new["adjust_lr_fn"]
                optimizer.load_state_dict(values)
        self.step, self.device = self.state["step"], model.embed.weight.device
        self.losses, self.norm = [], torch.tensor(0.0)  # since the last evaluation; of the last gradient
        self.threads, self.settle_at = torch.get_num_threads(), math.inf  # of the CPU, at most
        self.rank, self.world = processes()
        self.per_step = config["batch_size"] * config["block_size"]  # tokens
        self.lock = filelock.FileLock(self.out / ".lock")

    def __enter__(self):
        out, self.started = self.out, time.perf_counter() - self.state["seconds"]
        if not self.rank:
            out.mkdir(parents=True, exist_ok=True)
            if not self.saved and ((out / "log.jsonl").exists() or (out / "last.pt").exists()):
                raise UserError(f"{out} holds a run: go on with --resume={out}, or choose another --out")
            try:
                self.lock.acquire(timeout=0)  # it goes when the process does, however that ends
            except filelock.Timeout:
                raise UserError(f"{out} is in use by another run: wait, or choose another --out") from None
            except OSError as error:  # a file system that has no locks
                say(f"{out} can not be locked ({error}): start no second run there")
            say(self.device_line, sample.header(self.config))
            for name, now in (("threads", torch.get_num_threads()), ("processes", self.world)):
                if self.config.get(name, now) != now:
                    say(f"begun with {self.config[name]} {name}, now {now}: the last digits may differ")
        try:
            self.save()
        except BaseException:
            self.lock.release()
            raise
        total = self.config["steps"] * self.per_step
        self.bar = tqdm(total=total, initial=self.step * self.per_step, unit="tok", unit_scale=True,
                        dynamic_ncols=True, disable=True if self.rank else None)
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        self.lock.release()
        torch.set_num_threads(self.threads)
        if not self.rank and not error:
            told = sample.conclude(self.log)
            say(told)
            if "final_loss" not in self.log[-1] and not sys.stdout.isatty():  # how to go on, where it is seen
                print(told, file=sys.stderr)

    def ready(self, inputs, dtype):
        """What the loop calls: the model, compiled if asked for. inputs: a batch to try it on, see settle."""
        def work():
            """A step without its end, which changes no weight."""
            with precision(self.device, dtype):
                network(**inputs).mean().backward()
            self.model.zero_grad()

        network, self.work = accelerate(self.model, inputs, self.config["compile"], dtype), work
        if self.device.type == "cpu" and self.world == 1 and network is self.model:
            self.settle()
        return network

    def settle(self):
        """Choose the number of CPU threads anew, by what a step takes now: other programs come and go."""
        threads, start = torch.get_num_threads(), time.perf_counter()
        settle_threads(self.work, self.threads)
        took = time.perf_counter() - start  # on a busy machine long: then not so often
        self.settle_at = start + max(SETTLE_SECONDS, 20 * took)
        if torch.get_num_threads() != threads:
            say(f"step {self.step}: {torch.get_num_threads()} of {self.threads} threads are the fastest now")

    def finish_step(self, loss, norm):
        """Count a step, its mean loss and the norm of its gradient, and move the progress bar."""
        if self.world > 1:
            dist.all_reduce(loss)
            loss /= self.world
        self.losses.append(loss)
        self.norm = norm
        self.step += 1
        self.bar.update(self.per_step)
        if time.perf_counter() > self.settle_at:
            self.settle()
        self.reading = self.device.type == "cpu" or self.step % 50 == 0  # to read a number stalls a GPU
        if self.reading:
            self.demand_finite(loss=loss.item(), gradient_norm=norm.item())
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def gather(self):
        """Add the losses since the last time to the state, on the CPU in float64."""
        for loss in torch.stack(self.losses).tolist() if self.losses else []:  # one by one: the same sum
            self.state["loss_sum"] += loss
        self.state["loss_steps"] += len(self.losses)
        self.losses.clear()

    def demand_finite(self, **values):
        """Raise UserError unless all values are finite: a diverged run must not replace what was good."""
        if not all(map(math.isfinite, values.values())):
            found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise UserError(f"{found} at step {self.step}: begin anew with --lr={self.config['lr'] / 3:.2g}; "
                            f"{self.out / 'last.pt'} holds the last good state")

    def evaluate(self):
        """Score the held-out blocks, keep the best network and add a record to the log."""
        self.gather()
        c, seen = self.config, self.step * self.per_step
        train_loss = self.state["loss_sum"] / self.state["loss_steps"]
        self.state |= {"loss_sum": 0.0, "loss_steps": 0}
        if self.rank:
            return
        epoch = seen / (c["unique_tokens"] // c["block_size"] * c["block_size"])
        record = {"epoch": epoch, "step": self.step, "tokens": seen, "flops": 6 * c["parameters"] * seen,
                  "train_loss": train_loss, **score(c, self.scored, self.blocks, prefix="val_"),
                  "lr": self.optimizers[0].param_groups[0]["lr"], "threads": torch.get_num_threads()}
        self.demand_finite(train_loss=train_loss, val_loss=record["val_loss"])
        self.log.append(record)
        lowest = record is sample.best_of(self.log)  # the new record is the lowest so far
        if lowest:
            self.save("best.pt")
        if self.step == c["steps"]:  # the last and the best network once more, alike, with more mask draws
            final = best = score(c, self.scored, self.blocks, c["final_draws"])
            if not lowest:
                network = model_from_checkpoint(load_checkpoint(self.out / "best.pt")).to(self.device)
                best = score(c, network, self.blocks, c["final_draws"])
            record |= {f"final_{key}": value for key, value in final.items()}
            record |= {f"best_{key}": value for key, value in best.items()}
        record["seconds"] = round(time.perf_counter() - self.started, 1)
        left = record["seconds"] * (c["steps"] / self.step - 1) / 60
        say(f"epoch {epoch:7.2f}  train {train_loss:.3f}  {sample.show(record, c)}  {left:.1f} min left")

    def agree(self, ending):
        """Whether to end, the same for all processes: they have to leave the loop after the same step."""
        if self.world == 1:
            return bool(ending)
        if not self.reading:  # they ask each other only where numbers are read anyway
            return False
        ending = torch.tensor(int(bool(ending)), device=self.device)
        dist.all_reduce(ending, dist.ReduceOp.MAX)
        return bool(ending)

    def unsaved_for_long(self):
        return not self.rank and time.perf_counter() - self.saved_at > SAVE_SECONDS

    def save(self, name="last.pt"):
        """Write a checkpoint, and the log with it (rank 0)."""
        if self.rank:
            return
        self.gather()
        self.demand_finite(loss_sum=self.state["loss_sum"], gradient_norm=self.norm.item())
        self.state |= {"step": self.step, "seconds": time.perf_counter() - self.started}
        content = {"config": self.config, "tokenizer": self.tokenizer.spec, "state": self.state,
                   "records": self.log[1:], "model": self.scored.state_dict()}
        if name == "last.pt":  # from which the run can go on
            content["model"] = self.model.state_dict()
            if self.scored is not self.model:
                content["average"] = self.scored.state_dict()
            content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_checkpoint(self.out / name, content)
        lines = "".join(json.dumps(record) + "\n" for record in self.log)
        write_atomic(self.out / "log.jsonl", lambda f: f.write(lines.encode()))
        self.saved_at = time.perf_counter()


def score(config, model, blocks, draws=2, prefix=""):
    """The held-out loss of a model as a dict: loss in nats per token, its stderr, bpb: bits per byte."""
    with precision(model.embed.weight.device, getattr(torch, config["dtype"])):
        loss, stderr = evaluate(model, blocks, draws)
    bits = loss * config["eval_tokens"] / math.log(2) + 8 * config.get("eval_dropped", 0)
    return {f"{prefix}loss": loss, f"{prefix}stderr": stderr, f"{prefix}bpb": bits / config["eval_bytes"]}


def accelerate(model, inputs, compile, dtype):
    """What the loop calls: the model, compiled if asked for; under torchrun its gradients are averaged."""
    network = model
    if compile:
        try:
            network = torch.compile(model, options={"fallback_random": True})  # the same dropout
            with precision(inputs["x"].device, dtype):
                network(**inputs).mean().backward()
        except Exception as error:  # no compiler, no backend for this system, ...: all mean the same to us
            reason = " ".join(str(error).strip().split("\n")[:2])
            say(f"--compile does not work here: {type(error).__name__}: {reason}")
            network = model
        model.zero_grad()
    return torch.nn.parallel.DistributedDataParallel(network) if processes()[1] > 1 else network


def parse(argv):
    """The flags that a command line gives, as a dict: those of FLAGS, preset, resume and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=("laptop", "gpu"), help="values for all flags below [by device]")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this directory")
    parser.add_argument("--compare", metavar=("RUN_A", "RUN_B"), nargs=2,
                        help="draw both into RUN_B/crossing.png, and say where one overtakes the other")
    for name, (kind, laptop, gpu, _, text) in FLAGS.items():
        default = f"{laptop}" if laptop == gpu else f"laptop {laptop}, gpu {gpu}"
        value = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            value = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name}", help=f"{text} [{default}]".replace("%", "%%"), **value)
    given = vars(parser.parse_args(argv))
    for name in {"data", "init", "out", "resume"} & set(given):
        given[name] = os.path.expanduser(given[name])  # in --flag=~/x a shell leaves it
    return given


@contextlib.contextmanager
def noted_signals():
    """The signals that ask a run to end: the first lets a step end and saves, a second ends at once."""
    noted, before = [], {}

    def note(number, _):
        """A second one does not end a process of torchrun's, which passes on what the system sent to all."""
        noted.append(number)
        if processes()[1] == 1:
            signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():  # Python allows no other to do this
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None, get_batch=get_batch):
    """The command line. Returns its exit code: 0; 2 after an error that a person can mend; 128 + a signal."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None where it is closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no ± gets a question mark
    with noted_signals() as signals:  # to its end: when one process dies, torchrun sends the others SIGTERM
        try:
            given = parse(argv)
            if "compare" in given:
                if others := [f"--{name}" for name in given if name != "compare"]:
                    raise UserError(f"--compare draws two runs as they are: leave out {', '.join(others)}")
                say(sample.compare(*given["compare"]))
                return 0
            run = given.pop("resume", None)
            config, saved = (make_config(**given), None) if run is None else reopen(run, given, get_batch)
            log = train(config, saved, lambda: signals, get_batch)
            return 128 + signals[0] if signals and "final_loss" not in log[-1] else 0
        except (UserError, prepare.DataError) as error:
            told = error
        except OSError as error:
            told = f"{error}\nwhat was written before is whole: mend that; a saved run goes on by --resume"
        except RuntimeError as error:
            if not dist.is_initialized():
                raise
            told = (f"{str(error).strip().splitlines()[0]}\nlikely another process of this run ended and "
                    "took this one along; what was saved is whole: go on with --resume")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        print(f"error: {told}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # no tidying up: a late thread of Gloo's aborts the process (PyTorch #190489)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
