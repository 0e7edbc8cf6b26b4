"""The benchmark runs, counts what it says it counts, and its reference is a model of the same size as ours."""

import json

import bench
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import make_model
from train import get_batch


def test_tiny_benchmark(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main(["--shapes=tiny", "--repeats=2", "--device=cpu", f"--json={file}"]) == 0
    table = capsys.readouterr().out.splitlines()
    content = json.loads(file.read_text())
    rows, c = content["rows"], content["shapes"]["tiny"]
    assert len(table) == len(rows) + 3  # the device, the names of the columns, the seconds it took
    assert {"processor", "threads", "torch", "device"} <= set(content["machine"])
    train = [row for row in rows if row["what"] == "train" and row["who"] != "floor"]
    best = max(row["dtype"] == "bfloat16" for row in train)
    assert len(train) == (8 if best else 5)
    for row in rows:
        assert len(row["times"]) == 2 and row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        if row["tokens_per_s"]:
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    for row in train:
        assert row["tokens"] == c["batch_size"] * c["block_size"] and row["memory"] >= 0 and row["x_ref"] > 0
        assert (row["diffusion_over_ar"] is None) == (row["who"] != "diffusion")
    assert {row["who"] for row in rows if row["what"] == "evaluate"} == {"ar", "diffusion"}
    assert any(row["what"].startswith("sample") for row in rows)


def test_flops_leave_out_what_diffusion_does_not_compute_where_nothing_is_scored():
    """By PyTorch's own count of the products of a step, which is the same for both objectives but for that."""
    counted = {}
    for who in ("ar", "diffusion"):
        c = bench.shape_config("tiny", who)
        model = make_model(c)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(**get_batch(c, torch.randint(c["vocab_size"], (bench.UNIQUE,)), 0)[0]).mean().backward()
        counted[who] = counter.get_total_flops()
    n = model.num_params()
    assert bench.flops(c, "ar", n) - bench.flops(c, "diffusion", n) == counted["ar"] - counted["diffusion"] > 0
    tokens = c["batch_size"] * c["block_size"]
    assert bench.flops(c, "ar", n) == 6 * n * tokens + 12 * c["n_layer"] * c["n_embd"] * c["block_size"] * tokens


@pytest.mark.parametrize("shape", [shape for shape in bench.SHAPES if shape != "tiny"])
def test_reference_has_the_size_of_our_model(shape):
    with torch.device("meta"):
        ours = make_model(bench.shape_config(shape)).num_params()
        reference = sum(p.numel() for p in bench.Reference(bench.shape_config(shape)).parameters())
    assert reference == pytest.approx(ours, rel=0.15)


def test_errors_name_the_value(capsys):
    assert bench.main(["--shapes=huge"]) == 2 and "--shapes=huge: choose among" in capsys.readouterr().err
    assert bench.main(["--repeats=0"]) == 2 and "--repeats=0" in capsys.readouterr().err
