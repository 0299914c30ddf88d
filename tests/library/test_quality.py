"""Quality on real, labelled data: needs the data folder named by TRITERN_DATA."""

import gzip
import json
import os
from pathlib import Path

import pytest

import tritern

DATA = os.environ.get("TRITERN_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="TRITERN_DATA does not name the folder of evaluation data")


def test_patched_minilm_keeps_75_points_of_stsb(minilm):
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    with gzip.open(Path(DATA) / "sts" / "stsb" / "test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    evaluator = EmbeddingSimilarityEvaluator(
        [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [r["score"] / 5 for r in rows]
    )
    original = evaluator(minilm)["spearman_cosine"]
    ternary = evaluator(tritern.patch(minilm))["spearman_cosine"]
    assert original == pytest.approx(0.8203, abs=0.001)
    assert 0.75 <= ternary < original
