"""The data-constrained scaling law: how much a repeated token is worth, and from which compute on diffusion wins.

    L(N, U, E) = A / N'^alpha + B / D'^beta + E0        nats per token
    D' = U + U R_D (1 - exp(-(E - 1) / R_D))            U unique tokens read E times, as worth in new tokens
    N' = M + M R_N (1 - exp(-(N/M - 1) / R_N))          M = min(N, N_opt(U)): parameters beyond what U tokens can feed

The law is Muennighoff et al.'s (arXiv 2305.16264, eq. 5 and 6), and arXiv 2507.15857 fits it to AR and to diffusion. A
law is a dict of A, B, alpha, beta, E0, R_D and R_N: numbers, or float64 tensors (S,) for S laws side by side. It only
ever falls with more epochs, so it can not follow an AR model that overfits; table() makes what to do of that a choice.

At the end stands what notebooks share about measured losses: the crossings of two curves and the power law through
them, settings in words, likelihoods over orders, n-grams.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from sample import crossing  # noqa: E402

# Published as A = 521, B = 1488, alpha = beta = 0.353, E0 = 1.87, R_D = 15.39, R_N = 5.31. Those give 2.2236 for their
# check value L(6.34e9, 242e9 tokens of 25e9 unique) = 2.2256; the digits below give it.
MUENNIGHOFF = {"A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596, "beta": 0.3526596,
               "E0": math.exp(0.6254804), "R_D": 15.387756, "R_N": 5.309743}
PAPER = {"ar": {"R_D": 31.19, "R_N": 55.16, "R2": 0.763},  # 2507.15857, table 1b
         "diffusion": {"R_D": 493.89, "R_N": 1265.65, "R2": 0.978}}
PAPER_LINE = 0.460, -1.050  # log10 U = 0.460 log10 C - 1.050, U in tokens
FIRST, SECOND = ("A", "B", "alpha", "beta", "E0"), ("R_D", "R_N")  # the two steps of the fit
DELTA = 1e-3  # of the Huber loss
BOUND = 1e6  # the largest R* a fit returns: there a repeated token is worth a new one at any E in reach
# Where a fit may look. A and B: their terms in nats at the mean N and U. An E0 of 0.001 nats is as good as none.
RANGE = {"A": (1e-4, 1e2), "B": (1e-4, 1e2), "alpha": (0.01, 5), "beta": (0.01, 5), "E0": (1e-3, 10),
         "R_D": (0.01, BOUND), "R_N": (0.01, BOUND)}


def number(x):
    return torch.as_tensor(x, dtype=torch.float64)


def effective(unique, repeats, r_star):
    """unique (1 + R* (1 - exp(-repeats / R*))): D' of tokens, N' of parameters (2305.16264, eq. 5). Any shapes."""
    unique, repeats, r_star = number(unique), number(repeats), number(r_star)
    return unique * (1 - r_star * torch.expm1(-repeats / r_star))


def epochs_worth(E, R_D):
    """D'/U: as how many epochs of new tokens E epochs over the same tokens count."""
    return effective(1, number(E) - 1, R_D)


def n_opt(law, U):
    """The compute-optimal parameters for U tokens read once.

    At C = 6 N D the best split has equal returns, d/dlogN (A/N^alpha) = d/dlogD (B/D^beta), so alpha A / N^alpha =
    beta B / D^beta. With D = U: N_opt = (alpha A U^beta / (beta B))^(1/alpha). Single-epoch coefficients alone.
    """
    A, B, alpha, beta = (number(law[key]) for key in ("A", "B", "alpha", "beta"))
    return log_n_opt(A, B, alpha, beta, U).exp()


def log_n_opt(A, B, alpha, beta, U):
    return (alpha * A / (beta * B)).log() / alpha + beta / alpha * number(U).log()


def log_loss(law, N, U, E):
    """log L as a log-sum-exp of its three terms; N, U, E: whatever broadcasts with the law. E < 1 reads a part of U."""
    N, E, law = number(N), number(E), {key: number(value) for key, value in law.items()}
    unique = number(U) * E.clamp(max=1)
    D = effective(unique, (E - 1).clamp(min=0), law["R_D"])
    # Compared as logarithms, because a small alpha makes an N_opt that overflows.
    M = torch.minimum(N.log(), log_n_opt(law["A"], law["B"], law["alpha"], law["beta"], unique)).exp()
    terms = (law["A"].log() - law["alpha"] * effective(M, N / M - 1, law["R_N"]).log(),
             law["B"].log() - law["beta"] * D.log(), law["E0"].log())
    return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)


def loss_law(law, N, U, E):
    """The law's loss in nats per token of N parameters after E epochs over U unique tokens."""
    return log_loss(law, N, U, E).exp()


def table(logs, objective, treatment):
    """One row {N, U, E, seed, loss} a run of one objective, from study.read's logs.

    treatment: "final" is the loss after the last step. "best" is the lowest evaluation of the run, as with early
    stopping: for AR, whose loss rises when it overfits, which the law can not. E stays the epochs that were planned.
    "stopped" is that loss too, but with the E at which it was reached.
    """
    if treatment not in ("final", "best", "stopped"):
        raise ValueError(f"treatment {treatment!r}: choose final, best or stopped")
    rows = []
    for config, records in logs.values():
        if config["objective"] == objective:
            lowest = min(records, key=lambda r: r["val_loss"])
            rows.append({"N": config["parameters"], "U": config["unique_tokens"],
                         "E": lowest["epoch"] if treatment == "stopped" else config["epochs"], "seed": config["seed"],
                         "loss": records[-1]["final_loss" if treatment == "final" else "best_loss"]})
    return rows


