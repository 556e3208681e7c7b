"""lm-evaluation-harness on exactly one version's weights, offline."""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.model_chains import ModelChain, make_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.overtaken import Overtaken
from weightline.chain.read.records import EVALUATIONS, read_record
from weightline.errors import DigestMismatchError, InputError, VersionNotFoundError
from weightline.evaluation.checkpoint import prove_checkpoint
from weightline.evaluation.evaluate import measure_version, skip_overtaken
from weightline.evaluation.task import EvaluationTask, arithmetic_task

NUM_PROBLEMS = 40
MAX_NEW_TOKENS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("an evaluation of a local task asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def grown() -> ModelChain:
    return make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=3)


def _greedy_answers(folder: Path, questions: list[str]) -> list[str]:
    """What the model says, asked directly: one question at a time, up to the end of the line."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for question in questions:
        ids = tokenizer(question, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).split("\n")[0])
    return answers


@pytest.fixture(scope="module")
def problems(grown: ModelChain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems whose right answer is what version 0 says, every fourth one aside: a random model gets 3/4 of them."""
    folder = tmp_path_factory.mktemp("problems")
    write_checkpoint(grown.chain, 0, folder / "model")
    questions = [f"{number}+{number * 7 % 50}=" for number in range(NUM_PROBLEMS)]
    answers = _greedy_answers(folder / "model", questions)
    rows = [
        {"question": question, "answer": answer if number % 4 else "wrong"}
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task(problems: Path) -> EvaluationTask:
    return EvaluationTask("arithmetic", problems=problems, batch_size=16, max_new_tokens=MAX_NEW_TOKENS)


def test_the_score_is_that_of_a_direct_greedy_evaluation(
    grown: ModelChain, task: EvaluationTask, problems: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    for version in (0, 1):
        write_checkpoint(grown.chain, version, tmp_path / f"direct-{version}")
        answers = _greedy_answers(tmp_path / f"direct-{version}", [row["question"] for row in rows])
        expected = sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / NUM_PROBLEMS
        record = measure_version(grown.chain, version, task, tmp_path / "work")
        assert record["score"] == record["metrics"]["exact_match,none"] == expected
        assert expected == 0.75 if version == 0 else expected < 0.75
        assert record["num_problems"] == NUM_PROBLEMS
        assert record["commit_id"] == grown.chain.manifest(version).commit_id
        assert record["status"] == "done"
        assert record["state_digest"] == prove_checkpoint(tmp_path / f"direct-{version}", grown.chain.manifest(version))
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["datasets"]


def test_a_recorded_version_is_not_measured_again(
    grown: ModelChain, task: EvaluationTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_version(grown.chain, 1, task, tmp_path)
    monkeypatch.setattr("weightline.evaluation.evaluate.write_checkpoint", None)
    assert measure_version(grown.chain, 1, task, tmp_path) == first


def test_a_limit_measures_the_first_problems(grown: ModelChain, problems: Path, tmp_path: Path) -> None:
    limited = EvaluationTask("first-8", problems=problems, limit=8, max_new_tokens=MAX_NEW_TOKENS)
    record = measure_version(grown.chain, 0, limited, tmp_path)
    assert (record["num_problems"], record["score"]) == (8, 0.75)


def test_skipped_versions_keep_the_record_that_they_have(task: EvaluationTask, tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=4)
    measured = measure_version(grown.chain, 2, task, tmp_path)
    record = skip_overtaken(grown.chain, Overtaken(3, (1, 2)), task)
    assert (record["version"], record["status"], record["newer_version"]) == (1, "skipped", 3)
    assert read_record(grown.chain, EVALUATIONS, 2, task.name) == measured
    assert skip_overtaken(grown.chain, Overtaken(3, (1, 2)), task) == record


def test_another_checkpoint_than_the_versions_is_not_measured(grown: ModelChain, tmp_path: Path) -> None:
    write_checkpoint(grown.chain, 1, tmp_path / "model")
    with pytest.raises(DigestMismatchError, match="version 2 has"):
        prove_checkpoint(tmp_path / "model", grown.chain.manifest(2))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DigestMismatchError, match="is missing"):
        prove_checkpoint(tmp_path / "model", grown.chain.manifest(1))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"problems": Path("/nowhere/problems.jsonl")}, "problems"),
        ({"include_path": Path("/nowhere")}, "include_path"),
        ({"limit": 0}, "limit"),
        ({"batch_size": -1}, "batch_size"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_any_work(
    grown: ModelChain, problems: Path, tmp_path: Path, changed: dict[str, Any], field: str
) -> None:
    bad = EvaluationTask(**{"name": "bad", "problems": problems} | changed)
    with pytest.raises(InputError) as raised:
        measure_version(grown.chain, 0, bad, tmp_path / "work")
    assert raised.value.field == field
    assert not (tmp_path / "work").exists()
    assert read_record(grown.chain, EVALUATIONS, 0, "bad") is None


def test_a_task_of_the_users_own_folder(grown: ModelChain, problems: Path, tmp_path: Path) -> None:
    """Any task file of the harness goes in the same field."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"task: my_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {problems}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n  - metric: perplexity\n"
    )
    mine = EvaluationTask("my_task", include_path=folder, limit=8)
    record = measure_version(grown.chain, 0, mine, tmp_path / "work")
    assert record["metrics"].keys() == {"acc,none", "perplexity,none"}
    assert record["score"] == record["metrics"]["acc,none"]
    unknown = EvaluationTask("no_such_task", include_path=folder)
    with pytest.raises(InputError, match="has no task 'no_such_task'"):
        measure_version(grown.chain, 0, unknown, tmp_path / "work")


def test_a_version_that_does_not_exist(grown: ModelChain, task: EvaluationTask, tmp_path: Path) -> None:
    with pytest.raises(VersionNotFoundError):
        measure_version(grown.chain, 9, task, tmp_path)


def test_measuring_is_quiet(
    grown: ModelChain, task: EvaluationTask, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measure_version(grown.chain, 2, task, tmp_path)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_the_builtin_task_takes_its_problems(problems: Path) -> None:
    assert arithmetic_task(problems, limit=5) == EvaluationTask("arithmetic", problems, limit=5, batch_size=256)
