"""The file of decisions: appended to, read back, cut off by a crash."""

from megatron_laep.records import decision_log


def iterations(path) -> list[int]:
    return [decision["iteration"] for decision in decision_log.read(path)]


def test_round_trip(tmp_path):
    path = tmp_path / "laep" / decision_log.NAME
    assert decision_log.read(path) == []
    for iteration in (2, 4):
        decision_log.append(path, {"iteration": iteration, "stable": iteration == 4})
    assert decision_log.read(path) == [
        {"iteration": 2, "stable": False, "row": 1},
        {"iteration": 4, "stable": True, "row": 2},
    ]


def test_a_resumed_job_decides_again(tmp_path):
    path = tmp_path / decision_log.NAME
    for iteration in (2, 4, 6, 4):
        decision_log.append(path, {"iteration": iteration})
    assert iterations(path) == [2, 4]
    assert decision_log.read(path)[-1]["row"] == 4
    decision_log.append(path, {"iteration": 6})
    assert iterations(path) == [2, 4, 6]


def test_cut_off_by_a_crash(tmp_path, caplog):
    path = tmp_path / decision_log.NAME
    decision_log.append(path, {"iteration": 2})
    with open(path, "a") as file:
        file.write('{"iteration": 4, "sta')
    assert iterations(path) == [2]
    assert "skipped row 2" in caplog.text
    decision_log.append(path, {"iteration": 4})
    assert iterations(path) == [2, 4]
    assert decision_log.read(path)[-1]["row"] == 3


def test_rows_that_are_no_decisions(tmp_path, caplog):
    path = tmp_path / decision_log.NAME
    deep = b"[" * 100_000
    path.write_bytes(b'\x80\n[1]\n{"stable": true}\n\n' + deep + b'\n{"iteration": 6}\n')
    assert iterations(path) == [6]
    assert caplog.text.count("skipped row") == 4


def test_decisions_of_a_branch_that_was_left(tmp_path):
    path = tmp_path / decision_log.NAME
    decision_log.resume(path, 3)  # a job that has decided nothing has no file
    assert not path.exists()
    for iteration in (6, 8):
        decision_log.append(path, {"iteration": iteration})
    decision_log.resume(path, 8)  # its own rebuild: what was decided at 8 stays
    assert [decision["iteration"] for decision in decision_log.read(path)] == [6, 8]
    decision_log.resume(path, 5)
    assert decision_log.read(path) == []
    decision_log.append(path, {"iteration": 20})
    assert decision_log.read(path) == [{"iteration": 20, "row": 5}]
