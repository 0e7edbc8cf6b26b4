"""The runs behind README's tables and the notebooks: every setting of every study, and a driver for them.

    python notebooks/study.py laptop --jobs=2      run what is not done yet, two at a time, resuming what was broken off
    python notebooks/study.py laptop --print       only print the plain commands, for a cluster's scheduler to take
    python notebooks/study.py gpu --cost=790       FLOPs and minutes on a GPU of that peak in TFLOP/s, before it is run
    python notebooks/study.py final --plot         draw notebooks/results/crossover.png from the logs that are there

Ctrl-C ends the driver and its runs, which save; the same command goes on with them. So does `timeout 600 python ...`.
A finished run's log.jsonl is copied to notebooks/results/STUDY-NAME.jsonl as train.py wrote it; nothing is converted.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"

STUDIES = {
    # name of the study: {name of the run: flags of train.py, behind another script if it is one}
    "laptop": {f"{objective}-s{seed}": f"--preset=laptop --objective={objective} --epochs=100 --seed={seed}"
               for seed in (1, 2, 3) for objective in ("ar", "diffusion")},
    # the laptop preset tuned for each objective on the tuning split, one setting at a time; e: epochs, d: dropout
    "search-ar": {name: f"--preset=laptop --objective=ar --split=tune {flags}" for name, flags in {
        "e16": "--epochs=16", "e16-lr.001": "--epochs=16 --lr=0.001", "e16-lr.004": "--epochs=16 --lr=0.004",
        "e8": "--epochs=8", "e24": "--epochs=24",
        "e24-d.1": "--epochs=24 --dropout=0.1", "e24-d.2": "--epochs=24 --dropout=0.2",
        "e24-d.3": "--epochs=24 --dropout=0.3", "e24-wd.4": "--epochs=24 --weight_decay=0.4",
        "e24-wd1.6": "--epochs=24 --weight_decay=1.6", "e24-wd3.2": "--epochs=24 --weight_decay=3.2",
        "e48-d.2": "--epochs=48 --dropout=0.2", "e48-d.3": "--epochs=48 --dropout=0.3",
        "e48-d.2-wd1.6": "--epochs=48 --dropout=0.2 --weight_decay=1.6",
        "e48-d.2-lr.004": "--epochs=48 --dropout=0.2 --lr=0.004", "e96-d.3": "--epochs=96 --dropout=0.3",
        "e24-replace.15": "--epochs=24 --replace=0.15", "e24-hide.15": "--epochs=24 --hide=0.15",
        "e24-d.2-replace.1": "--epochs=24 --dropout=0.2 --replace=0.1", "e32-d.2": "--epochs=32 --dropout=0.2",
        "e48-d.2-wd3.2": "--epochs=48 --dropout=0.2 --weight_decay=3.2",
        "e24-d.2-b8": "--epochs=24 --dropout=0.2 --batch_size=8 --lr=0.0014",
        "e48-d.1-wd1.6-replace.1": "--epochs=48 --dropout=0.1 --weight_decay=1.6 --replace=0.1",
        "e48-d.2-wd1.6-replace.1": "--epochs=48 --dropout=0.2 --weight_decay=1.6 --replace=0.1",
        "e96-d.2-wd1.6-replace.1": "--epochs=96 --dropout=0.2 --weight_decay=1.6 --replace=0.1",
        "e96-d.2-wd1.6-replace.2": "--epochs=96 --dropout=0.2 --weight_decay=1.6 --replace=0.2",
    }.items()},
    "search-diffusion": {name: f"--preset=laptop --objective=diffusion --split=tune --epochs=100 {flags}"
                         for name, flags in {
        "e100": "", "e100-lr.004": "--lr=0.004", "e100-d.1": "--dropout=0.1", "e100-wd.4": "--weight_decay=0.4",
        "e48": "--epochs=48", "e48-b8": "--epochs=48 --batch_size=8 --lr=0.0014",
        "e400-d.1-wd1.6": "--epochs=400 --dropout=0.1 --weight_decay=1.6 --compile",
        "e400-d.1-replace.1": "--epochs=400 --dropout=0.1 --replace=0.1 --compile",
        "e400-d.1": "--epochs=400 --dropout=0.1", "e800-d.2": "--epochs=800 --dropout=0.2 --compile",
    }.items()},
    # the winners of both searches on val
    "final": {f"{name}-s{seed}": f"--preset=laptop --seed={seed} {flags}" for seed in (1, 2, 3) for name, flags in {
        "ar-tuned": "--objective=ar --epochs=48 --dropout=0.2 --weight_decay=1.6 --replace=0.1",
        "diffusion": "--objective=diffusion --epochs=400 --dropout=0.1",
    }.items()},
    # does bf16 change the curve by more than a seed does?
    "precision": {f"{objective}-{dtype}-s{seed}": f"--preset=laptop --objective={objective} --epochs=12 "
                  f"--dtype={dtype} --seed={seed}" for objective in ("ar", "diffusion") for seed in (1, 2)
                  for dtype in ("float32", "bfloat16")},
    # where is the hard crossing? other numbers of tokens, tokenizers and networks, on the tuning split
    "map": {name: f"--preset=laptop --split=tune {flags}" for name, flags in {
        "u16k-ar-e16": "--unique_tokens=16384 --objective=ar --epochs=16",
        "u16k-ar-e48-d.2": "--unique_tokens=16384 --objective=ar --epochs=48 --dropout=0.2",
        "u16k-ar-e96-d.3": "--unique_tokens=16384 --objective=ar --epochs=96 --dropout=0.3",
        "u16k-diffusion-e400": "--unique_tokens=16384 --objective=diffusion --epochs=400",
        "u16k-diffusion-e400-d.1": "--unique_tokens=16384 --objective=diffusion --epochs=400 --dropout=0.1",
        "char-ar-e24": "--data=data/sotu-char --objective=ar --epochs=24",
        "char-ar-e48-d.2": "--data=data/sotu-char --objective=ar --epochs=48 --dropout=0.2",
        **{f"u16k-c64-ar-{name}": "--unique_tokens=16384 --n_layer=2 --n_head=2 --n_embd=64 --objective=ar "
           f"{flags}" for name, flags in {
            "e24": "--epochs=24", "e32-lr.004": "--epochs=32 --lr=0.004", "e32-lr.008": "--epochs=32 --lr=0.008",
            "e48-lr.004": "--epochs=48 --lr=0.004"}.items()},
        "u128k-ar-e12": "--unique_tokens=131072 --objective=ar --epochs=12",
        "u128k-ar-e24-d.1": "--unique_tokens=131072 --objective=ar --epochs=24 --dropout=0.1",
        "u128k-ar-e48-d.2-wd1.6": "--unique_tokens=131072 --objective=ar --epochs=48 --dropout=0.2 --weight_decay=1.6",
        "u128k-diffusion-e300-d.1": "--unique_tokens=131072 --objective=diffusion --epochs=300 --dropout=0.1 --compile",
        **{f"u256k-{name}": f"--unique_tokens=262144 --objective={flags}" for name, flags in {
            "ar-e8": "ar --epochs=8", "ar-e12": "ar --epochs=12", "ar-e24-d.1": "ar --epochs=24 --dropout=0.1",
            "ar-e48-d.1-wd1.6": "ar --epochs=48 --dropout=0.1 --weight_decay=1.6",
            "diffusion-e150": "diffusion --epochs=150 --compile"}.items()},
        **{f"char{U}k-{name}": f"--data=data/sotu-char --unique_tokens={U * 1024} --objective={flags}" for U, more in {
            4: {"ar-e64": "ar --epochs=64", "ar-e192-d.3": "ar --epochs=192 --dropout=0.3",
                "ar-e192-d.5": "ar --epochs=192 --dropout=0.5",
                "ar-e192-d.3-wd1.6": "ar --epochs=192 --dropout=0.3 --weight_decay=1.6",
                "ar-e96-replace.15": "ar --epochs=96 --replace=0.15",
                "ar-e192-d.2-replace.15": "ar --epochs=192 --dropout=0.2 --replace=0.15",
                "ar-e192-lr.001-d.2-replace.15": "ar --epochs=192 --lr=0.001 --dropout=0.2 --replace=0.15",
                "ar-e96-replace.3": "ar --epochs=96 --replace=0.3",
                "ar-e96-d.2-replace.3": "ar --epochs=96 --dropout=0.2 --replace=0.3",
                "ar-e192-d.2-replace.3": "ar --epochs=192 --dropout=0.2 --replace=0.3",
                "diffusion-e800-lr.001-d.3": "diffusion --epochs=800 --lr=0.001 --dropout=0.3",
                "diffusion-e800-lr.001-d.3-replace.2": "diffusion --epochs=800 --lr=0.001 --dropout=0.3 --replace=0.2",
                "diffusion-e1600-d.3": "diffusion --epochs=1600 --dropout=0.3",
                "diffusion-e1600-lr.001-d.3-replace.2":
                "diffusion --epochs=1600 --lr=0.001 --dropout=0.3 --replace=0.2"},
            16: {"diffusion-e800-d.1": "diffusion --epochs=800 --dropout=0.1",
                 "diffusion-e800-d.3": "diffusion --epochs=800 --dropout=0.3",
                 "diffusion-e1600-lr.001-d.3-replace.2":
                 "diffusion --epochs=1600 --lr=0.001 --dropout=0.3 --replace=0.2",
                 "ar-e12": "ar --epochs=12", "ar-e16": "ar --epochs=16", "ar-e24-lr.001": "ar --epochs=24 --lr=0.001",
                 "ar-e24-replace.15": "ar --epochs=24 --replace=0.15",
                 "ar-e48-d.2-replace.1": "ar --epochs=48 --dropout=0.2 --replace=0.1",
                 "ar-e96-d.2-replace.2": "ar --epochs=96 --dropout=0.2 --replace=0.2",
                 "ar-e96-d.1-replace.3": "ar --epochs=96 --dropout=0.1 --replace=0.3",
                 "ar-e48-d.2-wd1.6": "ar --epochs=48 --dropout=0.2 --weight_decay=1.6"},
        }.items() for name, flags in ({
            "ar-e24": "ar --epochs=24", "ar-e48-d.2": "ar --epochs=48 --dropout=0.2",
            "ar-e96-d.3": "ar --epochs=96 --dropout=0.3"} | more).items()},
        **{f"char1k-{name}": f"--data=data/sotu-char --unique_tokens=1024 --batch_size=8 --objective={flags}"
           for name, flags in {
            "ar-e96": "ar --epochs=96", "ar-e192": "ar --epochs=192", "ar-e96-d.1": "ar --epochs=96 --dropout=0.1",
            "ar-e192-d.2": "ar --epochs=192 --dropout=0.2", "ar-e192-d.3": "ar --epochs=192 --dropout=0.3",
            "ar-e384-d.3": "ar --epochs=384 --dropout=0.3", "ar-e384-d.5": "ar --epochs=384 --dropout=0.5",
            "ar-e384-d.5-wd1.6": "ar --epochs=384 --dropout=0.5 --weight_decay=1.6",
            "ar-e96-lr.001": "ar --epochs=96 --lr=0.001", "ar-e96-lr.004": "ar --epochs=96 --lr=0.004",
            "ar-e48": "ar --epochs=48", "ar-e96-wd3.2": "ar --epochs=96 --weight_decay=3.2",
            "ar-e96-replace.15": "ar --epochs=96 --replace=0.15", "ar-e96-hide.15": "ar --epochs=96 --hide=0.15",
            "ar-e96-lr.001-d.1": "ar --epochs=96 --lr=0.001 --dropout=0.1",
            "ar-e192-lr.001-d.3": "ar --epochs=192 --lr=0.001 --dropout=0.3",
            "ar-e192-lr.0005": "ar --epochs=192 --lr=0.0005", "ar-e96-replace.3": "ar --epochs=96 --replace=0.3",
            "ar-e96-replace.5": "ar --epochs=96 --replace=0.5",
            "ar-e192-replace.3": "ar --epochs=192 --replace=0.3",
            "ar-e192-lr.001-replace.3": "ar --epochs=192 --lr=0.001 --replace=0.3",
            "ar-e192-lr.001-replace.5": "ar --epochs=192 --lr=0.001 --replace=0.5",
            "ar-e96-d.1-replace.3": "ar --epochs=96 --dropout=0.1 --replace=0.3",
            "ar-e192-lr.001-replace.15": "ar --epochs=192 --lr=0.001 --replace=0.15",
            "ar-e192-lr.0005-replace.15": "ar --epochs=192 --lr=0.0005 --replace=0.15",
            "ar-e96-d.1-replace.15": "ar --epochs=96 --dropout=0.1 --replace=0.15",
            "diffusion-e400-lr.001-d.3": "diffusion --epochs=400 --lr=0.001 --dropout=0.3",
            "diffusion-e400-lr.001-replace.3": "diffusion --epochs=400 --lr=0.001 --replace=0.3",
            "diffusion-e400-lr.001-d.3-replace.1": "diffusion --epochs=400 --lr=0.001 --dropout=0.3 --replace=0.1",
            "diffusion-e800-lr.001-d.3-replace.1": "diffusion --epochs=800 --lr=0.001 --dropout=0.3 --replace=0.1",
            "diffusion-e800-lr.001-d.3-replace.2": "diffusion --epochs=800 --lr=0.001 --dropout=0.3 --replace=0.2",
            "diffusion-e1600-lr.001-d.3-replace.3": "diffusion --epochs=1600 --lr=0.001 --dropout=0.3 --replace=0.3",
            "diffusion-e800-lr.0005-d.3": "diffusion --epochs=800 --lr=0.0005 --dropout=0.3",
            "diffusion-e800-lr.001-d.5": "diffusion --epochs=800 --lr=0.001 --dropout=0.5",
            "diffusion-e400-lr.0005-d.1": "diffusion --epochs=400 --lr=0.0005 --dropout=0.1",
            "diffusion-e800-lr.001-d.3": "diffusion --epochs=800 --lr=0.001 --dropout=0.3",
            "diffusion-e800-d.3": "diffusion --epochs=800 --dropout=0.3",
            "diffusion-e400-d.1": "diffusion --epochs=400 --dropout=0.1"}.items()},
        **{f"u16k-{where}-{name}": f"--unique_tokens=16384 {there} {flags}" for where, E, F, there in (
            ("c64", 48, 400, "--n_layer=2 --n_head=2 --n_embd=64"),
            ("c192", 16, 400, "--n_layer=4 --n_head=3 --n_embd=192"),
            ("bpe4096", 16, 200, "--data=data/sotu-bpe4096")) for name, flags in {
            f"ar-e{E}": f"--objective=ar --epochs={E}",
            f"ar-e{3 * E}-d.2": f"--objective=ar --epochs={3 * E} --dropout=0.2",
            f"diffusion-e{F}-d.1": f"--objective=diffusion --epochs={F} --dropout=0.1"}.items()},
        **{f"u64k-bpe4096-{name}": f"--data=data/sotu-bpe4096 --unique_tokens=65536 --objective={flags}"
           for name, flags in {
            "ar-e8": "ar --epochs=8", "ar-e16": "ar --epochs=16", "ar-e24-d.2": "ar --epochs=24 --dropout=0.2",
            "ar-e48-d.2-wd1.6": "ar --epochs=48 --dropout=0.2 --weight_decay=1.6",
            "diffusion-e200-d.1": "diffusion --epochs=200 --dropout=0.1"}.items()},
    }.items()},
    # where diffusion meets plain AR, on val: characters, the settings chosen on tune
    "char": {f"{name}-s{seed}": f"--preset=laptop --data=data/sotu-char --unique_tokens=16384 --seed={seed} {flags}"
             for seed in (1, 2, 3) for name, flags in {
        "ar": "--objective=ar --epochs=16", "ar-tuned": "--objective=ar --epochs=96 --dropout=0.2 --replace=0.2",
        "diffusion": "--objective=diffusion --epochs=800 --dropout=0.3",
    }.items()},
    # where it comes closest to the best AR, on val: fewer characters, the settings chosen on tune
    **{f"char{U // 1024}k": {f"{name}-s{seed}": f"--preset=laptop --data=data/sotu-char --unique_tokens={U} "
                             f"--batch_size={B} --seed={seed} {flags}" for seed in (1, 2, 3) for name, flags in {
        "ar": f"--objective=ar {plain}", "ar-tuned": f"--objective=ar {tuned}",
        "diffusion": f"--objective=diffusion {diffusion} --lr=0.001 --dropout=0.3 --replace=0.2",
    }.items()} for U, B, plain, tuned, diffusion in (
        (1024, 8, "--epochs=192 --lr=0.0005", "--epochs=96 --replace=0.3", "--epochs=800"),
        (4096, 16, "--epochs=64", "--epochs=192 --dropout=0.2 --replace=0.3", "--epochs=1600"))},
    # notebook 04: AR on N fixed orders; diffusion under M fixed masks a block (0: fresh ones)
    "why": {f"orders{n}": f"notebooks/why.py orders {n} --preset=laptop --objective=ar --unique_tokens=16384 "
            "--epochs=64" for n in (1, 2, 4, 8, 16, 64)} |
           {f"orders{n}-e256": f"notebooks/why.py orders {n} --preset=laptop --objective=ar --unique_tokens=16384 "
            "--epochs=256" for n in (4, 16)} |
           {f"masks{m}": f"notebooks/why.py masks {m} --preset=laptop --objective=diffusion --unique_tokens=16384 "
            "--epochs=256" for m in (0, 1, 4, 16)},
    # notebook 04: diffusion that hides suffixes (1) or anything (0); few blocks, as --exact needs T passes for each
    "reveal": {name: f"{flags} --preset=laptop --unique_tokens=16384 --eval_blocks=128" for name, flags in {
        "suffix-e16": "notebooks/why.py reveal 1 --objective=diffusion --epochs=16",
        "suffix-e64": "notebooks/why.py reveal 1 --objective=diffusion --epochs=64",
        "ar-e64": "train.py --objective=ar --epochs=64",
        "any-e64": "notebooks/why.py reveal 0 --objective=diffusion --epochs=64",
    }.items()},
    # notebook 04: what the literature gives to AR, one thing at a time
    "augment": {f"{name}-s{seed}": f"{flags} --preset=laptop --objective=ar --unique_tokens=16384 --epochs=48 "
                f"--seed={seed}" for seed in (1, 2, 3) for name, flags in {
        "plain": "train.py", "dropout.2": "train.py --dropout=0.2", "replace.15": "train.py --replace=0.15",
        "hide.15": "train.py --hide=0.15", "wd1.6": "train.py --weight_decay=1.6",
        "attention.2": "notebooks/why.py attention --dropout=0.2",
    }.items()},
    # notebook 04: both objectives on data/source, made by `python notebooks/why.py source data/source`
    "source": {f"{name}-u{U // 1024}k-s{seed}": f"--preset=laptop --data=data/source --unique_tokens={U} "
               f"--epochs={2**22 // U} --block_size=32 --batch_size=64 --n_embd=64 --eval_blocks=0 --seed={seed} "
               f"{flags}" for U, seed in ((8192, 1), (65536, 1), (8192, 2)) for name, flags in {
        "ar": "--objective=ar", "ar-tuned": "--objective=ar --dropout=0.2 --weight_decay=1.6",
        "diffusion": "--objective=diffusion",
        **({"diffusion-long": "--objective=diffusion --dropout=0.1 --epochs=2048"} if (U, seed) == (8192, 1) else {}),
    }.items()},
    # notebook 03: losses over unique tokens, epochs and parameters, each run with its whole schedule; the short ones
    # first, so that a grid broken off still spans all sizes. Fewer than 64 steps (AR) or 256 (diffusion, which sits at
    # the unigram entropy until then) would measure the warm-up and not the data. 112 runs; about 105 minutes of one
    # core in all: 12.7 M (AR) and 26.2 M (diffusion) tokens for each size, at 16, 28, 65 and 110 thousand tokens a
    # second for 128, 96, 64 and 32 channels, and 12 s a run to start and to evaluate.
    "grid": {f"{objective}-c{C}-u{U}k-e{E}": f"--preset=laptop --objective={objective} --unique_tokens={U * 1024} "
             f"--epochs={E} --n_layer={C // 32} --n_head={heads} --n_embd={C} --eval_every={E / 4:g} --final_passes=8"
             for _, objective, U, E in sorted((U * E, objective, U, E) for objective, cells in {
                 "ar": {8: (16, 32, 64), 32: (4, 8, 16, 32), 128: (1, 4, 8, 16), 256: (1,), 512: (1, 4), 1024: (1,),
                        2048: (1,)},
                 "diffusion": {8: (64, 256), 32: (16, 64, 256), 128: (4, 16), 512: (1, 4), 1024: (1,), 2048: (1,),
                               4096: (1,)},
             }.items() for U, epochs in cells.items() for E in epochs)
             for C, heads in ((32, 1), (64, 2), (96, 3), (128, 2))},
}

# One GPU; `python prepare.py --vocab_size=4096` first. Networks by width: 1.3, 3.0, 5.6, 23, 46, 102M parameters.
SIZES = {C: f"--n_layer={L} --n_head={C // 64} --n_embd={C}"
         for C, L in {128: 4, 192: 5, 256: 6, 384: 12, 512: 14, 768: 14}.items()}
# What each arm of "gpu" is. Read gpu-search's logs and write its winners here; until then they are the laptop's.
WINNERS = {"plain": "--objective=ar", "tuned": "--objective=ar --dropout=0.2 --weight_decay=1.6 --replace=0.1",
           "diffusion": "--objective=diffusion --dropout=0.1"}

STUDIES |= {
    # one setting at a time on 2^18 tokens and the tuning split; e: epochs (24 and 100 if not named), d: dropout
    "gpu-search": {f"{objective}-{name}": f"--preset=gpu --objective={objective} --split=tune --unique_tokens={2**18} "
                   f"--batch_size=32 {SIZES[256]} --epochs={24 if objective == 'ar' else 100} {flags}"
                   for who, settings in {
        "ar diffusion": {
            "base": "", "lr.001": "--lr=0.001", "lr.004": "--lr=0.004", "d.1": "--dropout=0.1",
            "wd.4": "--weight_decay=0.4", "rope100": "--rope_base=100", "rope10000": "--rope_base=10000",
            "adamw.0005": "--optimizer=adamw --lr=0.0005", "adamw.002": "--optimizer=adamw --lr=0.002",
            "b16": "--batch_size=16", "wd1.6": "--weight_decay=1.6"},
        "ar": {
            "wd3.2": "--weight_decay=3.2", "d.2": "--dropout=0.2", "d.3": "--dropout=0.3",
            "e48-d.2-wd1.6-replace.1": "--epochs=48 --dropout=0.2 --weight_decay=1.6 --replace=0.1",
            **{f"e{E}-d{d}-wd{wd}": f"--epochs={E} --dropout=0{d} --weight_decay={wd}"
               for E, d, wd in ((48, ".2", 0.1), (48, ".2", 1.6), (48, ".2", 3.2), (48, ".3", 0.1), (48, ".3", 1.6),
                                (96, ".3", 1.6), (96, ".3", 3.2))},
            **{f"e48-d.2-wd1.6-c{C}": f"--epochs=48 --dropout=0.2 --weight_decay=1.6 {SIZES[C]}" for C in (128, 384)}},
        "diffusion": {f"e400-d{d}-wd{wd}": f"--epochs=400 --dropout=0{d} --weight_decay={wd}"
                      for d, wd in ((".0", 0.1), (".1", 0.1), (".1", 1.6), (".0", 0.4))},
    }.items() for name, flags in settings.items() for objective in who.split()},
    # the crossover: AR as it comes, AR tuned, diffusion for up to 1,000 epochs or 30 times the paper's critical
    # compute. A row: thousands of unique tokens (0: all), blocks a step, seeds, then who, width and epochs of each run.
    "gpu": {f"u{U or 'all'}-{who}-c{C}-e{E}-s{seed}": f"--preset=gpu --unique_tokens={U * 1024} --batch_size={B} "
            f"{SIZES[C]} {WINNERS[who]} --epochs={E} --seed={seed}" for U, B, seeds, runs in (
        (256, 32, (1,), (("plain", 256, 48), ("tuned", 256, 48), ("diffusion", 256, 1000), ("tuned", 128, 48),
                         ("tuned", 384, 48), ("diffusion", 128, 1000))),
        (1024, 64, (1, 2, 3), (("diffusion", 384, 500), ("plain", 256, 48), ("tuned", 256, 48), ("tuned", 384, 48))),
        (0, 64, (1,), (("tuned", 384, 48), ("plain", 384, 48), ("tuned", 512, 48), ("diffusion", 384, 500))),
        (1024, 64, (1,), (("diffusion", 256, 1000),)),
        (0, 64, (1,), (("diffusion", 512, 500), ("tuned", 768, 48), ("diffusion", 768, 300))),
    ) for seed in seeds for who, C, E in runs},
    # notebook 03 at this size, the short ones first as in "grid"; at least 256 steps each. 100 runs
    "gpu-grid": {f"{objective}-c{C}-u{U}k-e{E}": f"--preset=gpu --objective={objective} --unique_tokens={U * 1024} "
                 f"--epochs={E} --batch_size=16 {SIZES[C]} --eval_every={E / 4:g}"
                 for _, objective, U, E in sorted((U * E, objective, U, E) for objective, cells in {
                     "ar": {64: (16, 64), 256: (4, 16, 64), 1024: (1, 4, 16), 2048: (1, 4)},
                     "diffusion": {64: (64, 256), 256: (16, 64, 256), 1024: (1, 4, 16), 2048: (1, 4)},
                 }.items() for U, epochs in cells.items() for E in epochs) for C in (128, 192, 256, 384, 512)},
}
stopped = []  # signals that asked the driver to end


def words(study, name):
    """The script of a run with its arguments, if it is not train.py alone, and the flags: two lists of words."""
    both = shlex.split(STUDIES[study][name])
    first = next(i for i, word in enumerate(both) if word.startswith("--"))
    return both[:first], both[first:]


def command(study, name):
    """The train.py command of a run as a list, to be run in the project's root."""
    out = Path("out") / f"{study}-{name}"
    script, flags = words(study, name)
    resume = [f"--resume={out}"] if (ROOT / out / "last.pt").exists() else [*flags, f"--out={out}"]
    return ["python", *(script or ["train.py"]), *resume]


