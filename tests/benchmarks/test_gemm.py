"""The parts of the benchmarks that need no GPU."""

import gzip
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases
import gemm as race
import gpu_tables
import report
import tables
import timing
from models import encode, encode_gpu, passes, train
from ops import cpu_ops, instruction_sets
from quality import ablation

from tritern_kernels import cpu
from tritern_kernels.config import formula

CPU_CONTESTANTS = [
    "tritern int8",
    "tritern int8, 4 bits",
    "F.linear bf16",
    "F.linear fp16",
    "torch._int_mm int8",
]


def test_shapes():
    assert cases.parse_shapes(["1x2x3"], [5]) == [(1, 2, 3)]
    minilm = cases.parse_shapes(["minilm", "bge-small"], [1, 16])
    assert len(minilm) == 6 and minilm[0] == (1, 384, 384)  # the two models share their shapes
    with pytest.raises(ValueError, match="one of minilm.*received 'bert'"):
        cases.parse_shapes(["bert"], [1])
    with pytest.raises(ValueError, match="at least 1"):
        cases.parse_shapes(["0x2x3"], [1])


@pytest.fixture(scope="module")
def case():
    return cases.make_case(cases.Shape(17, 40, 300), seed=0, quick=True, device="cpu")


@pytest.mark.parametrize("name", CPU_CONTESTANTS)
def test_the_check_passes_the_right_result_and_no_other(name, case, monkeypatch):
    monkeypatch.setattr(race, "_config", lambda mode, case, bits=2: formula(mode, 17, 40, 300, 90, 132, bits))
    entry = race.CONTESTANTS[name](case)
    out = entry.call(entry.weights)
    assert cases.check("first call", out, entry)[1] == ""
    wrong = out.clone()
    wrong[3, 7] += wrong.abs().max() + 1
    assert "failed the check against float64" in cases.check("first call", wrong, entry)[1]
    if out.is_floating_point():
        wrong[3, 7] = float("nan")
        assert "failed" in cases.check("first call", wrong, entry)[1]
    with pytest.raises(ValueError, match="must have shape"):
        cases.check("first call", out[:5], entry)


def test_speeds_and_losing_rows_are_shown():
    base = cases.Row(
        "F.linear bf16", 1, 2, 3, cold=cases.Times(10, 9, 11, 5, 5), hot=cases.Times(8, 7, 9, 5, 5)
    )
    slow = replace(base, contestant="tritern int8", cold=cases.Times(20, 19, 21, 5, 5), note="16t")
    broken = cases.Row("gemlite A8W158", 1, 2, 3, reason="gemlite is not installed")
    rows = timing.with_speeds([base, slow, broken], ("F.linear bf16", "F.linear fp16"))
    assert rows[1].cold_speed == 0.5 and rows[1].hot_speed == 1.0
    text = report.case_table(rows)
    assert "0.50" in text and "no time: gemlite is not installed" in text


def test_json_is_whole_and_has_no_nan(tmp_path):
    report.write_json(tmp_path / "deep" / "a.json", {"x": float("nan"), "y": [1.5, float("inf")]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"x": None, "y": [1.5, None]}


def test_percentiles_and_roofs():
    found = timing.times([1e-6 * v for v in (1, 2, 3, 4, 5)], 1)
    assert found.median == pytest.approx(3) and found.p20 < 3 < found.p80
    roofs = cases.Roofs(copy_tb_s=4.0, bf16_tflops=800.0)
    assert roofs.at(100) == 400.0 and roofs.at(1000) == 800.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it races instead")
def test_without_a_gpu_the_compiled_configurations_are_shown(tmp_path, monkeypatch, capfd):
    """By ``compile_check.py``, whose own test compiles them."""
    run, commands = subprocess.run, []

    def no_compiler(command, check):
        commands.append(command)
        return run([command[0], command[1], "--help"], check=check)

    monkeypatch.setattr(race, "INTERPRETED", False)
    monkeypatch.setattr(race.subprocess, "run", no_compiler)
    assert race.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    output = capfd.readouterr().out
    assert "No CUDA GPU, so no timings" in output and "--capability" in output and "--json" in output
    assert commands[0][2:] == ["--capability", "90", "--json", str(tmp_path / "rows.json")]


def test_encode_relates_to_the_baseline_of_the_same_round():
    row = {"query_p99_ms": 2.0, "held_mb": 50.0, "peak_mb": 60.0}
    original = [row | {"sentences_per_second": s, "query_p50_ms": 100 / s} for s in (100.0, 40.0, 90.0)]
    ternary = [
        row | {"sentences_per_second": s, "query_p50_ms": 50 / s, "held_mb": 25.0}
        for s in (150.0, 80.0, 90.0)
    ]
    failed = [{"reason": "no optimum"}]
    rows = encode.medians({"fp32": original, "ternary int8": ternary, "onnx int8": failed}, "fp32")
    ours = rows["ternary int8"]
    assert ours["sentences_per_second"] == 90.0 and ours["speed"] == 1.5 and ours["query_speed"] == 3.0
    text = encode.table(rows, "fp32")
    assert "(1.50x)" in text and "(0.50x)" in text and "(3.00x)" in text
    assert "not measured: no optimum" in text


def forward_pass(arm, kind, milliseconds):
    return {"model": "m", "texts": 1, "tokens": 16, "arm": arm, "kind": kind, "p50_ms": milliseconds}


def test_speeds_of_whole_models_are_over_the_fastest_16_bit_arm_compiled_included():
    ours = forward_pass("ternary", "graph", 2.0)
    eager, graph = forward_pass("fp16", "eager", 8.0), forward_pass("bf16", "graph", 4.0)
    assert "speed" not in encode_gpu.with_speeds([eager, graph, ours])[2] and ours["speed_of_kind"] == 2
    compiled = forward_pass("fp16", "compiled", 3.0)
    assert "speed" not in encode_gpu.with_speeds([eager, compiled, ours])[2]  # a graph against none
    encode_gpu.with_speeds([eager, graph, compiled, ours])
    assert ours["speed"] == 1.5 and compiled["speed"] == 1 and eager["speed"] == 3 / 8
    del compiled["p50_ms"]  # tried, and failed
    rows = [compiled | {"reason": "no compiler"}, eager, graph, ours, forward_pass("fp32", "graph", 1.0)]
    assert encode_gpu.with_speeds(rows)[3]["speed"] == 2
    assert "not measured: no compiler" in encode_gpu.table(rows[:1])


def test_a_gpu_measures_fp16_in_all_kinds():
    eager, everything = ["eager"], list(encode_gpu.KINDS)
    for wanted in (eager, everything):
        passes = [encode_gpu.arms("bge-base", wanted, "cuda", compiled) for compiled in (False, True)]
        assert passes[0]["fp16"] + passes[1]["fp16"] == encode_gpu.KINDS
        assert list(passes[0]) == ["fp16", "ternary", "ternary fused"]
    assert passes[1]["ternary"] == ("compiled", "compiled graph") and "ternary fused" not in passes[1]
    assert encode_gpu.arms("bge-base", eager, "cuda", True) == {"fp16": ("compiled", "compiled graph")}
    assert encode_gpu.arms("bge-base", eager, "cpu", True) == {}
    assert encode_gpu.arms("minilm", everything, "cuda", False)["fp32"] == ("eager",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it times real models instead")
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_whole_models_are_compiled_afresh_for_every_shape(kind, monkeypatch, tmp_path, capsys):
    small = {"type": kind, "hidden": 64, "layers": 2, "heads": 16, "intermediate": 128}
    monkeypatch.setitem(encode_gpu.MODELS, "small", small)
    monkeypatch.setattr(passes, "SECONDS", 0.01)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(how))
    file = tmp_path / "rows.json"
    command = ["encode_gpu.py", "--models", "small", "--shapes", "1x4", "2x8", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    encode_gpu.main()
    rows = json.loads(file.read_text())["rows"]
    assert not [r["reason"] for r in rows if "reason" in r]
    found = {(r["arm"], r["kind"], r["texts"]) for r in rows}
    arms = [("fp16", "eager"), ("ternary", "eager"), ("ternary fused", "eager")]
    arms += [("fp16", "compiled"), ("ternary", "compiled")]
    assert found == {(*arm, texts) for arm in arms for texts in (1, 2)} and len(rows) == 10
    assert all(r["speed"] > 0 for r in rows) and "small" in capsys.readouterr().out
    assert compiled == [{"dynamic": False}] * 8  # two blocks, arms and shapes


def test_where_lengths_vary_cudnn_has_no_attention(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    seen = []

    def build(*arguments):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_gpu, "build", build)
    monkeypatch.setattr(encode, "texts_for", build)
    for call in (lambda: encode_gpu.new_lengths("cpu"), lambda: encode_gpu.end_to_end("", "cpu", 1, False)):
        with pytest.raises(KeyboardInterrupt):
            call()
    assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("name", ["AVX512", "AVX2"])
def test_held_to_an_instruction_set_products_stay_right(name):
    code = (
        "from ops.instruction_sets import hold_to; hold_to({name!r}); from tritern_kernels import cpu;"
        "print(*cpu.fastest(8), sep=',')"
    )
    environment = {**os.environ, **instruction_sets.ENVIRONMENT[name]}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / folder) for folder in (".", "kernels", "benchmarks")
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(name=name)], capture_output=True, text=True, env=environment
    )
    found = done.stdout.strip().split(",")
    assert set(found) == set(cpu.fastest(8)) and found[0] != "oneDNN int8", done.stderr


def test_layers_are_measured_only_when_right(monkeypatch, capsys):
    monkeypatch.setattr(cpu_ops, "LAYERS", {"tiny": [(24, 40)]})
    found = cpu_ops.measure_layers("native", turns=1)
    assert [(r["M"], r["N"], r["K"]) for r in found["rows"]] == [(64, 24, 40), (2048, 24, 40)]
    assert all(r["int8_ms"] > 0 and r["16-bit_speed"] > 0 for r in found["rows"])
    text = cpu_ops.table({"native": found})
    assert "64, 24, 40" in text and cpu.fastest(8)[0] in text
    monkeypatch.setattr(cpu_ops.reference, "linear", lambda *a: torch.ones(64, 24, dtype=torch.float64))
    with pytest.raises(SystemExit, match="differs from float64"):
        cpu_ops.measure(64, 24, 40, turns=1)


def test_encode_texts_are_real_and_enough():
    options = encode.arguments().parse_args([])
    texts = encode.texts_for(options, 3000)
    assert len(texts) == 3000 and len(set(texts)) > 500 and all(40 <= len(t) <= 600 for t in texts)


def test_every_arm_of_the_ablation_changes_the_recipe():
    recipe = ablation.recipe()
    assert ablation.ARMS["defaults"] == {}
    for arm, changes in ablation.ARMS.items():
        assert set(changes) <= set(recipe), arm
        assert arm == "defaults" or any(recipe[k] != v for k, v in changes.items()), arm


