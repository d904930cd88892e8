"""`laep plan` with uneven counts and pipeline stages, as a user calls it."""

import json

import numpy as np

from tests.tools.test_commands import JOB, MODEL, RECORDED, product, sentence


def test_uneven_counts():
    """What the rule says, to the expert; more even ranks where memory may differ more."""
    rows, found = {}, {}
    for name, flags in {
        "rounded": (),
        "exact": ("--expert-multiple", "1"),
        "spread": ("--expert-multiple", "1", "--max-experts-per-rank-spread", "12"),
    }.items():
        found[name] = json.loads(
            product("plan", RECORDED, *MODEL, "--windows", "4", "--json", *flags)
        )
        rows[name] = found[name]["rows"]
        (stage,) = found[name]["stages"]
        assert sum(stage["experts_per_rank"]) == found[name]["experts_after"]
        assert stage["spread"] <= (12 if name == "spread" else 1)
    assert found["exact"]["experts_after"] < found["rounded"]["experts_after"]
    ratios = {name: np.mean([row["imbalance_after"] for row in rows[name]]) for name in rows}
    assert 1 <= ratios["spread"] < ratios["exact"] < 1.01
    for row in rows["spread"]:
        assert row["distance_from_bound"] == row["imbalance_after"] / row["imbalance_bound"]
    message = sentence("plan", RECORDED, *MODEL, "--max-experts-per-rank-spread", "-1")
    assert "--laep-max-experts-per-rank-spread must be an integer of at least 0" in message


def test_stages_of_the_file(tmp_path):
    """Each stage's ranks hold about as many experts of it."""
    data = json.loads((JOB / "loads.json").read_text())
    data["stages"] = [0, 0, 1, 1]
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(data))
    rules = ("--alpha", "1.0", "--beta", "0.5", "--top-k", "1", "--ep", "2", "--json")
    found = json.loads(product("plan", path, *rules, "--expert-multiple", "1"))
    assert [row["layer_numbers"] for row in found["stages"]] == [[1, 2], [3, 4]]
    assert max(row["spread"] for row in found["stages"]) <= 1
    for stages, message in (([0, 0], "2 stages for 4 layers"), ([0, 0, 0, -1], "stages")):
        path.write_text(json.dumps({**data, "stages": stages}))
        assert message in sentence("plan", path, *rules)
