"""What ranks print: whose line it is, how much of it is shown, why a stage failed."""

from __future__ import annotations

from weightline.launch.rank_output import MAX_TAIL_LINES, LineGate, RankLine, explain_failure, parse_line

SUMMARY = """\
E1124 07:18:37.882000 21287 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 21314)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_07:18:37
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 21313)  (SIGKILL)
  traceback : Signal 9 (SIGKILL) received by PID 21313"""


def test_labels_of_torchrun_and_torch_are_taken_off() -> None:
    assert parse_line("[default1]:[rank1]: Traceback\n") == RankLine(1, "Traceback")
    assert parse_line("[default12]:{'loss': '0.1'}\r\n") == RankLine(12, "{'loss': '0.1'}")
    assert parse_line("[default0]:    indented") == RankLine(0, "    indented")
    assert parse_line("W1124 launcher") == RankLine(None, "W1124 launcher")
    assert RankLine(None, "x").labeled == "x"
    assert RankLine(3, "x").labeled == "[rank 3] x"


def test_a_killed_rank_is_named_with_its_signal_and_its_own_last_lines() -> None:
    lines = [RankLine(0, f"{{'loss': '{step}'}}") for step in range(40)]
    lines += [RankLine(1, "RuntimeError: connection reset by peer")]
    lines += [parse_line(line) for line in SUMMARY.splitlines()]
    failure = explain_failure(lines, 1)
    assert failure.rank == 0
    assert failure.cause == "rank 0 was ended by SIGKILL"
    assert failure.tail == tuple(f"{{'loss': '{step}'}}" for step in range(40 - MAX_TAIL_LINES, 40))
    assert "connection reset" not in str(failure)


def test_a_launcher_that_fails_by_itself_is_quoted() -> None:
    failure = explain_failure([RankLine(None, "no such module"), RankLine(None, "  ")], 2)
    assert (failure.rank, failure.tail) == (None, ("no such module",))
    assert "exit code 2" in failure.cause


def test_a_silent_failure_says_so() -> None:
    assert explain_failure([], 1).tail == ("(it printed nothing)",)


def test_the_gate_lets_a_burst_pass_and_then_a_trickle() -> None:
    gate = LineGate(lines_per_second=2.0, burst=3.0)
    assert [gate.passes(RankLine(0, f"line {n}"), 10.0) for n in range(5)] == [True, True, True, False, False]
    assert gate.num_held_back == 2
    assert gate.passes(RankLine(0, "later"), 10.6)
    assert not gate.passes(RankLine(0, "too soon"), 10.7)


def test_repeats_blank_lines_and_progress_bars_do_not_pass() -> None:
    gate = LineGate()
    assert gate.passes(RankLine(0, "warning"), 0.0)
    assert not gate.passes(RankLine(1, "warning"), 0.1)
    assert not gate.passes(RankLine(1, "   "), 0.2)
    assert not gate.passes(RankLine(0, "Writing model shards: 100%|###| 1/1"), 0.3)
    assert gate.num_held_back == 0
