"""Every planted fault is reported, and the checked-in table of them is up to date."""

from __future__ import annotations

import host_cuda
import planted_faults
import pytest
from fault_list import FAULTS

REPORT = planted_faults.CSRC / "host_executor" / "FAULTS.md"
pytestmark = pytest.mark.skipif(
    host_cuda.unavailable() is not None, reason=str(host_cuda.unavailable())
)


@pytest.fixture(scope="module")
def outcomes():
    return dict(zip(FAULTS, planted_faults.try_all(FAULTS), strict=True))


def test_there_are_many_faults_of_every_kernel():
    assert len(FAULTS) >= 40
    assert len({(fault.kernel, fault.name) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.name}")
def test_the_fault_is_caught(fault, outcomes):
    assert outcomes[fault].catches(fault), outcomes[fault]


def test_most_faults_are_caught_while_the_numbers_are_right(outcomes):
    reported = [outcome for outcome in outcomes.values() if outcome.found]
    hidden = [outcome for outcome in reported if outcome.hidden]
    assert len(hidden) * 2 > len(reported)


def test_races_are_reported_with_both_lines(outcomes):
    races = [outcome for fault, outcome in outcomes.items() if fault.expected == ("race",)]
    assert races
    for outcome in races:
        assert len(outcome.places) == 2
        assert all(".cuh:" in place for place in outcome.places)


def test_the_table_is_up_to_date(outcomes):
    table = planted_faults.report(FAULTS, list(outcomes.values()))
    assert REPORT.read_text() == table, f"run python_tests/planted_faults.py --report {REPORT}"
