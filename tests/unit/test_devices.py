"""Which devices each part gets, and what is refused, without JAX."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.ops.devices import divide, refuse_multi_host, refuse_overlap
from rollpool.ops.in_process import _numbers
from rollpool.schemas import SettingsError


@pytest.mark.parametrize(
    ("rollout", "train", "expected"),
    [
        (2, None, ((0, 1), (2, 3, 4, 5, 6, 7))),
        (4, 2, ((0, 1, 2, 3), (4, 5))),
        (1, 1, ((0,), (1,))),
        ((4, 5), (0, 1), ((4, 5), (0, 1))),
        ((2, 3), 2, ((2, 3), (0, 1))),
    ],
)
def test_each_part_gets_what_it_asked_for(rollout: Any, train: Any, expected: Any) -> None:
    assert divide(8, rollout, train) == expected


@pytest.mark.parametrize(
    ("rollout", "train", "said"),
    [
        (8, None, "train gets no device"),
        (0, None, "rollout gets no device"),
        (3, None, "rollout gets 3 devices"),
        (6, None, "rollout gets 6 devices"),
        (2, 3, "train gets 3 devices"),
        (4, 6, "there are 8 devices"),
        (9, None, "there are 8 devices"),
        ((0, 1), (1, 2), "devices 1 are in both parts"),
        ((0, 0), (2, 3), "rollout names a device twice"),
        ((-1, 0), (2, 3), "there are 8 devices"),
        ((0, 8), (2, 3), "there are 8 devices"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(rollout: Any, train: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        divide(8, rollout, train)


@given(st.integers(1, 16), st.integers(0, 20), st.one_of(st.none(), st.integers(0, 20)))
def test_what_passes_is_disjoint_and_there(count: int, rollout: int, train: int | None) -> None:
    try:
        first, second = divide(count, rollout, train)
    except SettingsError:
        return
    assert len(first) == rollout
    assert not set(first) & set(second)
    assert set(first) | set(second) <= set(range(count))
    assert train is None or len(second) == train


def test_one_of_several_processes_is_told_of_the_failure_that_it_would_meet() -> None:
    refuse_multi_host(1)
    with pytest.raises(SettingsError, match=r"continuator.*servers on TPU VMs"):
        refuse_multi_host(2)


def test_parts_without_a_common_device_pass() -> None:
    refuse_overlap((0, 1), (2, 3))
    refuse_overlap((0, 1), ())


@dataclass(frozen=True)
class Device:
    id: int


def test_devices_are_numbered_from_the_first_of_the_process() -> None:
    here = [100, 101, 102, 103]
    assert _numbers([Device(102), Device(103)], here) == (2, 3)
    assert _numbers((0, 1), here) == (0, 1)
    assert _numbers(None, here) == ()
    with pytest.raises(SettingsError, match="there are 4 here"):
        _numbers((4,), here)
