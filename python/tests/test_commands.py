"""The commands of the package."""

import json
import subprocess
import sys

from torch.nn.functional import scaled_dot_product_attention


def run(module, *arguments):
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)


def test_selftest_passes_here():
    done = run("ferroflash.selftest", "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "24 passed, 0 failed"


def test_bench_measures_what_is_here(tmp_path):
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    sizes = ["--seqlens", "32,64", "--tokens", "64", "--hidden", "64", "--headdims", "32", "--rounds", "1"]
    peers = ["--peers", "ferroflash,torch math,flash_attn 3", "--device", "cpu"]
    done = run("ferroflash.bench", *sizes, *peers, "--repetitions", "1", "--html", str(page), "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row["name"] for row in rows} == {"ferroflash", "torch math"}
    for row in rows:
        assert row["tflops"] > 0 and all(error < 1e-2 for error in row["relative_errors"].values())
        assert list(row["relative_errors"]) == (["o"] if row["direction"] == "forward" else ["dq", "dk", "dv"])
    assert page.read_text().count("<polyline") == 4 * 2
    assert "flash_attn 3: not here" in done.stdout


def test_bench_measures_groups_and_sequences_of_different_lengths(tmp_path):
    figures = tmp_path / "figures.json"
    sizes = ["--seqlens", "24", "--tokens", "96", "--hidden", "128", "--headdims", "32", "--heads-k", "2", "--causal", "1"]
    few = ["--rounds", "1", "--repetitions", "1", "--device", "cpu", "--json", str(figures)]
    # PyTorch 2.5 and newer group heads.
    groups = "enable_gqa" in str(scaled_dot_product_attention.__doc__)
    for kind, others in (("--varlen", None), ("--deterministic", "torch math" if groups else None)):
        done = run("ferroflash.bench", *sizes, *few, kind, "--peers", "ferroflash,torch math")
        assert done.returncode == 0, done.stdout + done.stderr
        measured = json.loads(figures.read_text())
        assert all(tflops > 0 for tflops in measured["matmul_tflops"])
        for row in measured["rows"]:
            assert row["nheads"] == 4 and row["nheads_k"] == 2
            if kind == "--varlen":
                assert sum(row["lengths"]) == 96 and len(set(row["lengths"])) > 1
            if row["name"] in ("ferroflash", others):
                assert row["tflops"] > 0 and all(error < 1e-2 for error in row["relative_errors"].values())
            elif kind == "--varlen":
                assert row["refused"] == "NotImplementedError: one length for all sequences"
            else:
                assert "enable_gqa" in row["refused"]


def test_bench_names_what_is_bad():
    done = run("ferroflash.bench", "--heads-k", "3", "--hidden", "128", "--headdims", "32")
    assert done.returncode == 2
    assert "--heads-k: 3; allowed: a divisor of 4" in done.stderr
    done = run("ferroflash.bench", "--peers", "nobody")
    assert done.returncode == 2
    assert "--peers: 'nobody'; allowed: ferroflash, torch sdpa, torch flash" in done.stderr


def test_bench_measures_what_a_call_costs(tmp_path):
    figures = tmp_path / "figures.json"
    done = run("ferroflash.bench", "--overhead", "--device", "cpu", "--rounds", "1", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())["microseconds"]
    assert list(rows) == ["ferroflash.attention", "ferroflash.flash_attn_func", "torch sdpa"]
    for row in rows.values():
        assert set(row) == {"forward", "forward + backward"} and all(time > 0 for time in row.values())
    assert "microseconds a call" in done.stdout
