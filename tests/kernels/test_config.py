import itertools
import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tritern_kernels import tables, tune
from tritern_kernels.config import KernelConfig, formula, shared_memory_limit

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


# "Maximum amount of shared memory per thread block" of the CUDA programming guide, in KiB
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("capability", SHARED)
def test_a_program_may_use_its_gpus_shared_memory(capability):
    limit = shared_memory_limit(capability)
    assert limit == 1024 * SHARED[capability]
    stage = GOOD.shared_bytes("int8") // GOOD.num_stages
    most = replace(GOOD, num_stages=limit // stage)
    assert most.invalid("int8", 384, capability) is None
    more = replace(GOOD, num_stages=limit // stage + 1)
    assert f"sm_{capability} has {limit}" in more.invalid("int8", 384, capability)


def test_gpus_older_than_the_kernels_have_no_configuration():
    """7.5 has 64 KiB, but no kernel runs there (``devices``)."""
    assert GOOD.invalid("int8", 384, 75) == "sm_75 has no kernels; the oldest that has is sm_80"
    for call in (shared_memory_limit, lambda c: formula("int8", 16, 384, 384, c, 40)):
        with pytest.raises(ValueError, match="capability must be at least 80.*received 75"):
            call(75)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("mode", ["int8", "16bit"])
def test_the_formula_is_always_valid(mode, capability):
    tokens, widths = (1, 16, 32, 64, 128, 512, 4096, 65536), (1, 300, 384, 1536, 4096, 14336)
    for M, N, K in itertools.product(tokens, (1, *widths), widths):
        config = formula(mode, M, N, K, capability, 108)
        assert config.invalid(mode, K, capability) is None, (M, N, K, config)


def test_the_formula_splits_only_small_batches():
    assert formula("int8", 64, 384, 4096, 90, 132).split_k > 1
    assert formula("int8", 4096, 384, 4096, 90, 132).split_k == 1


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_with_few_tokens_warps_share_out_k(capability):
    def few(mode, N, K):
        return formula(mode, 16, N, K, capability, 108)

    assert few("int8", 1024, 4096).share_k and few("int8", 1024, 4096).num_warps == 8
    assert few("int8", 12288, 4096).share_k and few("int8", 12288, 4096).num_warps == 4
    assert few("int8", 384, 384).quantizing and not few("int8", 384, 1536).quantizing
    assert few("16bit", 1024, 4096).share_k and not few("16bit", 12288, 4096).share_k
    assert not few("16bit", 384, 384).share_k
    assert not formula("int8", 32, 1024, 4096, capability, 108).share_k


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The package's folder of tables and the user's, both empty."""
    monkeypatch.setattr(tables, "CONFIG_DIR", tmp_path / "package")
    monkeypatch.setenv("TRITERN_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "package", tmp_path / "cache" / "kernels"
    forget()


def forget():
    tables.table.cache_clear()
    tables._choose.cache_clear()


def write(folder, name, *entries, **kind):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"mode": mode, "M": M, "N": N, "K": K, "config": asdict(config)} for mode, M, N, K, config in entries
    ]
    (folder / name).write_text(json.dumps({"gpu": name, "entries": rows, **kind}))
    forget()


def choose(M, N, K, gpu="NVIDIA Test 1"):
    return tables.choose("int8", M, N, K, gpu, 90, 132)


SHIPPED = Path(tables.__file__).parent / "configs"
FIRST, SECOND, THIRD = (KernelConfig(64, 32, 128, num_stages=g) for g in (5, 6, 7))


def test_a_sister_takes_the_table(monkeypatch):
    monkeypatch.setattr(tables, "CONFIG_DIR", SHIPPED)
    h200 = tables.choose("int8", 16, 4096, 4096, "NVIDIA H200", 90, 132)
    assert tables.choose("int8", 16, 4096, 4096, "NVIDIA H100 80GB HBM3", 90, 132) == h200
    smaller = tables.choose("int8", 16, 4096, 4096, "NVIDIA H100 PCIe", 90, 114)
    assert smaller == formula("int8", 16, 4096, 4096, 90, 114) != h200


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_one_shape_tuned_hides_nothing(gpu, folders, monkeypatch):
    """The user's table of one shape lies over what came with the package, a sister's too."""
    monkeypatch.setattr(tables, "CONFIG_DIR", SHIPPED)
    before = {e.shape: e.config for e in tables.table(gpu, 90, 132)}
    assert len(before) > 100
    write(folders[1], tables.user_table(gpu).name, ("int8", 64, 384, 384, FIRST))
    assert {e.shape: e.config for e in tables.table(gpu, 90, 132)} == before | {("int8", 64, 384, 384): FIRST}
    assert choose(64, 384, 384, gpu=gpu) == FIRST


def test_for_one_shape_the_gpus_own_entry_and_the_users_come_first(folders):
    package, cache = folders
    shape = "int8", 128, 384, 384
    sister = {"capability": 90, "processors": 132}
    write(package, "a-sister.json", (*shape, FIRST), ("int8", 256, 384, 384, FIRST), **sister)
    write(package, "no-sister.json", (*shape, GOOD), capability=90, processors=114)
    assert choose(*shape[1:]) == FIRST
    write(cache, "a-sister.json", (*shape, SECOND), **sister)
    assert choose(*shape[1:]) == SECOND
    write(package, "test-1.json", (*shape, THIRD))
    assert choose(*shape[1:]) == THIRD and choose(256, 384, 384) == FIRST
    write(cache, "test-1.json", (*shape, GOOD))
    assert choose(*shape[1:]) == GOOD and choose(256, 384, 384) == FIRST


def test_the_table_wins_where_it_is_near(folders):
    write(folders[0], "test-1.json", ("int8", 128, 384, 384, FIRST), ("16bit", 128, 384, 384, GOOD))
    assert choose(128, 384, 384) == FIRST
    assert choose(100, 400, 384) == FIRST  # the next power of two, and a near shape
    assert choose(65536, 384, 384) != FIRST  # too far: the formula
    assert choose(128, 384, 384 * 64) != FIRST


def test_a_tables_invalid_entry_is_passed_over(folders):
    write(folders[0], "test-1.json", ("int8", 128, 384, 256, replace(GOOD, block_k=256)))
    assert choose(128, 384, 384).invalid("int8", 384, 90) is None


def test_tokens_count_as_the_next_power_of_two():
    assert choose(33, 4096, 4096) == choose(64, 4096, 4096)
    assert choose(1, 4096, 4096) == formula("int8", 1, 4096, 4096, 90, 132)


ENTRY = {"mode": "int8", "M": 16, "N": 384, "K": 384, "config": asdict(GOOD)}
DAMAGED = {
    "half a file": '{"entries": [{"mode": "int8", "M"',
    "not text": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "no entries": "{}",
    "an entry without sizes": json.dumps({"entries": [{"mode": "int8"}]}),
    "no tokens": json.dumps({"entries": [ENTRY | {"M": 0}]}),
    "words for numbers": json.dumps({"entries": [ENTRY | {"N": "384"}]}),
    "an unknown mode": json.dumps({"entries": [ENTRY | {"mode": "int4"}]}),
    "an unknown setting": json.dumps({"entries": [ENTRY | {"config": {"block_q": 1}}]}),
    "a setting of another type": json.dumps(
        {"entries": [ENTRY | {"config": asdict(GOOD) | {"block_m": "64"}}]}
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_table_is_named_and_breaks_no_call(damage, folders):
    path, content = tables.user_table("NVIDIA Test 1"), DAMAGED[damage]
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"test-1\.json is not a table.*Remove it to use the formula"):
        tables.load_table(path)
    write(folders[0], "test-1.json", ("int8", 128, 384, 384, FIRST))
    with pytest.warns(UserWarning, match=r"left out: .*test-1\.json is not a table") as warned:
        assert choose(128, 384, 384) == FIRST
        assert choose(64, 384, 384) == FIRST
    assert len(warned) == 1


def test_a_table_that_cannot_be_read_breaks_no_call(folders):
    tables.user_table("NVIDIA Test 1").mkdir(parents=True)
    with pytest.warns(UserWarning, match="left out: .*test-1.json"):
        assert choose(64, 384, 384) == formula("int8", 64, 384, 384, 90, 132)


@pytest.mark.parametrize("place", ["not there", "a file", "unreadable"])
def test_a_cache_that_cannot_be_used_breaks_no_call(place, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    if place == "a file":
        folder.write_text("")
    if place == "unreadable":
        folder.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(folder)))
    monkeypatch.setenv("TRITERN_CACHE", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(64, 384, 384) == formula("int8", 64, 384, 384, 90, 132)


def test_where_the_users_tables_are(tmp_path, monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    assert tables.user_table(name) == tmp_path / "cache" / "kernels" / "h100-80gb-hbm3.json"
    monkeypatch.delenv("TRITERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / "tritern" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert tables.user_folder() == tmp_path / "me" / ".cache" / "tritern" / "kernels"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert choose(64, 384, 384)
    with pytest.raises(ValueError, match="set TRITERN_CACHE to a folder"):
        tables.user_table(name)


@pytest.fixture
def tuned(monkeypatch):
    """The tuner, without measuring: the GPU is a stub, ``tune`` gives one entry."""
    gpu = type("GPU", (), {"name": "NVIDIA Test 1", "major": 9, "minor": 0, "multi_processor_count": 132})
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda: gpu.name)
    monkeypatch.setattr(tune.torch.cuda, "get_device_properties", lambda device: gpu)
    calls = []

    def measure(shapes, modes, report, done, seconds):
        calls.append(list(shapes))
        for M, N, K in calls[-1]:
            entry = {"mode": "int8", "M": M, "N": N, "K": K, "config": asdict(FIRST), "us": 1.0, "next": []}
            done(entry)

    monkeypatch.setattr(tune, "tune", measure)
    return calls


def test_the_tuner_writes_to_the_users_folder(tuned, folders, tmp_path):
    package, cache = folders
    write(package, "test-1.json", ("int8", 64, 384, 384, SECOND), ("int8", 128, 384, 384, SECOND))
    before = (package / "test-1.json").read_text()
    for tokens in ("64", "256"):
        assert tune.main(["--shapes", "384x384", "--tokens", tokens]) == 0
    forget()
    assert [e.M for e in tables.load_table(cache / "test-1.json")] == [64, 256]
    assert choose(64, 384, 384) == FIRST and choose(128, 384, 384) == SECOND
    assert (package / "test-1.json").read_text() == before
    named = tmp_path / "new" / "mine.json"  # a table to come with the package
    assert tune.main(["--shapes", "384x384", "--tokens", "16", "--json", str(named)]) == 0
    assert [e.M for e in tables.load_table(named)] == [16]
    table = json.loads(named.read_text())
    assert (table["gpu"], table["capability"], table["processors"]) == ("NVIDIA Test 1", 90, 132)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("place", ["a damaged table", "below a file"])
def test_the_tuner_refuses_before_it_measures(place, tuned, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("{}")
    path = path if place == "a damaged table" else path / "t.json"
    with pytest.raises(SystemExit):
        tune.main(["--shapes", "384x384", "--json", str(path)])
    assert not tuned and "the table cannot be written: " in capsys.readouterr().err


def test_shipped_tables_are_valid():
    paths = list(SHIPPED.glob("*.json"))
    for entry in (entry for path in paths for entry in tables.load_table(path)):
        assert entry.config.invalid(entry.mode, entry.K, 90) is None
    assert paths
