"""notebooks/tasks.py: items that only differ where they should, scores that are fair to both, and who is at chance."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import probe
import tasks
import train
from conftest import tiny
from model import GPT, GPTConfig, UserError

T = 32
WORDS = ("a an is are was were has have this these be been they them we us his him nation people treaty harbor "
         "senate duties island public revenue subject measure present general foreign another between").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One text of random words as characters and as BPE, and a run of each objective that overfits 1,024 tokens."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    for i in range(60):
        text = "".join(" ".join(rng.choice(WORDS, 8)).capitalize() + ". " for _ in range(30))
        (folder / f"{i}.txt").write_text(text)
    texts = sorted(folder.glob("*.txt"))
    prepare.prepare(inputs=texts, tokenizer="char", out=folder / "char")
    prepare.prepare(inputs=texts, tokenizer="bpe", vocab_size=300, out=folder / "bpe")
    for objective, epochs in (("ar", 20), ("diffusion", 80)):
        train.train(train.make_config(
            "laptop", objective=objective, data=str(folder / "char"), unique_tokens=1024, epochs=epochs, n_layer=2,
            n_head=1, n_embd=64, block_size=T, batch_size=8, eval_blocks=16, device="cpu", dtype="float32", lr=0.01,
            out=str(folder / f"{objective}-s1")))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return {kind: prepare.load(folder / kind) for kind in ("char", "bpe")}


@pytest.fixture(scope="module")
def made(data):
    return {kind: tasks.make(data[kind], "val", T, 250) for kind in data}


def accuracies(made, scores):
    """{task: (accuracy, interval)} of a function from blocks (Q, K, T) to -log p (Q, K)."""
    return {task: tasks.mean_interval(tasks.points(scores(blocks))) for task, blocks in made.items()}


# ----- the items


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_choices_are_the_text_but_for_one_span_in_the_middle(data, made, kind):
    tokenizer, text = data[kind].tokenizer, data[kind].splits["val"].astype(np.int64).tobytes()
    known = set(re.findall("[a-z]+", tokenizer.decode(data[kind].splits["val"]).lower()))
    for task, blocks in made[kind].items():
        assert blocks.shape == (250, round(1 / tasks.CHANCE[task]), T)
        for choices in blocks:
            assert choices[0].tobytes() in text and len({choice.tobytes() for choice in choices}) == len(choices)
            differs = np.flatnonzero((choices != choices[0]).any(0))
            assert T // 4 <= differs[0] and differs[-1] < 3 * T // 4
            true, *others = (tokenizer.decode(choice) for choice in choices)
            for other in others:  # words change, where they are does not
                words = [re.sub("[^a-z ]", "", choice).split(" ") for choice in (true, other)]
                changed = [(a, b) for a, b in zip(*words, strict=True) if a != b]
                assert len(changed) == (2 if task == "order" else 1)
                a, b = changed[0]
                if task == "invented":
                    assert sorted(a) == sorted(b) and b not in known and len(a) > 3
                if task == "letter":
                    assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
                if task == "agreement":
                    assert (a, b) in tasks.PAIRS or (b, a) in tasks.PAIRS
                if task == "order":
                    assert changed[1] == (b, a)


def test_the_tokens_of_a_choice_are_those_of_its_text(data, made):
    tokenizer = data["bpe"].tokenizer
    starts = np.array([piece.startswith(b" ") for piece in tokenizer.pieces])
    for blocks in made["bpe"].values():
        for choice in blocks.reshape(-1, T):
            first, *_, last = np.flatnonzero(starts[choice])  # a block may begin and end within a word
            assert tokenizer.encode(tokenizer.decode(choice[first:last])).tolist() == choice[first:last].tolist()


def test_a_seed_gives_the_same_items_and_fewer_are_the_first_of_more(data, made):
    again, other = tasks.make(data["char"], "val", T, 250), tasks.make(data["char"], "val", T, 400, seed=1)
    few = tasks.make(data["char"], "val", T, 50)
    for task, blocks in made["char"].items():
        assert np.array_equal(again[task], blocks) and np.array_equal(few[task], blocks[:50])
        assert not np.array_equal(other[task], blocks)


def test_an_item_can_not_be_guessed_from_how_frequent_or_long_its_words_are(data, made):
    tokens = torch.from_numpy(data["char"].splits["train"][:4096].astype(np.int64))
    V = data["char"].tokenizer.vocab_size
    unigram = accuracies(made["char"], lambda blocks: tasks.score_ngrams(tokens, blocks, V, 1))
    for task, (right, interval) in unigram.items():
        assert abs(right - tasks.CHANCE[task]) < (1.5 * interval if task == "letter" else 0.02), task
    for task in ("invented", "order"):  # the letters are the same: all ties
        assert unigram[task][0] == 0.5 and unigram[task][1] < 0.01
    for kind in ("char", "bpe"):
        size = np.array([len(piece) for piece in data[kind].tokenizer.pieces])
        for task, (right, _) in accuracies(made[kind], lambda blocks, s=size: s[blocks].sum(2)).items():
            assert right == pytest.approx(tasks.CHANCE[task], abs=0.02), task


def test_a_text_without_items_is_told(data):
    with pytest.raises(UserError, match="no text for the task 'invented' in blocks of 100000 tokens"):
        tasks.make(data["char"], "val", 100000)


# ----- the scores


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_uniform_model_is_at_chance_by_ties(data, made, objective, kind):
    model = GPT(GPTConfig(objective, data[kind].tokenizer.vocab_size, T, 1, 1, 16)).eval()
    torch.nn.init.zeros_(model.embed.weight)
    for task, blocks in made[kind].items():
        assert np.all(tasks.points(tasks.score(model, blocks[:40])) == tasks.CHANCE[task])


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_an_untrained_model_guesses(data, made, objective):
    model = tiny(objective, data["char"].tokenizer.vocab_size, T, n_layer=1)
    for task, (right, interval) in accuracies(made["char"], lambda blocks: tasks.score(model, blocks)).items():
        assert abs(right - tasks.CHANCE[task]) < 1.5 * interval, (task, right)


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_a_model_that_has_learnt_the_text_is_right(folder, data, objective):
    opened, char = probe.open_checkpoint(folder / f"{objective}-s1", "last"), data["char"]
    same = char._replace(splits=char.splits | {"val": char.splits["train"][:1024]})
    found = accuracies(tasks.make(same, "val", T, 200), lambda blocks: tasks.score(opened.model, blocks))
    assert found["letter"][0] > 0.95 and found["invented"][0] > 0.95, found


def joint_models(V, length, seed=0):
    """A random table of p(x_1..x_T), and from it an AR model and a diffusion model, which so agree."""
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet([0.3] * V**length)).view([V] * length)

    def conditional(known):
        """log p (V,) of the first unknown token (None) given the others, the unknown ones after it summed out."""
        at = known.index(None)
        rows = p[tuple(slice(None) if token is None else token for token in known)]  # (V, ..., V)
        assert all(token is not None for token in known[:at])
        weight = rows.flatten(1).sum(1) if rows.dim() > 1 else rows
        return (weight / weight.sum()).log()

    def ar_logits(past):  # (B, T) with the start symbol first
        return torch.stack([torch.stack([conditional([*row[1:i + 1], *[None] * (length - i)])
                                         for i in range(length)]) for row in past.tolist()])

    def diffusion_hidden(x, at):
        return torch.stack([conditional([None if token == V else token for token in x[i // length].tolist()])
                            for i in at.tolist()])

    embed = torch.nn.Embedding(1, 1)
    ar = SimpleNamespace(config=GPTConfig("ar", V, length), embed=embed, logits=ar_logits)
    diffusion = SimpleNamespace(config=GPTConfig("diffusion", V, length), embed=embed, hidden=diffusion_hidden,
                                head=lambda h: h)
    return p, ar, diffusion


def test_ar_and_diffusion_of_one_joint_distribution_score_alike():
    V, length = 3, 4
    p, ar, diffusion = joint_models(V, length)
    texts = list(itertools.product(range(V), repeat=length))
    blocks = np.array([pair for pair in itertools.combinations(texts, 2)])  # (3240, 2, 4): spans of 1 to 4 tokens
    truth = -np.array([[math.log(p[text]) for text in pair] for pair in blocks.tolist() for pair in [map(tuple, pair)]])
    for model in (ar, diffusion):
        nll = tasks.score(model, blocks)
        assert nll[:, 0] - nll[:, 1] == pytest.approx(truth[:, 0] - truth[:, 1], abs=1e-9)
        assert np.array_equal(tasks.points(nll), tasks.points(truth))


def test_equally_likely_choices_share_a_point():
    nll = np.array([[1, 2, 3], [2, 1, 3], [1, 1, 3], [1, 1, 1], [2, 1, 1], [1 + 1e-9, 1, 2]])
    assert tasks.points(nll).tolist() == pytest.approx([1, 0, 1 / 2, 1 / 3, 0, 1 / 2])


def test_ngrams_see_the_same_in_the_middle_as_in_the_whole_block(data, made):
    tokens, V = data["char"].splits["train"][:2000].astype(np.int64), data["char"].tokenizer.vocab_size
    for blocks in made["char"].values():
        blocks = blocks[:20]
        whole = T * tasks.ngrams(tokens.tolist(), blocks.reshape(-1, T).tolist(), V).reshape(blocks.shape[:2])
        nll = tasks.score_ngrams(tokens, blocks, V)
        assert nll - nll[:, :1] == pytest.approx(whole - whole[:, :1], abs=1e-9)


# ----- memorised with both sides


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
@pytest.mark.parametrize("step, share", [(1, 1), (2, 0)])
def test_completed_counts_what_is_written_verbatim(objective, step, share):
    """A text in which each token follows from the one before it, and a model that adds `step` to that."""
    V = 7

    def hidden(x, cache=None, at=None):
        if objective == "diffusion":
            assert (x[:, T // 2 + 4:] < V).all()  # the right side is given
            x = F.pad(x[:, :-1], (1, 0))  # a mask follows from what is to its left
        return F.one_hot((x + step) % V, V).double()

    model = SimpleNamespace(config=GPTConfig(objective, V, T), embed=torch.nn.Embedding(1, 1), hidden=hidden,
                            head=lambda h: h, blocks=[])
    assert tasks.completed(model, np.arange(300) % V, N=70).tolist() == [share] * 70


# ----- gaps filled


def test_from_the_left_diffusion_reads_no_more_than_ar():
    V = 7

    def hidden(x, cache=None, at=None):
        assert (x[:, T // 2 + 4:] == V).all()
        return F.one_hot((F.pad(x[:, :-1], (1, 0)) + 1) % V, V).double()

    model = SimpleNamespace(config=GPTConfig("diffusion", V, T), embed=torch.nn.Embedding(1, 1), hidden=hidden,
                            head=lambda h: h)
    assert tasks.completed(model, np.arange(300) % V, left=True, N=70).all()


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_a_model_without_a_number_finds_nothing(objective):
    model = tiny(objective, V=3, T=5)
    torch.nn.init.constant_(model.embed.weight, torch.nan)
    assert not any(found.any() for found in tasks.fill(model, torch.full((4, 5), 2), 1).values())


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_the_nats_of_a_word_are_the_chain_rule_by_hand(objective):
    """AR's given what is before it, diffusion's given both sides."""
    model, V, T, n = tiny(objective, V=3, T=5), 3, 5, 2
    x = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(0))
    begin, expected = (T - n + 1) // 2, torch.zeros(4, dtype=torch.float64)
    for i in range(begin, begin + n):
        if objective == "ar":
            seen = F.pad(x[:, :i], (1, 0), value=V)
            logits = model.logits(seen)[:, -1]
        else:
            seen = x.clone()
            seen[:, i:begin + n] = V
            logits = model.logits(seen)[:, i]
        expected += F.cross_entropy(logits.double(), x[:, i], reduction="none").detach()
    torch.testing.assert_close(tasks.word_nats(model, x, n), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_gap_is_a_whole_word_in_the_middle_of_a_block(data, kind):
    gapped = tasks.gaps(data[kind], "val", T, 200)
    assert sum(map(len, gapped.values())) == 200 and tasks.stack(gapped).shape == (200, T)
    for n, blocks in gapped.items():
        begin = (T - n + 1) // 2
        for x in blocks:
            word = data[kind].tokenizer.decode(x[begin:begin + n])
            assert word[0] == " " and word[1:] in WORDS
    again = tasks.gaps(data[kind], "val", T, 200)
    assert all(np.array_equal(gapped[n], again[n]) for n in gapped)


def test_ar_chooses_the_candidate_that_the_right_side_fits():
    """After 0 come 1 or 2, and then 3 after 1 and 4 after 2: the left side alone takes 1, which is a bit likelier."""
    V, T = 5, 5
    table = torch.full((V + 1, V), -20.0)
    for a, b in ((V, 0), (0, 1), (0, 2), (1, 3), (2, 4), (3, 0), (4, 0)):
        table[a, b] = 0.0
    table[0, 1] += 1e-3
    model = GPT(GPTConfig("ar", V, T, n_layer=1, n_head=1, n_embd=8)).eval()
    model.hidden = lambda x, cache=None, at=None: F.embedding(x, table).flatten(0, 1)[
        torch.arange(x.numel()) if at is None else at].view(*(x.shape if at is None else at.shape), V)
    model.head = lambda h: h
    x = torch.tensor([[3, 0, 1, 3, 0], [4, 0, 2, 4, 0]]).repeat(20, 1)
    found = tasks.fill(model, x, 1, widths=(1, 2))
    assert found[1].tolist() == [True, False] * 20 and found[2].all() and found["any"].all()
    assert tasks.fill(model, x, 1, widths=(1,))["any"].all()  # the beam of one did not find what is likelier


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_with_a_beam_that_holds_all_the_likeliest_filling_is_found(objective):
    """By trying all V^n fillings; a narrow beam finds one that is at most as likely."""
    model, (V, T, n) = tiny(objective, V=3, T=5), (3, 5, 2)
    torch.nn.init.normal_(model.embed.weight)
    x = torch.randint(V, (6, T), generator=torch.Generator().manual_seed(0))
    begin = (T - n + 1) // 2
    for block in x:
        texts = block.repeat(V**n, 1)
        texts[:, begin:begin + n] = torch.tensor([*itertools.product(range(V), repeat=n)])
        if objective == "ar":
            nll = T * model(texts).detach()
        else:
            target = torch.zeros_like(texts, dtype=torch.bool)
            target[:, begin:begin + n] = True
            nll = probe.conditional_nll(model, texts, target)
        best = texts[nll.argmin()]
        found = [tasks.fill(model, text[None], n, (V**n,)) for text in texts]
        assert [wide[V**n].item() for wide in found] == [bool((text == best).all()) for text in texts]
        assert all(wide["any"] == wide[V**n] for wide in found)
        for text in texts:
            narrow = tasks.fill(model, text[None], n, (1,))
            assert narrow[1] <= narrow["any"]
            if (text == best).all():
                assert narrow["any"]


@pytest.mark.parametrize("step, right", [(1, True), (2, False)])
def test_diffusion_fills_from_both_sides(step, right):
    """A text in which each token is that after it less one, and a model that takes `step` from that."""
    V = 7

    def hidden(x, cache=None, at=None):
        after = F.pad(x[:, 1:], (0, 1))  # a mask follows from what is to its right, if that is known
        return 9 * (F.one_hot((after - step) % V, V).float() * (after < V)[..., None]).flatten(0, 1)[at]

    model = SimpleNamespace(config=GPTConfig("diffusion", V, T), hidden=hidden, head=lambda h: h)
    x = (torch.arange(T) + torch.arange(50)[:, None]) % V
    assert [found.tolist() for found in tasks.fill(model, x, 1).values()] == [[right] * 50] * 4


def test_the_4_grams_fill_a_gap_with_the_word_that_both_sides_fit(data):
    """Between A or B and C or D stands one of four words: each side alone knows half of it."""
    rng, words = np.random.default_rng(0), {"AC": "an", "AD": "is", "BC": "us", "BD": "we"}
    text = "".join(f"{side[0]} {words[side]} {side[1]}. " for side in rng.choice([*words], 500))
    tokenizer = prepare.Tokenizer.train("char", [text])
    spoken = data["char"]._replace(tokenizer=tokenizer, splits={"train": tokenizer.encode(text)})
    gapped = tasks.gaps(spoken, "train", T, 200)
    right = tasks.fill_ngrams(spoken, spoken.splits["train"], gapped)
    assert [*gapped] == [3] and right.all()


# ----- the command line, and what is made of its lines


def lines(capsys, *argv):
    capsys.readouterr()
    assert tasks.main([str(a) for a in argv]) == 0
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


def test_a_line_a_run_and_task_and_the_same_items_for_all(folder, data, capsys, tmp_path):
    runs = [folder / "ar-s1", folder / "diffusion-s1"]
    found = lines(capsys, *runs, "--items=60", "--checkpoint=last")
    names = [*tasks.CHANCE, "completed", "completed, held out", "nats", "gap, 1", "gap, 4", "gap, 16", "gap, any"]
    assert [row["task"] for row in found if row["run"] == str(runs[0])] == names
    assert [row["run"] for row in found[:3]] == ["4-gram", "length", "unigram"] and len(found) == 16 + 12 + 14
    assert all(row["command"].endswith("diffusion-s1 --items=60 --checkpoint=last") for row in found)
    for task in names:
        assert task == "nats" or len({row["items_sha256"] for row in found if row["task"] == task}) == 1
    model = probe.open_checkpoint(runs[1], "last").model
    letter = next(row for row in found if row["task"] == "letter" and row["run"] == str(runs[1]))
    expected = tasks.points(tasks.score(model, tasks.make(data["char"], "val", T, 60)["letter"]))
    assert letter["accuracy"] == pytest.approx(expected.mean(), abs=1e-4) and len(letter["found"]) == 60

    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    table = tasks.read(path)
    assert table["char", "diffusion", "last", "letter"].tolist() == [expected.tolist()]
    both = [table["char", name, "last", "order"] for name in ("ar", "diffusion")]
    gap, interval = tasks.compare(*both)
    each = (both[0] - both[1])[0]
    assert gap == pytest.approx(each.mean())
    assert interval == pytest.approx(1.96 * max(each.std(), 1 / 60) / math.sqrt(60))
    assert tasks.compare(both[0], both[0])[0] == 0
    path.write_text(path.read_text() + json.dumps(letter | {"items_sha256": "0", "run": "out/other"}) + "\n")
    with pytest.raises(ValueError, match="out/other met other items of 'letter'"):
        tasks.read(path)


@pytest.mark.parametrize("only, told", [
    ("nats", ["nats"]), ("left", ["completed from the left"] * 2), ("choices", [*tasks.CHANCE])])
def test_a_part_alone_is_no_more(folder, capsys, only, told):
    found = lines(capsys, folder / "diffusion-s1", "--items=20", "--checkpoint=last", f"--only={only}")
    found = [row for row in found if row["run"].endswith("diffusion-s1")]
    assert [row["task"].removesuffix(", held out") for row in found] == told


def test_a_text_without_a_task_serves_for_the_others(folder, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "make", None)  # which would say that the text has none
    assert lines(capsys, folder / "diffusion-s1", "--items=20", "--checkpoint=last", "--only=completed")


def test_an_ensemble_makes_its_choices_by_the_mean_probability(folder, data, capsys):
    runs = [folder / "diffusion-s1"] * 2
    alone, twice = lines(capsys, runs[0], "--items=20", "--only=choices", "--checkpoint=best"), lines(
        capsys, *runs, "--items=20", "--ensemble")
    assert [row["run"] for row in twice] == ["2 x diffusion"] * 5
    assert [row["found"] for row in twice] == [row["found"] for row in alone if row["run"] == str(runs[0])]
    assert tasks.main([str(folder / "ar-s1"), str(runs[0]), "--ensemble"]) == 2
    assert "differ in objective" in capsys.readouterr().err


def test_what_a_person_can_get_wrong_is_told_in_one_line(folder, capsys):
    capsys.readouterr()
    assert tasks.main([str(folder / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "no such checkpoint" in err
    with pytest.raises(SystemExit):
        tasks.main([str(folder / "ar-s1"), "--items=1"])
    assert "--items=1" in capsys.readouterr().err
