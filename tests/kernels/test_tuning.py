import itertools
import json
from dataclasses import asdict, replace

import pytest

from tritern_kernels import tuning
from tritern_kernels.tuning import KernelConfig

GOOD = KernelConfig(64, 64, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_m": 8}, "block_m must be a power of two of at least 16; received 8"),
        ({"block_n": 96}, "block_n must be a power of two of at least 16; received 96"),
        ({"block_k": 64}, "block_k must be a power of two of at least 128; received 64"),
        ({"block_k": 256}, "block_k must divide K padded to 384; received 256"),
        ({"num_warps": 3}, "num_warps must be a power of two up to 16; received 3"),
        ({"split_k": 4}, "split_k must be from 1 to K / block_k = 3; received 4"),
        (
            {"block_m": 256, "block_n": 256, "split_k": 1},
            "512 accumulators a thread spill; at most 128",
        ),
        ({"num_stages": 0}, "num_stages must be at least 1"),
        ({"num_stages": 40}, "bytes of shared memory; sm_90 has"),
    ],
)
def test_invalid_says_why(change, reason):
    assert GOOD.invalid("int8", 384, 90) is None
    assert reason in replace(GOOD, **change).invalid("int8", 384, 90)


def test_split_is_for_integers():
    assert "exactly in any order" in replace(GOOD, split_k=2).invalid("16bit", 384, 90)


def test_gelu_needs_registers():
    wide = KernelConfig(128, 256, 128, num_warps=8, num_stages=3)
    assert wide.invalid("int8", 384, 90) is None
    assert "at most 64 here" in wide.invalid("int8", 384, 90, gelu=True)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120, 75])
@pytest.mark.parametrize("mode", ["int8", "16bit"])
def test_the_formula_is_always_valid(mode, capability):
    tokens, widths = (1, 16, 32, 64, 128, 512, 4096, 65536), (1, 300, 384, 1536, 4096, 14336)
    for M, N, K, gelu in itertools.product(tokens, (1, *widths), widths, (False, True)):
        config = tuning.formula(mode, M, N, K, capability, 108, gelu)
        assert config.invalid(mode, K, capability, gelu) is None, (M, N, K, config)


def test_the_formula_splits_only_small_batches():
    assert tuning.formula("int8", 64, 384, 4096, 90, 132).split_k > 1
    assert tuning.formula("int8", 4096, 384, 4096, 90, 132).split_k == 1


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_with_few_tokens_warps_share_out_k(capability):
    def few(mode, N, K):
        return tuning.formula(mode, 16, N, K, capability, 108)

    assert few("int8", 1024, 4096).share_k and few("int8", 1024, 4096).num_warps == 8
    assert few("int8", 12288, 4096).share_k and few("int8", 12288, 4096).num_warps == 4
    assert few("int8", 384, 384).quantizing and not few("int8", 384, 1536).quantizing
    assert few("16bit", 1024, 4096).share_k and not few("16bit", 12288, 4096).share_k
    assert not few("16bit", 384, 384).share_k
    assert not tuning.formula("int8", 32, 1024, 4096, capability, 108).share_k


def test_a_sister_takes_the_table():
    h200 = tuning.choose("int8", 16, 4096, 4096, False, "NVIDIA H200", 90, 132)
    assert tuning.choose("int8", 16, 4096, 4096, False, "NVIDIA H100 80GB HBM3", 90, 132) == h200
    smaller = tuning.choose("int8", 16, 4096, 4096, False, "NVIDIA H100 PCIe", 90, 114)
    assert smaller == tuning.formula("int8", 16, 4096, 4096, 90, 114) != h200


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for a GPU named 'NVIDIA Test 1' and makes it the one in use."""
    monkeypatch.setattr(tuning, "CONFIG_DIR", tmp_path)
    tuning._table.cache_clear()
    tuning._choose.cache_clear()

    def write(*entries):
        rows = [
            {"mode": mode, "M": M, "N": N, "K": K, "config": asdict(config)}
            for mode, M, N, K, config in entries
        ]
        (tmp_path / "test-1.json").write_text(json.dumps({"gpu": "NVIDIA Test 1", "entries": rows}))

    yield write
    tuning._table.cache_clear()
    tuning._choose.cache_clear()


def choose(M, N, K, gelu=False):
    return tuning.choose("int8", M, N, K, gelu, "NVIDIA Test 1", 90, 132)


def test_the_table_wins_where_it_is_near(table):
    special = KernelConfig(64, 32, 128, group_m=5)
    table(("int8", 128, 384, 384, special), ("16bit", 128, 384, 384, GOOD))
    assert choose(128, 384, 384) == special
    assert choose(100, 400, 384) == special  # the next power of two, and a near shape
    assert choose(65536, 384, 384) != special  # too far: the formula
    assert choose(128, 384, 384 * 64) != special


def test_a_tables_invalid_entry_is_passed_over(table):
    table(("int8", 128, 384, 256, replace(GOOD, block_k=256)))
    assert choose(128, 384, 384).invalid("int8", 384, 90) is None


def test_tokens_count_as_the_next_power_of_two(table):
    table()
    assert choose(33, 4096, 4096) == choose(64, 4096, 4096)
    assert choose(1, 4096, 4096) == tuning.formula("int8", 1, 4096, 4096, 90, 132)


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"entries": [{"mode": "int8"}]}')
    with pytest.raises(ValueError, match=r"broken\.json is not a table.*Remove it to use the formula"):
        tuning.load_table(path)


def test_shipped_tables_are_valid():
    for path in tuning.CONFIG_DIR.glob("*.json"):
        for entry in tuning.load_table(path):
            assert entry.config.invalid(entry.mode, entry.K, 90) is None
