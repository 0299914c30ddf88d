"""Compile-only checks, in subprocesses: this process may have the kernels in interpreter form."""

import json
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[2] / "kernels"), str(Path(__file__).parent)]
)
CHECK = str(Path(__file__).parent / "compile_check.py")


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=900
    )


def test_all_configurations_compile_without_spills_from_registers(tmp_path):
    result = run(CHECK, "--json", str(tmp_path / "rows.json"))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {r["capability"] for r in rows} == {80, 89, 90}
    gemms = [r for r in rows if r["name"].startswith(("int8", "fp16", "bf16"))]
    assert len(gemms) >= 50 and all(r["spills"] == 0 and "MMA" in r["tensor_core"] for r in gemms)
    # a warpgroup takes 64 rows; where the warps share out K, there is none
    small = (" 32w ", "shared out")
    warpgroup = [r for r in gemms if r["capability"] == 90 and not any(s in r["name"] for s in small)]
    assert len(warpgroup) >= 40 and all("GMMA" in r["tensor_core"] for r in warpgroup)


def test_the_check_finds_spills_and_byte_wise_unpacking():
    code = """
from dataclasses import replace
import compile_check as cc
tile = next(j for j in cc.jobs(90) if j.name == "int8 128t x 128w x 128k")
assert cc.check(tile).problem == ""
spilling = replace(tile, constants=tile.constants | {"BLOCK_M": 256, "BLOCK_N": 256})
assert cc.check(spilling).problem.startswith("spills"), cc.check(spilling)
plain = next(j for j in cc.jobs(90) if j.name == "int8 16t x 64w x 128k")
fused = next(j for j in cc.jobs(90) if j.name == "quantize bf16 K=16384")
assert cc.check(fused).problem == ""
assert "fused" in cc.check(replace(fused, constants=fused.constants | {"ASM": False})).problem
rotation = next(j for j in cc.jobs(90) if j.name == "RMSNorm rotate bf16 64")
assert cc.check(rotation).problem == ""
import triton.language as tl
cc.quantize._ASM = tl.constexpr(False)
cc.norms.norm_rotate_kernel.device_caches.clear()
assert "not rounded" in cc.check(replace(rotation, constants=rotation.constants | {"BLOCK": 32})).problem
slow = replace(plain, constants=plain.constants | {"ASM": False})
assert cc.check(slow).loop > 2 * cc.check(plain).loop
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_interpreter_is_refused():
    environment = {**ENVIRONMENT, "TRITON_INTERPRET": "1"}
    command = [sys.executable, CHECK]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr
