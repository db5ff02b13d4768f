"""A few of the bench's migrations: a gateway process, its indexer, clients, candidates out of order."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from rollout_live import Case, migrate_all

SHORT = "margin = 0.25\nshares = [0.3, 0.45, 1.0]\ntasks = [5, 5, 5]"


def test_an_outage_costs_no_client_a_request_and_no_record(tmp_path: Path) -> None:
    case = Case("out of order", 3, 0.8, -1.0, SHORT, 12)
    ended = migrate_all(case, tmp_path / "world", lambda said: None)
    assert ended.stages == {"rolled_back": 3}
    assert max(ended.candidates) <= 20
    assert (ended.failed, ended.lost, ended.doubled) == (0, 0, 0)


def test_a_part_of_a_case_draws_what_the_whole_would() -> None:
    whole, part = Case("a", 100, 0.8, 0.8, "", 10), Case("a", 50, 0.8, 0.8, "", 10, first=50)
    assert [*whole.numbers][50:] == [*part.numbers]