def off_plateau(logs):
    """table()'s rows of study.read's logs, {objective: rows}, without runs that know token frequencies alone.

    These end within 0.2 nats of the unigram entropy, or above it. A run counts with its lowest loss.
    """
    top = next(iter(logs.values()))[0]["unigram_entropy"] - 0.2
    return {o: [row for row in table(logs, o, "best") if row["loss"] <= top] for o in ("ar", "diffusion")}


def worth_measured(rows):
    """D'/U without the law: per run with E > 1 the U of new tokens that gives its network the same loss, over its U.

    Interpolated in log U and log loss between neighbouring single-epoch runs of the same N and seed; a run with a loss
    above or below all of them is left out. Returns rows {N, U, E, seed, loss, worth}.
    """
    found, alike = [], defaultdict(list)
    for r in rows:
        if r["E"] == 1:
            alike[r["N"], r["seed"]].append((r["U"], r["loss"]))
    for r in (r for r in rows if r["E"] > 1):
        once = sorted(alike[r["N"], r["seed"]])
        for (u, before), (v, after) in zip(once, once[1:], strict=False):
            if before >= r["loss"] >= after and before > after:
                share = math.log(before / r["loss"]) / math.log(before / after)
                found.append(r | {"worth": u * (v / u) ** share / r["U"]})
                break
    return found


def common_texts(measured):
    """Where all objectives of worth_measured's rows {objective: rows} have one: {(N, E): the U}."""
    texts = defaultdict(lambda: defaultdict(set))
    for objective, rows in measured.items():
        for row in rows:
            texts[row["N"], row["E"]][objective].add(row["U"])
    return {cell: set.intersection(*of.values()) for cell, of in texts.items() if len(of) == len(measured)}


def worth_table(rows):
    """Print worth_measured of the rows of each objective for each number of epochs and network, means over U.

    Where all objectives have runs, of the U that all have. The mean over the seeds, and the least and the greatest.
    Returns {objective: {(N, E): (seeds,) epochs of new text}}.
    """
    measured = {objective: worth_measured(each) for objective, each in rows.items()}
    common = common_texts(measured)
    sizes, worth = sorted({row["N"] for each in rows.values() for row in each}), defaultdict(dict)
    print(f"{'':22}worth in epochs of new text, mean [least, greatest seed], for a network of")
    print(f"{'':10} epochs " + "".join(f"{N:>17,}     " for N in sizes) + "  parameters")
    for objective, each in measured.items():
        found = defaultdict(lambda: defaultdict(list))  # {(N, E): {seed: [of every U]}}
        for row in each:
            if row["U"] in common.get((row["N"], row["E"]), {row["U"]}):
                found[row["N"], row["E"]][row["seed"]].append(row["worth"])
        worth[objective] = {cell: np.array([np.mean(of_U) for of_U in seeds.values()]) for cell, seeds in found.items()}
        for E in sorted({E for _, E in found}):
            print(f"{objective:10} {E:6g} " + "".join(in_words(worth[objective].get((N, E))) for N in sizes))
    return dict(worth)


def fit_worth(rows, samples=500):
    """The R_D for which epochs_worth(E, R_D) is closest to worth_measured's rows, for each network alone.

    Least squares of log D'/U, searched between 1 and BOUND. Returns {N: (1 + samples,)}: that of all rows of N, and of
    bootstraps, which draw them anew.
    """
    R_D, found = torch.logspace(0, math.log10(BOUND), 1201, dtype=torch.float64), {}
    for N in sorted({row["N"] for row in rows}):
        E, worth = number([(row["E"], row["worth"]) for row in rows if row["N"] == N]).T
        error = (epochs_worth(E, R_D[:, None]).log() - worth.log()).square()  # (R_D, rows)
        drawn = torch.randint(len(E), (samples, len(E)), generator=torch.Generator().manual_seed(0))
        total = torch.cat((error.sum(1, keepdim=True), error[:, drawn].sum(2)), dim=1)  # (R_D, 1 + samples)
        found[N] = R_D[total.argmin(0)].numpy()
    return found


def worth_fits(logs):
    """R_D* of each network of study.read's logs, with its 90 % interval: from all runs, and from texts that both have.

    The second takes only the numbers of epochs and unique tokens that both objectives have for a network. Both are
    {(objective, N): (R_D*, low, high)}.
    """
    measured = {objective: worth_measured(rows) for objective, rows in off_plateau(logs).items()}
    common = common_texts(measured)
    same = {objective: [row for row in rows if row["U"] in common.get((row["N"], row["E"]), ())]
            for objective, rows in measured.items()}
    return [{(objective, N): with_interval(R_D) for objective, rows in each.items()
             for N, R_D in fit_worth(rows).items()} for each in (measured, same)]


def in_words(values):
    """Mean and [least, greatest] of an array, or - for None, in 22 characters."""
    if values is None:
        return f"{'-':>22}"
    spread = f" [{values.min():.1f}, {values.max():.1f}]" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}".rjust(22)


def said(values):
    """An R* with its interval (value, low, high) in words: those near BOUND have no end."""
    value, low, high = (f"{x:.0f}" if x < 0.5 * BOUND else "no end" for x in values)
    return f"{value} [{low}, {high}]"


