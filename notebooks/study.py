"""Run a study: a folder in notebooks/results, with runs.txt, a command a line, and their logs, RUN.jsonl.

    python notebooks/study.py laptop --jobs=2   run what has no log yet, two at a time; after Ctrl-C, go on
    python notebooks/study.py laptop --print    only print those commands, for a scheduler to take
    python notebooks/study.py gpu --cost=790    FLOPs, and minutes on a GPU of that peak in TFLOP/s
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"


def commands(study):
    """The lines of a study's runs.txt as lists of words. Raises ValueError, which says what is wrong."""
    there = sorted(path.parent.name for path in RESULTS.glob("*/runs.txt"))
    if study not in there:
        raise ValueError(f"there is no study {study!r}: choose one of {', '.join(there)}")
    lines = [line.split() for line in (RESULTS / study / "runs.txt").read_text().splitlines()]
    outs = [words[-1] if words else "" for words in lines]
    for number, out in enumerate(outs, 1):
        if not out.startswith(f"--out=out/{study}-") or outs.count(out) > 1:
            raise ValueError(f"{study}/runs.txt, line {number}: end it with a new --out=out/{study}-RUN")
    return lines


def names(study):
    """The runs of a study: RUN of each --out=out/STUDY-RUN."""
    return [words[-1].removeprefix(f"--out=out/{study}-") for words in commands(study)]


def read(study):
    """The logs of the runs that have ended, {run: (config, records)}, in the order of runs.txt."""
    logs = {}
    for name in names(study):
        if (path := RESULTS / study / f"{name}.jsonl").exists():
            first, *records = map(json.loads, path.read_text().splitlines())
            logs[name] = first["config"], records
    return logs


def curve(records, key="val_loss"):
    """Epochs and losses of a log, (2, evaluations)."""
    return np.array([(record["epoch"], record[key]) for record in records]).T


def plan(words):
    """The config of a command's log, and all_flops, with those of evaluations. Raises what train.py would."""
    import torch
    import train
    config = train.make_config(**train.parse([word for word in words if word.startswith("--")]))
    data, tokens, blocks = train.prepare.open_data(config)
    with torch.device("meta"):
        model = train.make_model(config | {"vocab_size": data.tokenizer.vocab_size})
    config = train.describe(config, data, tokens, blocks, model)
    draws, final = (1, 1) if config["objective"] == "ar" else (2, config["final_draws"])
    scored = config["eval_tokens"] * (draws * len(train.evaluation_steps(config)) + 2 * final)
    return config | {"all_flops": config["flops"] + 2 * config["parameters"] * scored}


def cost(study, peak):
    """Print a guess of what each run takes on a GPU of `peak` TFLOP/s in bf16, one run after another."""
    if not 0 < peak < np.inf:
        raise ValueError(f"--cost={peak}: it takes the card's peak in TFLOP/s")
    total = np.zeros(2)
    for name, words in zip(names(study), commands(study), strict=True):
        c = plan(words)
        N, F = c["parameters"], c["all_flops"]
        busy = F / (0.45e12 * peak * N / (N + 25e3 * peak))  # 45 % of the peak; a small network gets less
        minutes = (40 + max(busy, c["n_layer"] * c["steps"] / 1e3)) / 60  # 40 s to start, 1 ms a layer
        total += F, minutes
        print(f"{name:<28} {N / 1e6:6.1f}M {c['steps']:8,} steps {F:.2e} FLOPs {minutes:7.1f} minutes")
    print(f"{len(names(study))} runs, {total[0]:.2e} FLOPs, {total[1]:.0f} minutes")


def keep(study, name):
    """Copy the log of a run that has ended from out/ to its study; return whether it is there."""
    log, kept = ROOT / f"out/{study}-{name}/log.jsonl", RESULTS / study / f"{name}.jsonl"
    text = log.read_text() if log.exists() and not kept.exists() else ""
    if '"final_loss"' in text and text.endswith("\n"):  # the last record, and it is whole
        os.replace(shutil.copy(log, kept.with_suffix(".tmp")), kept)
    return kept.exists()


def left(study):
    """What is still to run, [(run, words)]: what was broken off is resumed, by the script that began it."""
    todo = []
    for name, words in zip(names(study), commands(study), strict=True):
        if (ROOT / f"out/{study}-{name}/last.pt").exists():
            words = [word for word in words if not word.startswith("--")] + [f"--resume=out/{study}-{name}"]
        todo += [] if keep(study, name) else [(name, words)]
    return todo


def drive(study, jobs):
    """Run what is left. Ctrl-C or SIGTERM ends the runs too, and they save. Returns the exit status."""
    todo, running, signals, forwarded = left(study), {}, [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} | os.environ
    (ROOT / "out").mkdir(exist_ok=True)
    while running or todo and not signals:
        if todo and len(running) < jobs and not signals:
            name, words = todo.pop(0)
            # In its own session, so that Ctrl-C comes from here alone: a second signal ends it unsaved.
            with open(ROOT / f"out/{study}-{name}.txt", "a") as file:
                running[name] = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, env=env, stdout=file,
                                                 stderr=file, start_new_session=True)
        time.sleep(0.1)
        while forwarded < len(signals):
            forwarded += 1
            for process in running.values():
                process.terminate()
        for name in [name for name, process in running.items() if process.poll() is not None]:
            del running[name]
            how = "done" if keep(study, name) else "stopped" if signals else "failed"
            print(f"{study}-{name}: {how}; output in out/{study}-{name}.txt", flush=True)
    return 128 + signals[0] if signals else int(bool(left(study)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", help="a folder in notebooks/results that has a runs.txt")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores [1]")
    parser.add_argument("--print", action="store_true", help="print the commands still to run, run nothing")
    parser.add_argument("--cost", type=float, metavar="PEAK", help="guess the time on a GPU, run nothing")
    args = parser.parse_args()
    try:
        if args.cost is not None:
            sys.path.append(str(ROOT))
            return cost(args.study, args.cost)
        if not args.print:
            return drive(args.study, max(1, args.jobs))
        for _, words in left(args.study):
            print(*words)
    except ValueError as error:  # UserError and DataError too
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(main())
