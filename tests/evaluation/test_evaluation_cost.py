"""The cost of full-size measurements: hours are the counts of pictures over the measured rates."""

import json

import pytest

from tests.helpers import one_error
from tools.evaluation_cost import hours, main


def test_hours_are_counts_over_rates():
    found = hours(
        {
            "pictures_per_second_224": 1_331_167 / 3600,
            "pictures_per_second_512": 10.0,
            "knn_pairs_per_second": 1e9,
        }
    )
    features, neighbours, release, dinov2 = found.values()
    assert features == pytest.approx(1.0)
    assert neighbours == pytest.approx(1_281_167 * 50_000 / 1e9 / 3600)
    assert release == pytest.approx((202_100 + 2_000) / 36_000)
    assert dinov2 == pytest.approx((640_000 + 4_000) / 36_000)


def test_rates_are_measured_on_the_configurations_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.evaluation_cost.ROWS", 256)
    monkeypatch.setattr("tools.evaluation_cost.QUERIES", 16)
    words = ["--config", "muse_tiny/stage3", "--device", "cpu", "--batch", "1", "--repeats", "1"]
    assert main([*words, "--output", str(tmp_path / "cost.json")]) == 0
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["hours"] == hours(written["measured"])
    assert written["measured"]["pictures_per_second_224"] > 0
    assert "(computed)  ImageNet" in capsys.readouterr().out


def test_no_pictures_is_one_line(capsys):
    words = ["--config", "muse_tiny/stage3", "--batch", "0"]
    assert "--batch must be at least 1" in one_error(capsys, main(words))