def test_ablation(tiny_path, sentences, tmp_path, monkeypatch, capsys):
    import zstandard

    def write(file, rows):
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)

    pairs = zip(sentences[:30], sentences[1:31])
    pairs = [{"sentence1": a, "sentence2": b, "score": i % 6} for i, (a, b) in enumerate(pairs)]
    write(tmp_path / "sts/stsb/dev.jsonl.gz", pairs)
    write(tmp_path / "sts/sickr/train.jsonl.gz", pairs[::-1])
    write(tmp_path / "retrieval/scifact/corpus.jsonl.gz", [{"text": t} for t in sentences[:40]])
    (tmp_path / "train").mkdir()
    texts = zstandard.compress("\n".join(sentences).encode())
    (tmp_path / "train/sentences.txt.zst").write_bytes(texts)
    file = tmp_path / "out.json"
    monkeypatch.setattr(ablation, "HELD_OUT", 40)
    command = ["ablation.py", "--data", tmp_path, "--model", tiny_path, "--steps", 2, "--batch-size", 16]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--json", str(file), "--arms", "defaults", "no bl"])
    ablation.main()
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert list(rows) == ["teacher", "defaults", "no blend"]
    assert rows["teacher"]["top-10 sentences"] == rows["teacher"]["top-10 abstracts"] == 100
    assert 0 < rows["defaults"]["top-10 sentences"] < 100 and len({*map(str, rows.values())}) == 3
    assert result["changes"]["no blend"] == {"blend_ratio": 0.0} and result["defaults"]["blend_ratio"] > 0
    monkeypatch.setattr(ablation, "distilled", None)  # what is in the file is not run again
    ablation.main()
    assert json.loads(file.read_text())["rows"] == rows
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "3"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert (
        "was measured with another budget, model, defaults or arms: name a new file"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-4], "what"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "--arms what match none of: defaults; " in capsys.readouterr().err


def test_training_step_is_measured(tiny_path, sentences, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(sentences))
    options = Namespace(texts=tmp_path / "texts.txt", model=tiny_path, steps=4, batch_size=16)
    for arm in train.ARMS[1:]:
        found = train.measure(arm, options)
        assert found["seconds a step"] > 0 and found["peak MB"] > 0
    found = train.measure_apart(train.ARMS[0], options, 4, train.FRUGAL)
    assert found["seconds a step"] > 0 and found["peak MB"] > 0


def test_whole_models_have_a_verdict_only_beside_compiled_fp16():
    rows = [
        forward_pass("fp16", "graph", 4.0), forward_pass("ternary", "graph", 3.0),
        forward_pass("ternary fused", "graph", 2.0),
    ]  # fmt: skip
    for r in rows:
        r["held_mb"] = 1.0
    found = {"models": {"m": {}}, "rows": rows}
    assert gpu_tables.models(found).endswith(
        "| - / 4.00 / - / - | - / 3.00 / - / - | - / 2.00 | (2.00x) |  |"
    )
    rows.append(forward_pass("fp16", "compiled", 2.5) | {"held_mb": 1.0})
    assert gpu_tables.models(found).endswith("| - / 2.00 | 1.25x | missed |")


def test_the_short_table_of_speeds_compares_graphs_with_graphs_and_shows_a_level_row():
    rows = [
        [c.strip() for c in line.strip("| ").split(" | ")] for line in gpu_tables.speed().splitlines()[2:]
    ]
    assert len(rows) == 6 and min(float(ratio.removesuffix("x")) for *_, ratio in rows) < 1.05
    passes = (
        gpu_tables.load("h200-encode.json")["rows"] + gpu_tables.load("h200-encode-compiled.json")["rows"]
    )
    in_graphs = {f"{r['p50_ms']:.3g} ms" for r in passes if "p50_ms" in r and "graph" in r["kind"]}
    models = [row for row in rows if "CUDA graphs" in row[0]]
    assert len(models) == 3 and all({before, after} <= in_graphs for _, before, after, _ in models)


def test_the_pages_tables_are_those_of_the_results(tmp_path, monkeypatch):
    pages = {
        "README.md": "| **minilm-l6-ternary** |",
        "benchmarks/results/README.md": "| bge-base |",
        "docs/choosing-a-mode.md": "| mpnet-base |",
    }
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for page, row in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert row in text
        (tmp_path / page).write_text(text.replace(row, "| of yesterday |"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--write", str(tmp_path)])
    tables.main()
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")