def plan(study, name):
    """What a run's log will begin with, its config, found without training. It needs the data, in the working folder.

    Raises UserError or DataError where train.py would refuse the flags.
    """
    import torch

    import train
    given = train.parse(words(study, name)[1])
    config = train.make_config(**{flag: value for flag, value in given.items() if flag not in ("resume", "eval_only")})
    data, tokens, blocks = train.open_data(config)
    with torch.device("meta"):
        model = train.make_model(config | {"vocab_size": data.tokenizer.vocab_size})
    config = train.describe(config, data, tokens, blocks, model)
    passes = np.array([1, 1] if config["objective"] == "ar" else [2, config["final_passes"]])
    scored = config["eval_tokens"] * passes @ (len(train.evaluation_steps(config)), 2)
    return config | {"all_flops": config["flops"] + 2 * config["parameters"] * int(scored)}


def cost(study, peak):
    """Print what each run takes on a GPU of `peak` TFLOP/s in bf16: a guess, until tests/bench.py has run on one.

    It takes a step to reach 45 % of the peak with a large network, and half of that with one of 25,000 parameters for
    each TFLOP/s; a run alone to need a millisecond of Python a layer and step, and 40 s to start and compile.
    """
    total = np.zeros(3)
    for name in STUDIES[study]:
        c = plan(study, name)
        busy = c["all_flops"] / (0.45e12 * peak * c["parameters"] / (c["parameters"] + 25e3 * peak)) / 60
        alone = max(busy, c["steps"] * c["n_layer"] / 60e3) + 40 / 60
        total += c["all_flops"], busy, alone
        print(f"{name:<28}{c['parameters'] / 1e6:7.1f}M{c['steps']:8,} steps {c['all_flops']:.1e} FLOPs"
              f"{c['flops'] / c['critical_flops']:8.2g} x critical{busy:7.1f} min busy{alone:7.1f} alone")
    print(f"{len(STUDIES[study])} runs, {total[0]:.2e} FLOPs: {total[1]:.0f} minutes if the GPU is always busy, "
          f"{total[2]:.0f} one run after another")