class Fit(NamedTuple):
    law: dict  # numbers
    samples: dict  # the same of every bootstrap, (S,)
    r2: float  # of log loss, over all runs
    residuals: torch.Tensor  # (runs,) log measured loss - log fitted loss


def minimise(start, free, columns, weight, centre, steps=200):
    """Levenberg-Marquardt from S starts on the weighted Huber loss of the log loss: the S laws, and their losses (S,).

    start: {name: (S,)}; free: the names to fit; weight: (S, runs). All constants are fitted as logarithms, A and B as
    the log of their term at the mean log N and log U in `centre`, without which they and the exponents are one valley.
    Each problem has its own damping, and a step that does not help it is not taken: one that diverges harms no other.
    The Huber loss enters as squares with weights min(1, DELTA / |residual|), which fall where it falls.
    """
    N, U, E, y = columns
    shift = {"A": ("alpha", centre[0]), "B": ("beta", centre[1])}
    theta = {key: start[key].log() - (start[shift[key][0]] * shift[key][1] if key in shift else 0) for key in free}
    low, high = number([RANGE[key] for key in free]).log().T
    theta = torch.stack([theta[key] for key in free], 1).clamp(low, high)  # (S, free)

    def law(theta):  # (S, ..., free)
        now = {key: value.view(-1, *[1] * (theta.dim() - 2)) for key, value in start.items()}
        now |= dict(zip(free, theta.exp().unbind(-1), strict=True))
        return now | {key: (theta[..., free.index(key)] + now[exponent] * mean).exp()
                      for key, (exponent, mean) in shift.items() if key in free}

    def residual(theta):  # (S, runs), and its differences in each direction (S, runs, free)
        beside = theta[:, None] + torch.cat((0 * nudges[:1], nudges))  # (S, 1 + free, free)
        r = log_loss({key: value[..., None] for key, value in law(beside).items()}, N, U, E) - y  # (S, 1 + free, runs)
        return r[:, 0], ((r[:, 1:] - r[:, :1]) / 1e-6).transpose(1, 2)

    def huber(r):
        return (weight * torch.nn.functional.huber_loss(r, 0 * r, reduction="none", delta=DELTA)).sum(1) / DELTA

    nudges = 1e-6 * torch.eye(len(free), dtype=torch.float64)
    r, J = residual(theta)
    loss, damping, idle = huber(r), torch.full((len(theta), 1), 0.1, dtype=torch.float64), 0
    for _ in range(steps):
        JW = (J * (weight * (DELTA / r.abs()).clamp(max=1))[..., None]).transpose(1, 2)
        H = JW @ J
        H = H + torch.diag_embed(damping * H.diagonal(dim1=1, dim2=2) + 1e-12)
        step = torch.linalg.solve_ex(H, JW @ r[..., None])[0][..., 0].clamp(-1, 1)
        trial = (theta - step).clamp(low, high)
        r_trial, J_trial = residual(trial)
        better = huber(r_trial) < loss
        gain = torch.where(better, loss - huber(r_trial), 0)
        loss = loss - gain
        theta = torch.where(better[:, None], trial, theta)
        damping = torch.where(better[:, None], damping / 3, damping * 4)
        r, J = torch.where(better[:, None], r_trial, r), torch.where(better[:, None, None], J_trial, J)
        idle = idle + 1 if (gain <= 1e-7 * loss).all() else 0
        if idle == 10:
            break
    return law(theta), loss


def best_of(starts, free, columns, weight, centre):
    """The best of several starts (laws of numbers or of (S,) tensors) for each of S problems with their weights."""
    S, K = len(weight), len(starts)
    begin = {key: torch.cat([number(s[key]).expand(S) for s in starts]) for key in MUENNIGHOFF}
    laws, huber = minimise(begin, free, columns, weight.repeat(K, 1), centre)
    best = huber.nan_to_num(nan=math.inf).view(K, S).argmin(0)
    return {key: value.view(K, S)[best, torch.arange(S)] for key, value in laws.items()}


def two_steps(columns, weight, first, second, rounds=6):
    """A, B, alpha, beta, E0 from the single-epoch runs, then R_D and R_N from all runs with those frozen; and again.

    The first round is Muennighoff's: it reads N' = N in single-epoch runs. Where models are larger than N_opt, as most
    here are, the law itself says N' < N, so further rounds repeat both steps with the R_N of the round before.
    """
    N, U, E, _ = columns
    centre = N.log().mean(), U[E == 1].log().mean()
    for _ in range(rounds):
        law = best_of(first, FIRST, columns, weight * (E == 1), centre)
        law = best_of([law | s for s in second], SECOND, columns, weight, centre)
        first, second = [law], [{key: law[key] for key in SECOND}]
    return law


