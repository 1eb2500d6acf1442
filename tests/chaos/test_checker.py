"""The storm's checker on made-up journals: what it must see, it sees; and a clean storm passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storm import checker, journal
from storm.checker import Verdict
from storm.work import digest

POOL, RUN, BATCH = "storm", "run-0", "step-0"
SIZE = 4
TOKENS = [7, 8, 9]


class Made:
    """A storm of one batch of four jobs, told by its journals; each test spoils something."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trainer = journal.Journal(directory / f"trainer-{RUN}.jsonl")
        self.tap = journal.Journal(directory / "tap.jsonl")
        self.policies = journal.Journal(directory / f"policies-{POOL}.jsonl")
        self.states: dict[checker.Job, str] = {}
        self.saves = 0

    def intent(self, *, acknowledged: bool = True, **changes: Any) -> None:
        facts = {
            "prompts": [digest([[index]]) for index in range(SIZE)],
            "poison": {},
            "n": 1,
            "least": 1,
            "deadline": False,
            "tag": 3,
            "max_staleness": None,
            "exact": False,
            "cut": False,
        }
        self.trainer.add("intent", step=0, pool=POOL, run=RUN, batch=BATCH, **facts | changes)
        if acknowledged:
            self.trainer.add("enqueued", batch=BATCH)

    def result(
        self, index: int, outcome: str = "ok", *, version: int = 3, entry: str | None = None, **changes: Any
    ) -> None:
        samples = [{"ids": TOKENS, "spans": [[version, 0, len(TOKENS)]]}] if outcome == "ok" else []
        fact = {"outcome": outcome, "prompt": [index], "samples": samples, "error": ""} | changes
        self.tap.add("result", pool=POOL, run=RUN, batch=BATCH, index=index, entry=entry or f"{index}-1", **fact)
        self.states[POOL, RUN, BATCH, index] = outcome

    def got(self, index: int, ids: list[int] | None = None) -> None:
        self.trainer.add("got", batch=BATCH, index=index, digest=digest([ids or TOKENS]))

    def saved(self, trained: list[int], *, parent: str | None, survives: bool = True) -> str:
        self.saves += 1
        name = f"save-{self.saves}"
        self.trainer.add("saved", save=name, parent=parent, trained=[[BATCH, index] for index in trained])
        if survives:
            (self.directory / f"state-{RUN}.json").write_text(json.dumps({"save": name}))
        return name

    def ended(self, **dropped: str) -> None:
        self.trainer.add("ended", batch=BATCH, dropped={index[1:]: [outcome, ""] for index, outcome in dropped.items()})

    def finished(self) -> None:
        self.trainer.add("finished")

    def judge(self, made_by: Callable[..., bool] = lambda *_: True) -> Verdict:
        evidence = checker.gather(self.directory, None, [])
        evidence.states = self.states
        return checker.judge(evidence, made_by)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def whole(made: Made, *, spoil: int | None = None, **changes: Any) -> None:
    """All four jobs ok and trained, but for what is spoiled."""
    made.intent(**changes)
    for index in range(SIZE):
        if index != spoil:
            made.result(index)
        made.got(index)
    made.saved(list(range(SIZE)), parent=None)
    made.ended()
    made.finished()


def test_a_storm_without_fault_is_kept(made: Made) -> None:
    whole(made)
    verdict = made.judge()
    assert verdict.kept
    assert (verdict.enqueued, verdict.settled) == (SIZE, SIZE)
    assert verdict.outcomes == {"ok": SIZE}


def test_a_job_without_any_outcome_is_lost(made: Made) -> None:
    made.intent()
    for index in (0, 1, 2):
        made.result(index)
        made.got(index)
    made.saved([0, 1, 2], parent=None)
    made.states[POOL, RUN, BATCH, 3] = "open"
    made.finished()
    verdict = made.judge()
    assert verdict.lost == ["storm:run-0:step-0/3: no result; its batch says open"]
    assert verdict.settled == 3


def test_a_job_that_is_settled_ok_and_never_trained_is_lost(made: Made) -> None:
    made.intent()
    for index in range(SIZE):
        made.result(index)
    made.saved([0, 1, 2], parent=None)
    made.finished()
    assert made.judge().lost == ["storm:run-0:step-0/3: settled ok and never trained"]