def run(study, name, threads):
    """Run or resume one setting, its output to out/STUDY-NAME.txt; copy the log when it has ended well."""
    result = RESULTS / f"{study}-{name}.jsonl"
    if result.exists() or stopped:
        return
    (ROOT / "out").mkdir(exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    with open(ROOT / "out" / f"{study}-{name}.txt", "a") as output:
        done = subprocess.run([sys.executable, *command(study, name)[1:]], cwd=ROOT, stdout=output, stderr=output,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode == 0:
        os.replace(shutil.copy(ROOT / "out" / f"{study}-{name}" / "log.jsonl", result.with_suffix(".tmp")), result)
    state = "done" if done.returncode == 0 else "stopped" if stopped else f"failed, see out/{study}-{name}.txt"
    print(f"{study}-{name}: {state}", flush=True)


def ask(study, what):
    """Put a question to the finished runs whose checkpoints are here; the answers go to STUDY-probe.jsonl or -exact."""
    rows = []
    for name, (_, records) in read(study).items():
        run, ended = f"out/{study}-{name}", records[-1]["val_loss"] == min(record["val_loss"] for record in records)
        ways = {"exact": [["train.py", f"--resume={run}", "--eval_only"]],
                "probe": [["sample.py", f"--run={run}", f"--checkpoint={checkpoint}", "--probe"]
                          for checkpoint in ("best", "last")[:1 if ended else 2]]}  # or the best is the last
        for words in ways[what] if (ROOT / run).exists() else []:
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
            rows.append({"name": name, "command": shlex.join(["python", *words]), "printed": done.stdout.splitlines()})
            print(rows[-1], flush=True)
    (RESULTS / f"{study}-{what}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(study):
    """The logs of a study: {name: (config, records)}, in the order of STUDIES, without runs that have not ended."""
    logs = {}
    for name in STUDIES[study]:
        if (path := RESULTS / f"{study}-{name}.jsonl").exists():
            first, *records = map(json.loads, path.read_text().splitlines())
            logs[name] = first["config"], records
    return logs


def curve(records, key="val_loss"):
    """Epochs and losses of a log, (2, evaluations)."""
    return np.array([(record["epoch"], record[key]) for record in records]).T


def plot():
    """README's figure, crossover.png: AR as it comes, AR tuned, and diffusion, with what crosses and what does not."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import laws
    laptop, final = read("laptop"), read("final")
    plain, diffusion = ([log for log in laptop.values() if log[0]["objective"] == o] for o in ("ar", "diffusion"))
    tuned = [log for name, log in final.items() if name.startswith("ar")]
    longer = [log for name, log in final.items() if name.startswith("diffusion")]
    config, records = diffusion[0]
    scale = records[-1]["flops"] / records[-1]["epoch"]  # FLOPs an epoch
    fig, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for logs, style, shade, label in ((plain, "--", "0", "left to right (exact)"),
                                      (tuned, "-.", "0.45", "left to right, tuned (exact)"),
                                      (diffusion, "-", "0", "diffusion (bound)"),
                                      (longer, "-", "0.45", "diffusion, tuned (bound)")):
        for i, (_, rows) in enumerate(logs):
            ax.plot(*curve(rows), style, color=shade, lw=1.2, label=None if i else f"{label}, {len(logs)} seeds")
    at = [laws.crossing(curve(ar).T, curve(d).T) for (_, ar), (_, d) in zip(plain, diffusion, strict=True)]
    height = np.mean([np.interp(np.log(e), np.log(curve(d)[0]), curve(d)[1])
                      for e, (_, d) in zip(at, diffusion, strict=True)])
    ax.plot(np.mean(at), height, "o", color="black", mfc="white", ms=9,
            label=f"crossing at equal epochs, near {np.mean(at):.0f}")
    end = np.mean([rows[-1]["best_loss"] for _, rows in longer])
    for name, logs, y in (("left to right", plain, 2.83), ("left to right, tuned", tuned, 2.66)):
        lowest = np.mean([rows[-1]["best_loss"] for _, rows in logs])
        ax.axhline(lowest, color="0.7", lw=1, zorder=0)
        ax.text(1, y, f"lowest of {name}, {lowest:.3f}: {'' if end < lowest else 'not '}"
                f"passed by diffusion, ≤ {end:.3f} (means of the seeds)", fontsize=8)
    ax.set(xscale="log", xlabel="epochs", ylabel="validation, nats per token", ylim=(2.6, 7),
           title=f"{config['parameters'] / 1e6:.1f}M parameters, {config['unique_tokens']:,} unique tokens")
    ax.secondary_xaxis("top", functions=(lambda e: e * scale, lambda f: f / scale)).set_xlabel("FLOPs")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 1.01))
    fig.savefig(RESULTS / "crossover.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores [1]")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--cost", type=float, metavar="TFLOP/s", help="guess the time on such a GPU, run nothing")
    parser.add_argument("--probe", action="store_true", help="multiple choice and memorisation for the finished runs")
    parser.add_argument("--exact", action="store_true", help="score them again: diffusion also exactly, left to right")
    parser.add_argument("--plot", action="store_true", help="draw README's figure from laptop and final")
    args = parser.parse_args()
    if args.plot:
        plot()
        return
    if args.probe or args.exact:
        ask(args.study, "probe" if args.probe else "exact")
        return
    if args.print:
        print("\n".join(shlex.join(command(args.study, name)) for name in STUDIES[args.study]))
        return
    if args.cost:
        sys.path.append(str(ROOT))
        cost(args.study, args.cost)
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # the runs, of the same process group, get it too: begin no other
        signal.signal(number, lambda number, _: stopped.append(number))
    with ThreadPoolExecutor(args.jobs) as pool:
        for name in STUDIES[args.study]:
            pool.submit(run, args.study, name, max(1, os.cpu_count() // args.jobs))


if __name__ == "__main__":
    main()