def fit(rows, bootstraps=0, seed=0):
    """The law of table()'s rows as Muennighoff et al. fit it, and as many laws of resampled runs.

    Bootstraps draw runs with replacement, single-epoch and repeated ones apart, and start from the fitted law.
    Raises ValueError where the runs can not determine the constants.
    """
    columns = N, U, E, y = [number([row[key] for row in rows]) for key in ("N", "U", "E", "loss")]
    if not all((c.isfinite() & (c > 0)).all() for c in columns):
        bad = next(row for row in rows if not all(0 < row[key] < math.inf for key in ("N", "U", "E", "loss")))
        raise ValueError(f"a run is not finite and above 0: {bad}; leave it out, or train it anew")
    once = E == 1
    sizes, tokens = len(N[once].unique()), len(U[once].unique())
    if sizes < 3 or tokens < 3 or once.sum() < 6:
        raise ValueError(f"{int(once.sum())} single-epoch runs of {sizes} sizes and {tokens} numbers of tokens: "
                         "A, B, alpha, beta and E0 need 6 with at least 3 of both")
    if (E > 1).sum() < 3:
        raise ValueError(f"{int((E > 1).sum())} runs that repeat their tokens: R_D and R_N need at least 3")
    columns[3] = y = y.log()
    low, n, d = y.min().exp(), N.log().mean(), U[once].log().mean()
    first = [{"E0": low * share, "alpha": alpha, "beta": beta, "A": low * (1 - share) / 2 * (alpha * n).exp(),
              "B": low * (1 - share) / 2 * (beta * d).exp(), "R_D": BOUND, "R_N": BOUND}
             for share in (0.2, 0.5, 0.8) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0)]
    second = [{"R_D": number(r_d), "R_N": number(r_n)} for r_d in (3, 30, 300) for r_n in (3, 30, 300)]
    law = two_steps(columns, torch.ones(1, len(y), dtype=torch.float64), first, second)
    residuals = y - log_loss(law, N, U, E)
    r2 = 1 - residuals.square().sum() / (y - y.mean()).square().sum()
    generator, weight = torch.Generator().manual_seed(seed), torch.zeros(bootstraps, len(y), dtype=torch.float64)
    for group in (once.nonzero()[:, 0], (~once).nonzero()[:, 0]):
        drawn = group[torch.randint(len(group), (bootstraps, len(group)), generator=generator)]
        weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    start = {key: value[0] for key, value in law.items()}
    near = [{key: start[key] for key in SECOND}]
    samples = two_steps(columns, weight, [start], near, rounds=2) if bootstraps else {}
    return Fit({key: value.item() for key, value in start.items()}, samples, r2.item(), residuals)


def simulate(rows, law, noise, seeds=1, times=100):
    """R_D* of fits to `times` simulated grids, (times,): what a design can find out if the law were right.

    A grid has the N, U and E of rows, `seeds` runs of each; a run's log loss is the law's plus normal noise.
    """
    rng, found = np.random.default_rng(0), []
    rows = [row for row in rows for _ in range(seeds)]
    mean = log_loss(law, *([row[key] for row in rows] for key in ("N", "U", "E"))).numpy()
    for _ in range(times):
        losses = np.exp(mean + noise * rng.normal(size=len(rows)))
        found.append(fit([row | {"loss": loss} for row, loss in zip(rows, losses, strict=True)]).law["R_D"])
    return np.array(found)


def best_at(law, U, C):
    """What C = 6 N U E FLOPs buy at best with U unique tokens: (loss, N, E), by a search over log N that narrows."""
    law = {key: number(value)[..., None] for key, value in law.items()}
    U, C = number(U)[..., None], number(C)[..., None]
    grid = torch.linspace(-1, 1, 41, dtype=torch.float64)
    middle, width = (C / (6 * U)).log() - 12 + 0 * law["E0"], 18.0  # e^6 more parameters than E = 1 has, to e^30 fewer
    for _ in range(5):
        log_n = middle + width * grid
        at = log_loss(law, log_n.exp(), U, C / (6 * U * log_n.exp())).argmin(-1, keepdim=True)
        middle, width = log_n.expand(*at.shape[:-1], 41).gather(-1, at), width / 10
    N = middle.exp()
    E = C / (6 * U * N)
    return loss_law(law, N, U, E)[..., 0], N[..., 0], E[..., 0]


def critical_compute(ar, diffusion, U, low=1e6, high=1e32):
    """C_crit(U) in FLOPs: the smallest C at which diffusion's best over N and E is no worse than AR's, both at C.

    As the law never rises, AR's best at C is its best with any compute up to C. Scanned from `low` to `high`, then
    bisected. None (NaN where the laws are (S,) tensors) if diffusion never gets there, or is ahead from the start.
    """
    def behind(C):
        return best_at(diffusion, U, C)[0] - best_at(ar, U, C)[0]

    shape = number(ar["A"]).shape
    scan = torch.logspace(math.log10(low), math.log10(high), 53, dtype=torch.float64)
    gap = torch.stack([behind(C.expand(shape)) for C in scan])  # (scan, S)
    falls = (gap[:-1] > 0) & (gap[1:] <= 0)
    at = falls.int().argmax(0)
    left, right = scan[at].log(), scan[at + 1].log()
    for _ in range(25):
        middle = (left + right) / 2
        above = behind(middle.exp()) > 0
        left, right = torch.where(above, middle, left), torch.where(above, right, middle)
    C = torch.where(falls.any(0), right.exp(), math.nan)
    return C if C.dim() else None if C.isnan() else C.item()


def line_compute(line, U):
    """C in FLOPs where log10 U = a log10 C + b. The paper's line is also 2.12e15 (U/1e6)^2.174: U in MILLIONS there."""
    return 10 ** ((math.log10(U) - line[1]) / line[0])


# ----- the crossings themselves, read off the curves