def test_a_result_that_the_book_does_not_know_is_lost(made: Made) -> None:
    whole(made)
    made.states[POOL, RUN, BATCH, 2] = "open"
    assert made.judge().lost == ["storm:run-0:step-0/2: settled ok, but its batch says open"]


def test_two_results_for_one_job_are_twice(made: Made) -> None:
    whole(made)
    made.result(1, entry="9-9")
    assert made.judge().twice == ["storm:run-0:step-0/1: 2 results, ['ok', 'ok']"]


def test_one_entry_read_twice_is_one_result(made: Made) -> None:
    whole(made)
    made.result(1)
    assert made.judge().kept


def test_two_outcomes_for_one_job_are_twice(made: Made) -> None:
    whole(made)
    made.ended(i2="cancelled")
    assert made.judge().twice == ["storm:run-0:step-0/2: settled as ['cancelled', 'ok']"]


def test_a_group_in_two_checkpoints_of_one_lineage_is_trained_twice(made: Made) -> None:
    whole(made)
    made.saved([3], parent="save-1")
    assert made.judge().twice == ["storm:run-0:step-0/3: trained 2 times"]


def test_what_a_checkpoint_that_did_not_survive_trained_was_not_trained(made: Made) -> None:
    made.intent()
    for index in range(SIZE):
        made.result(index)
    first = made.saved([0, 1], parent=None)
    made.saved([2, 3], parent=first, survives=False)  # killed before the file was replaced
    made.saved([2, 3], parent=first)
    made.finished()
    assert made.judge().kept


@pytest.mark.parametrize(
    ("tag", "version", "allowed"),
    [
        ({"max_staleness": None}, 1, True),
        ({"max_staleness": 1}, 2, True),
        ({"max_staleness": 1}, 1, False),
        ({"max_staleness": 0}, 4, True),
        ({"exact": True}, 3, True),
        ({"exact": True}, 4, False),
    ],
)
def test_a_version_that_the_tag_forbids_is_the_wrong_policy(
    made: Made, tag: dict[str, Any], version: int, allowed: bool
) -> None:
    whole(made, spoil=0, **tag)
    made.result(0, version=version)
    assert len(made.judge().wrong_policy) == (not allowed)


def test_tokens_that_the_named_policy_did_not_make_are_the_wrong_policy(made: Made) -> None:
    whole(made)
    asked: list[tuple[str, list[int], dict[str, Any]]] = []

    def made_by(pool: str, prompt: list[int], sample: dict[str, Any]) -> bool:
        asked.append((pool, prompt, sample))
        return prompt != [2]

    assert made.judge(made_by).wrong_policy == ["storm:run-0:step-0/2: its tokens are not those of [[3, 0, 3]]"]
    assert (POOL, [1], {"ids": TOKENS, "spans": [[3, 0, len(TOKENS)]]}) in asked


def test_spans_that_do_not_cover_the_tokens_are_the_wrong_policy(made: Made) -> None:
    whole(made, spoil=0)
    made.result(0, samples=[{"ids": TOKENS, "spans": [[3, 0, 2]]}])
    assert len(made.judge().wrong_policy) == 1


def test_only_an_exact_job_may_end_stale_or_one_whose_policy_was_abandoned(made: Made) -> None:
    made.intent()
    for index in range(SIZE):
        made.result(index, "stale")
    made.finished()
    assert len(made.judge().wrong_policy) == SIZE
    made.policies.add("abandoned", pool=POOL, version=3)
    assert made.judge().kept


def test_an_adapter_of_another_run_is_the_wrong_policy(made: Made) -> None:
    whole(made, spoil=0)
    made.result(0, version=4)
    made.policies.add("published", pool=POOL, version=4, run=RUN, signature=1)
    assert made.judge().kept
    made.policies.add("published", pool=POOL, version=4, run="run-1", signature=1)
    assert made.judge().wrong_policy == ["storm:run-0:step-0/0: made by policy 4, an adapter of run-1"]


def test_a_result_of_another_prompt_is_altered(made: Made) -> None:
    whole(made, spoil=0)
    made.result(0, prompt=[99])
    assert made.judge().altered == ["storm:run-0:step-0/0: it is of another prompt"]


