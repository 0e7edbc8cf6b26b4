"""The number of CPU threads: as many as are not slower, whatever else the machine computes."""

import pytest
import torch

import model
import train
from conftest import run
from train import load_checkpoint


@pytest.fixture(autouse=True)
def as_a_person_has_it(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(before)


class Machine:
    """A clock, and work that takes what it takes with each number of threads."""

    def __init__(self, monkeypatch, seconds, slow=None):
        self.now, self.seconds, self.slow, self.calls = 0.0, seconds, slow, 0
        monkeypatch.setattr(model.time, "perf_counter", lambda: self.now)

    def work(self):
        self.now += self.seconds[torch.get_num_threads()] + 100 * (self.calls == self.slow)
        self.calls += 1


@pytest.mark.parametrize("seconds, best", [
    ({1: 160, 2: 100}, 2), ({1: 160, 2: 340}, 1), ({1: 160, 2: 3700}, 1), ({1: 160, 2: 158}, 1), ({1: 160, 2: 145}, 2),
    ({1: 400, 2: 210, 4: 120}, 4), ({1: 400, 2: 210, 4: 900}, 2), ({1: 400, 2: 800, 4: 2000}, 1)])
def test_the_most_threads_that_are_not_slower(monkeypatch, seconds, best):
    machine = Machine(monkeypatch, seconds)
    model.settle_threads(machine.work, max(seconds))
    assert torch.get_num_threads() == best
    assert machine.now <= 4 * sum(seconds.values())  # and it did not take long


@pytest.mark.parametrize("slow", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("seconds, best", [({1: 160, 2: 90}, 2), ({1: 160, 2: 340}, 1)])
def test_one_slow_step_decides_nothing(monkeypatch, slow, seconds, best):
    machine = Machine(monkeypatch, seconds, slow)
    model.settle_threads(machine.work, 2)
    assert torch.get_num_threads() == best


def test_when_the_machine_is_free_again_all_threads_are_back(monkeypatch):
    machine = Machine(monkeypatch, {1: 160, 2: 340})
    model.settle_threads(machine.work, 2)
    assert torch.get_num_threads() == 1
    machine.seconds = {1: 160, 2: 100}
    model.settle_threads(machine.work, 2)
    assert torch.get_num_threads() == 2


def test_a_number_that_a_person_set_stays(monkeypatch):
    machine = Machine(monkeypatch, {1: 160, 2: 340})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    model.settle_threads(machine.work, 2)
    assert torch.get_num_threads() == 2 and not machine.calls


def settle_after_every_step(monkeypatch):
    settle = train.Run.settle

    def at_once_again(self):
        settle(self)
        self.settle_at = 0

    monkeypatch.setattr(train.Run, "settle", at_once_again)


def test_a_run_says_how_many_it_takes_and_gives_them_back(corpus, tmp_path, monkeypatch, capsys):
    numbers = iter([2, 1, 1, 2] + 1000 * [2])
    monkeypatch.setattr(train, "settle_threads", lambda work, most: torch.set_num_threads(next(numbers)))
    settle_after_every_step(monkeypatch)
    torch.set_num_threads(2)
    log = run(corpus, tmp_path / "run", eval_every=0.125)  # 1024 tokens, 8 blocks of 16 a step: 8 steps an epoch
    assert log[0]["config"]["threads"] == 2 and [record["threads"] for record in log[1:6]] == [1, 1, 2, 2, 2]
    out = capsys.readouterr().out
    assert out.count("threads are the fastest now") == 2 and "step 1: 1 of 2 threads" in out
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(train, "settle_threads", lambda work, most: torch.set_num_threads(1))
    run(corpus, tmp_path / "busy")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_to_try_what_is_fast_changes_no_result(corpus, tmp_path, monkeypatch, objective):
    settle_after_every_step(monkeypatch)
    tried = []
    for name, try_out in (("plain", lambda work, most: None), ("tried", lambda work, most: tried.append(work()))):
        monkeypatch.setattr(train, "settle_threads", try_out)
        run(corpus, tmp_path / name, objective=objective, dropout=0.2, replace=0.1, epochs=3.0)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("plain", "tried"))
    assert len(tried) == 25  # at the start, and after each of 24 steps
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert a["records"][-1]["train_loss"] == b["records"][-1]["train_loss"]