def measured_crossings(logs):
    """Where diffusion overtakes AR in runs [(config, records)] of both, in FLOPs: {U: {seed: (equal, of_best, limit)}}.

    Of each number U of unique tokens and seed: at equal compute, the same network; AR's best, the lowest of all its
    networks, by the diffusion run that gets there first. NaN where there is none up to the limit: the FLOPs of each
    diffusion network's longest run, the least of these. A network that overfits there (it ends over 0.01 nats above
    its lowest) counts as infinity: its bound rises already, so to train on would not help.
    """
    groups = defaultdict(lambda: {"ar": [], "diffusion": []})
    for config, records in logs:
        groups[config["unique_tokens"], config["seed"]][config["objective"]].append([{"config": config}, *records])
    found = defaultdict(dict)
    for (U, seed), both in sorted(groups.items()):
        if both["ar"] and both["diffusion"]:
            best = min(both["ar"], key=lambda log: log[-1]["best_loss"])
            equal = [sample.crossings(ar, log)[0] for ar in both["ar"] for log in both["diffusion"]
                     if ar[0]["config"]["parameters"] == log[0]["config"]["parameters"]]
            of_best = [sample.crossings(best, log)[1] for log in both["diffusion"]]
            first = [min((x for x in flops if x), default=math.nan) for flops in (equal, of_best)]
            longest = {log[0]["config"]["parameters"]: log
                       for log in sorted(both["diffusion"], key=lambda log: log[-1]["flops"])}
            limits = [log[-1]["flops"] for log in longest.values()
                      if log[-1]["val_loss"] < sample.best_of(log)["val_loss"] + 0.01]
            found[U][seed] = *first, min(limits, default=math.inf)
    return dict(found)


def spread(flops):
    """Those of an array that are not NaN in words: their geometric mean, the least and the greatest."""
    flops = flops[np.isfinite(flops)]
    return f"{np.exp(np.log(flops).mean()):.2e} [{flops.min():.1e}, {flops.max():.1e}]" if len(flops) else "none"


def columns(found):
    """What measured_crossings found as three dicts {U: (seeds,)}: at equal compute, AR's best, the limit."""
    return [{U: np.array([seed[k] for seed in seeds.values()]) for U, seeds in found.items()} for k in range(3)]


def crossing_table(logs):
    """Print a line for each number U of unique tokens in runs [(config, records)]; returns measured_crossings(logs).

    Losses and epochs are means over the seeds, of the lowest run of each; crossings are geometric means over the
    seeds that have one.
    """
    found = measured_crossings(logs)
    print(f"{'':12}FLOPs, mean over the seeds [least, greatest]{'':9}no crossing  lowest loss, mean    diffusion's\n"
          f"{'U':>7} seeds {'equal compute':26} {'AR’s best':24} equal best     AR  diffusion  lowest at epoch")
    for U, seeds in found.items():
        ar, diffusion = ([min((records for c, records in logs if (c["unique_tokens"], c["objective"], c["seed"]) ==
                               (U, objective, seed)), key=lambda records: records[-1]["best_loss"]) for seed in seeds]
                         for objective in ("ar", "diffusion"))  # [records of each seed]
        low, bound = (np.mean([records[-1]["best_loss"] for records in runs]) for runs in (ar, diffusion))
        epoch = np.mean([sample.best_of([None, *records])["epoch"] for records in diffusion])
        epochs = {f" of {records[-1]['epoch']:.0f}" for records in diffusion}  # of several runs they may differ
        of = epochs.pop() if len(epochs) == 1 else ""
        equal, of_best, _ = np.array([*seeds.values()]).T
        print(f"{U:7,}{len(seeds):4}  {spread(equal):26} {spread(of_best):26}{np.isnan(equal).sum():3} "
              f"{np.isnan(of_best).sum():4}  = {low:.3f} ≤ {bound:.3f} {epoch:4.0f}{of}")
    return found


def schedule_table(logs):
    """Print what full schedules change beside the curve of one long run, a line for each U of runs [(config, records)].

    The gap: how far the curve of the longest diffusion run is above the lowest loss of a shorter one, each with as much
    compute. Then the compute at which AR's best is overtaken, by that curve and by the losses of all the runs, each
    after its own schedule ("before": already by the shortest). Other than in measured_crossings curves are not shifted.
    Runs of one seed, of both objectives at each U. Returns {U: ({epochs planned: gap}, FLOPs, FLOPs)}, None for none.
    """
    assert len({config["seed"] for config, _ in logs}) == 1, "runs of different seeds"
    groups = defaultdict(lambda: {"ar": [], "diffusion": []})
    for config, records in logs:
        groups[config["unique_tokens"]][config["objective"]].append([{"config": config}, *records])
    print(f"{'':8}epochs of   AR's best is overtaken by    its curve is above full schedules of so many epochs,\n"
          f"{'U':>7} longest run  its curve  full schedules  with as much compute")
    found = {}
    for U, both in sorted(groups.items()):
        best = min(sample.best_of(log)["val_loss"] for log in both["ar"])
        *shorter, longest = sorted(both["diffusion"], key=lambda log: log[-1]["flops"])
        curve = sample.curve(longest, x="flops")
        ends = np.array([(log[-1]["flops"], sample.best_of(log)["val_loss"]) for log in [*shorter, longest]])
        at_ends = np.interp(np.log(ends[:-1, 0]), np.log(curve[:, 0]), np.minimum.accumulate(curve[:, 1]))
        gaps = {log[0]["config"]["epochs"]: gap for log, gap in zip(shorter, at_ends - ends[:-1, 1], strict=True)}
        flops = [crossing([(1, best), (curve[-1, 0], best)], points) for points in (curve, ends)]
        words = [f"{x:12.1e}" if x else f"{'before' if points[0, 1] <= best else 'none':>12}"
                 for x, points in zip(flops, (curve, ends), strict=True)]
        print(f"{U:7,}{longest[0]['config']['epochs']:12g}{''.join(words)}     "
              + ", ".join(f"{epochs:g}: {gap:+.3f}" for epochs, gap in gaps.items()))
        found[U] = gaps, *flops
    return found