def test_a_group_with_samples_missing_is_altered(made: Made) -> None:
    whole(made, n=2, least=2)
    assert len(made.judge().altered) == SIZE


def test_a_group_that_may_have_fewer_samples_may(made: Made) -> None:
    whole(made, n=2, least=1)
    assert made.judge().kept


@pytest.mark.parametrize(("outcome", "asked"), [("cancelled", "cut"), ("expired", "deadline")])
def test_what_nobody_asked_for_is_altered(made: Made, outcome: str, asked: str) -> None:
    made.intent()
    for index in range(SIZE):
        made.result(index, outcome)
    made.finished()
    assert len(made.judge().altered) == SIZE
    made.intent(**{asked: True})
    assert made.judge().kept


def test_a_trainer_that_was_handed_other_tokens_is_altered(made: Made) -> None:
    whole(made)
    made.got(1, ids=[1, 2, 3])
    assert len(made.judge().altered) == 1


def test_a_result_that_nobody_asked_for_is_altered(made: Made) -> None:
    whole(made)
    made.result(77)
    assert made.judge().altered == ["storm:run-0:step-0/77: a result that nobody asked for"]


def test_a_batch_that_was_not_acknowledged_need_not_be_there(made: Made) -> None:
    made.intent(acknowledged=False)
    made.result(0)  # it may be
    made.finished()
    verdict = made.judge()
    assert verdict.kept
    assert verdict.enqueued == 0


def test_a_trainer_that_did_not_come_to_its_end_is_told(made: Made) -> None:
    made.intent()
    assert "run-0: its trainer did not come to its end" in made.judge().altered


def test_innocents_that_died_and_poison_that_did_not_are_told_apart(made: Made) -> None:
    made.intent(poison={"0": "kill", "1": "fail"})
    for index, outcome in enumerate(("failed", "ok", "failed", "ok")):
        made.result(index, outcome, error="5 workers were lost")
    made.saved([1, 3], parent=None)
    made.ended(i0="failed", i2="failed")
    made.finished()
    verdict = made.judge()
    assert verdict.kept
    assert verdict.innocent_dead == ["storm:run-0:step-0/2: 5 workers were lost"]
    assert verdict.poison_not_dead == ["storm:run-0:step-0/1: fail ended ok"]
    assert verdict.poison == {"kill": 1, "fail": 1}


def test_what_a_trainer_cancelled_need_not_be_trained(made: Made) -> None:
    made.intent(cut=True)
    for index, outcome in enumerate(("ok", "ok", "cancelled", "cancelled")):
        made.result(index, outcome)
    made.saved([0], parent=None)
    made.ended(i2="cancelled", i3="cancelled")
    made.finished()
    assert made.judge().kept


def test_a_line_torn_by_a_kill_spoils_no_other(made: Made) -> None:
    made.intent()
    path = made.directory / f"trainer-{RUN}.jsonl"
    with path.open("ab") as file:
        file.write(b'{"fact":"got","batch":"st')
    journal.Journal(path).close()
    for index in range(SIZE):
        made.result(index)
    made.saved(list(range(SIZE)), parent=None)
    made.finished()
    assert made.judge().kept


def test_a_storm_with_too_little_in_it_does_not_pass(made: Made) -> None:
    whole(made)
    verdict = made.judge()
    assert checker.passed(verdict, 10, jobs_least=SIZE, faults_least=10)
    assert not checker.passed(verdict, 10, jobs_least=SIZE + 1, faults_least=10)
    assert not checker.passed(verdict, 9, jobs_least=SIZE, faults_least=10)


def test_recovery_is_told_by_median_and_worst_of_the_innocent(made: Made) -> None:
    made.intent(poison={"3": "kill"})
    evidence = checker.gather(made.directory, None, [])
    watched = [(f"{RUN}:{BATCH}/{index}", seconds) for index, seconds in enumerate((1.0, 9.0, 2.0, 60.0))]
    assert checker.recovery(evidence, watched) == {"jobs": 3, "median": 2.0, "worst": 9.0}
    assert checker.recovery(evidence, []) == {"jobs": 0, "median": None, "worst": None}
