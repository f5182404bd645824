"""The result files in the repository hold what the project claims."""

import json

from atm_triton.digits.model import CONFIG
from benchmarks.readme import RESULTS


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