def overtaken(seeds):
    """Where the seeds of one U overtake AR's best, as measured_crossings gives them ({} where nothing was measured)."""
    if not seeds:
        return "not measured"
    _, of_best, limit = np.array([*seeds.values()]).T
    if crossed := np.isfinite(of_best).sum():
        return f"{spread(of_best).split()[0]} with {crossed} of {len(seeds)} seeds"
    return f"not overtaken up to {limit.min():.1e}" if np.isfinite(limit).any() else "none: diffusion overfits first"


def critical_in_words(U, found, law=None, at_least=None):
    """The compute at which diffusion overtakes AR's best with U unique tokens, by what measured_crossings found.

    law and at_least: critical_laws' fits to AR's best, without and with limits. Between the least and the greatest U
    with a crossing it is the law's, in brackets how far single seeds are from it. For more text it is a guess: the
    lower end of the second law's interval, or the compute spent without a crossing on less text, if that is more.
    Without the laws it is what was measured.
    """
    _, of_best, limit = columns(found)
    crossed = [V for V, flops in of_best.items() if np.isfinite(flops).any()]
    if law and min(crossed) <= U <= max(crossed):
        away = np.concatenate([of_best[V] / critical_at(law, V)[0] for V in crossed])  # of each seed
        C = critical_at(law, U)[0]
        return f"{C:.1e} [{C * np.nanmin(away):.1e}, {C * np.nanmax(away):.1e}]"
    if at_least and U > max(crossed) and U not in found:
        spent = [limit[V].min() for V in found if max(crossed) < V < U and np.isfinite(limit[V]).all()]
        return f"extrapolated, a low guess: {max([critical_at(at_least, U)[1], *spent]):.1e}"
    return overtaken(found.get(U, {}))


KINDS = "plain AR", "AR, paper's settings", "regularised AR", "diffusion", "regularised diffusion"


def kind_of(config):
    """Which of KINDS, the columns of README's table of results, a run is."""
    if config["objective"] == "ar" and config["optimizer"] == "adamw":
        return "AR, paper's settings"
    if config["dropout"] or config.get("replace") or config.get("hide"):
        return "regularised AR" if config["objective"] == "ar" else "regularised diffusion"
    return "plain AR" if config["objective"] == "ar" else "diffusion"


def opponent_table(logs):
    """Print the lowest loss of each kind of model in runs [(config, records)] of one corpus, and what is overtaken.

    A line for each number U of unique tokens that has a stronger AR, means over the seeds. Diffusion overtakes
    AR's best with a seed if either of its bounds, with that seed, is under it by more than twice its error. Returns how
    many seeds do, {U: {kind of AR: (overtaken, seeds)}}.
    """
    assert len({config["data"] for config, _ in logs}) == 1, "runs of different corpora"
    ends = defaultdict(lambda: defaultdict(dict))  # {U: {kind: {seed: the last record of its lowest run}}}
    for config, records in logs:
        seeds, end = ends[config["unique_tokens"]][kind_of(config)], records[-1]
        if config["seed"] not in seeds or end["best_loss"] < seeds[config["seed"]]["best_loss"]:
            seeds[config["seed"]] = end
    print(f"{'':8}lowest loss of AR (=){'':11}of diffusion (≤)       AR's best is overtaken with so many seeds\n"
          f"{'U':>7}  plain  paper's  regul.    plain  regul.          plain  paper's  regularised")
    found = {}
    for U, kinds in sorted(ends.items()):
        if not any(kinds[kind] for kind in KINDS[1:3]):
            continue
        bounds = [{seed: end["best_loss"] + 2 * end["best_stderr"] for seed, end in kinds[kind].items()}
                  for kind in KINDS[3:]]
        found[U] = {kind: (sum(any(bound.get(seed, math.inf) < end["best_loss"] for bound in bounds)
                               for seed, end in kinds[kind].items()), len(kinds[kind])) for kind in KINDS[:3]}
        losses = [[end["best_loss"] for end in kinds[kind].values()] for kind in KINDS]
        mean = [np.mean(each) if each else math.nan for each in losses]
        print(f"{U:7,}  {mean[0]:5.3f}   {mean[1]:5.3f}   {mean[2]:5.3f}    {mean[3]:5.3f}   {mean[4]:5.3f}   "
              + "".join(f"{f'{n} of {of}':>11}" for n, of in found[U].values()))
    return found


