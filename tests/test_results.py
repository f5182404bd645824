"""The result files in the repository hold what the project claims."""

import json

import pytest

from atm_triton.digits.model import CONFIG
from benchmarks.readme import RESULTS, nearest_tome


def result(name):
    return json.loads((RESULTS / name).read_text())


def test_every_result_says_where_it_comes_from():
    for path in [*RESULTS.glob("*.json"), CONFIG]:
        environment = json.loads(path.read_text())["environment"]
        assert environment["commit"] and not environment["dirty"] and environment["utc"], path
        assert environment["command"].startswith(("atm-triton ", "python -m benchmarks.")), path


def test_the_digits_model_was_trained_within_the_hour():
    training = result("digits_training.json")
    assert training["test_top1"] >= 90 and training["calibration_top1"] >= 90
    assert training["minutes"] < 60 and len(training["log"]) > 100


def test_atm_keeps_the_accuracy():
    rows = result("digits_accuracy.json")["rows"]
    (shipped,) = (row for row in rows if row["method"] == "shipped")
    assert shipped["config"] == json.loads(CONFIG.read_text())["config"]
    quality = shipped["overall"]
    assert quality["images"] >= 4000 and shipped["saved"] >= 0.42 and quality["agreement"] > 99.5
    assert quality["top1"] >= quality["top1_unpatched"] - 0.1
    tome = nearest_tome(rows, shipped)["overall"]
    assert tome["gflops"] == pytest.approx(quality["gflops"], rel=0.05) and tome["agreement"] < quality["agreement"]


def test_merging_reaches_the_bound_on_a_cpu():
    _, deit = result("cpu_bench.json")["cases"]
    assert deit["title"].startswith("deit_small_patch16_224") and "float32, CPU, 2 threads" in deit["title"]
    assert deit["batch_size"] == 8 and deit["config"]["schedule"] == [8] * 12
    (atm,) = (row for row in deit["rows"] if row["name"] == "ATM")
    assert atm["of_bound"] >= 0.95 and len(atm["seconds"]) >= 15