def critical_laws(points, limits=None, samples=2000):
    """Power laws C (U / 4096)^b through points {U: FLOPs of each seed}: b and C, (1 + samples,) each.

    The first is the least-squares fit to log FLOPs, in which each U counts once. The others are fits to a bootstrap
    over the n seeds of each U, whose deviations from their mean are widened by sqrt(n/(n-1)): so few vary less than
    what they are drawn from. (In simulations with three seeds 90 % intervals then cover the truth in some 85 of 100
    cases, without it in 78.) A seed without a crossing (NaN) is a lower limit where limits {U: FLOPs of each seed} has
    a finite number for it: if the law is below the limit, the limit counts as a crossing, so that b is rather too
    small. Other seeds without one are left out. Raises ValueError below three U with a crossing.
    """
    rows = []  # (log U, log FLOPs, whether a limit) of each U, the last two (seeds,)
    for U, C in points.items():
        limit = ~np.isfinite(C)
        C = np.where(limit, (limits or {}).get(U, np.nan), C)
        if (some := np.isfinite(C)).any():
            rows.append((math.log(U / 4096), np.log(C[some]), limit[some]))
    if (crossed := sum(not limit.all() for *_, limit in rows)) < 3:
        raise ValueError(f"a power law from {crossed} numbers of unique tokens: it takes 3 that have a crossing")

    def fit(draw, widen):
        """The law of seeds drawn at each U; None if they have a crossing at fewer than two."""
        drawn = []
        for u, C, limit in rows:
            n, seeds = len(C), draw(len(C))
            wider = math.sqrt(n / (n - 1)) if widen and n > 1 else 1
            drawn.append((u, C.mean() + wider * (C[seeds] - C.mean()), limit[seeds]))
        if sum(not limit.all() for *_, limit in drawn) < 2:
            return None
        x, weight = (np.repeat(values, [len(C) for _, C, _ in drawn]) for values in
                     ([u for u, *_ in drawn], [len(C) ** -0.5 for _, C, _ in drawn]))  # polyfit squares the weight
        y, limit = (np.concatenate(values) for values in list(zip(*drawn, strict=True))[1:])
        used, before = ~limit, None
        while before is None or (used != before).any():  # until the limits that count are those above the law
            law = np.polyfit(x[used], y[used], 1, w=weight[used])
            before, used = used, ~limit | (np.polyval(law, x) < y)
        return law

    rng, laws = np.random.default_rng(0), [fit(np.arange, widen=False)]
    while len(laws) < 1 + samples:
        law = fit(lambda n: rng.integers(0, n, n), widen=True)
        laws += [law] if law is not None else []
    b, constants = np.array(laws).T
    return b, np.exp(constants)


def exponent_by_scatter(points):
    """The exponent b of critical_laws' fit, and its 90 % interval by how far the U lie from the line: (b, low, high).

    Of the n numbers U with a crossing each is one point, the mean of log FLOPs over its seeds; Student's t with n - 2
    degrees of freedom, as in any linear regression. It holds for scatter about a line, not for a line that bends.
    """
    x, y = np.array([(math.log(U), np.nanmean(np.log(C))) for U, C in points.items() if np.isfinite(C).any()]).T
    (b, _), covariance = np.polyfit(x, y, 1, cov=True)
    t = np.quantile(np.random.default_rng(0).standard_t(len(x) - 2, 10**6), 0.95)
    return b, b - t * covariance[0, 0] ** 0.5, b + t * covariance[0, 0] ** 0.5


def exponents_between(points):
    """The exponents of a power law from each U to the next, {(U, V): b}; points: {U: FLOPs of each seed, or NaN}."""
    mean = {U: np.nanmean(np.log(flops)) for U, flops in points.items() if np.isfinite(flops).any()}
    return {(U, V): (mean[V] - mean[U]) / math.log(V / U) for U, V in itertools.pairwise(mean)}


def with_interval(values):
    """The first of an array (..., 1 + samples), and the ends of the 90 % interval of the others: (3, ...)."""
    return np.stack([values[..., 0], *np.quantile(values[..., 1:], (0.05, 0.95), axis=-1)])


def critical_at(laws, U):
    """What critical_laws' (b, C) say of U unique tokens, a number or (n,): FLOPs, low, high as (3,) or (3, n)."""
    return with_interval(laws[1] * (np.asarray(U)[..., None] / 4096) ** laws[0])


# ----- beside the law: the settings of a run in words, likelihoods over orders, n-grams


def settings(config, width=128):
    """What of a run is not the old recipe of the laptop preset, in words ("" if nothing is); width: as usual there."""
    c = {"hide": 0, "replace": 0, "mask_weight": 0, "ema": 0, "batch": ""} | config  # the first logs lack them
    kind, _, value = c["batch"].rstrip(")").partition("(")  # of why.py: bell(3), ...
    clipped = c["mask_weight"] if c["objective"] == "diffusion" and kind != "bell" else 0
    adamw = c["optimizer"] == "adamw"
    words = {"AdamW": adamw, f"lr {c['lr']:g}": adamw or c["lr"] != 0.002, f"batch size {c['batch_size']}":
             c["batch_size"] != 16, f"width {c['n_embd']}": c["n_embd"] != width,
             f"weights min(1/t, {clipped:g})": clipped, "bell-shaped t": kind == "bell", "EMA": c["ema"],
             f"embedding's lr x {value}": kind == "embedding", f"lr down to {value}": kind == "decay",
             f"weight decay {c['weight_decay']:g}": c["weight_decay"] != 0.1, f"dropout {c['dropout']:g}": c["dropout"],
             f"{c['hide']:.0%} masked": c["hide"], f"{c['replace']:.0%} replaced": c["replace"]}
    return ", ".join(word for word, there in words.items() if there)


def lever_table(logs, width=128):
    """Print a line a run of {name: (config, records)}, with what it gains over the old recipe, as much regularised.

    Gain: how far its lowest loss is under that of the run with the same objective, epochs, dropout and replaced tokens,
    but without the other levers; for bounds ± the error of both. As low: the epoch at which its curve is as low as that
    run's ever got. Rows without such a run show neither. "The recipe" is the laptop preset's of today. Returns
    {(objective, epochs, settings): gain}.
    """
    def alike(c):
        return c["objective"], c["epochs"], c["dropout"], c.get("replace", 0)

    def lever(row):
        return bool(re.search("AdamW|batch|width|min|EMA", row[4]))

    rows = sorted([(*alike(c), settings(c, width), [{"config": c}, *records], name)
                   for name, (c, records) in logs.items()],
                  key=lambda row: (*row[:4], lever(row), row[4] != "", row[5][-1]["best_loss"]))
    old = {row[:4]: row[5] for row in rows[::-1] if not lever(row)}
    gains, last = {}, None
    for objective, epochs, *noise, words, log, name in rows:
        if objective != last:
            space = max(len(name.removeprefix(f"{objective}-")) for kind, *_, name in rows if kind == objective)
            print(f"{objective:{space}}   lowest epoch           gain as low  settings (wd: weight decay)")
        end, before, last = log[-1], old.get((objective, epochs, *noise)), objective
        gain = as_low = ""
        if before and before is not log and "width" not in words:  # another width is another network
            gains[objective, epochs, words] = difference = before[-1]["best_loss"] - end["best_loss"]
            error = math.hypot(before[-1].get("best_stderr", 0), end.get("best_stderr", 0))
            gain = f"{difference:+.3f}" + f" ± {error:.3f}" * (objective == "diffusion")
            low = sample.best_of(before)["val_loss"]
            as_low = f"{crossing([(1, low), (epochs, low)], sample.curve(log)) or math.inf:.0f}".replace("inf", "never")
        recipe = ["weights min(1/t, 1.5)"] * (objective == "diffusion") + ["EMA", "weight decay 0.5"]
        parts = re.split(r", (?![\d.]+\))", words)  # not at the comma in min(1/t, 1.5)
        if set(recipe) <= set(parts):  # in short
            parts = ["the recipe", *(part for part in parts if part not in recipe)]
        lowest = f"{'=' if objective == 'ar' else '≤'} {end['best_loss']:.3f}{sample.best_of(log)['epoch']:6g}"
        told = ", ".join(parts).replace("weight decay", "wd") if words else "old recipe"
        print(f"{name.removeprefix(f'{objective}-'):{space}}  {lowest}{gain:>15}{as_low:>7}  {told}")
    return gains


def read_likelihoods(*names):
    """probe.py's --only=orders in results/probe/NAME.jsonl, nats per token of N blocks.

    Returns {(split, run): {"left": (N,), "orders": (K, N), "averaged": (N,)}}, without those that a run has not.
    """
    rows = [json.loads(line) for name in names
            for line in (Path(__file__).parent / "results" / "probe" / f"{name}.jsonl").read_text().splitlines()]
    return {(row["split"], Path(row["run"]).name): {
        key: np.array(row[key]) / row["block_size"] for key in ("left", "orders", "averaged") if row.get(key)}
        for row in rows}


def mixture(nll, tokens=128):
    """-log p of N blocks under the mixture of K models whose own are nll (..., K, N): (..., N). All per token.

    The probability of a block is the mean of K, so that it takes -log p of whole blocks: `tokens` of them each.
    """
    return (np.log(nll.shape[-2]) - np.logaddexp.reduce(-nll * tokens, axis=-2)) / tokens


def difference(a, b):
    """The mean of a - b, both (seeds, N), and its standard error over the N blocks of text: an array of two."""
    gap = (np.asarray(a) - np.asarray(b)).mean(0)
    return np.array([gap.mean(), gap.std(ddof=1) / len(gap) ** 0.5])


def ngrams(tokens, blocks, V, n=4, discount=0.9):
    """-log p in nats per token of blocks (N, T) by the n-grams of tokens: absolute discounting, interpolated. (N,)"""
    after, nll = defaultdict(Counter), np.zeros(len(blocks))
    for i, token in enumerate(tokens):
        for m in range(min(n, i + 1)):
            after[tuple(tokens[i - m:i])][token] += 1
    for row, block in enumerate(blocks):
        for i, token in enumerate(block):
            p = 1 / V
            for m in range(min(n, i + 1)):
                if seen := after.get(tuple(block[i - m:i])):
                    p = (max(seen[token] - discount, 0) + discount * len(seen) * p) / seen.total()
            nll[row] -= np.log(p)
    return nll / len(blocks[0])


def seed_noise(rows):
    """The standard deviation of log L between seeds of the same N, U and E, from table()'s rows."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["N"], row["U"], row["E"]].append(math.log(row["loss"]))
    return math.sqrt(np.mean([np.var(each, ddof=1) for each in cells.values() if len(each) > 1]))


def main():
    """Print a line of JSON a design of the grid: the 5, 50 and 95 % quantiles of R_D* in simulate()."""
    import study

    argparse.ArgumentParser(description=f"{main.__doc__} It takes some minutes.").parse_args()
    for objective, rows in off_plateau(study.read("grid-char")).items():
        law, _, _, residuals = fit(rows)
        one = [row for row in rows if row["seed"] == 1]
        for kind, noise in (("misfit", residuals.std().item()), ("seeds", seed_noise(rows))):
            for seeds in (1, 2):
                quantiles = np.quantile(simulate(one, law, noise, seeds), (0.05, 0.5, 0.95)).round(1).tolist()
                row = {"objective": objective, "runs": len(one) * seeds, "of": kind, "noise": round(noise, 4),
                       "R_D": law["R_D"], "quantiles": quantiles, "command": "python notebooks/laws.py"}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
