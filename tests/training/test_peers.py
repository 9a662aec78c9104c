"""The lines that replace the messages of JAX's runtime about other processes."""

import pytest

from jbn.training.peers import replaced


HEARTBEATS = """\
E1130 09:45:45.909827    5229 coordination_service.cc:1548] [127] Use error polling to \
propagate the following error to all tasks: UNAVAILABLE: The following tasks are \
unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error.
"""
FATAL = """\
F1130 09:44:46.261480    4856 client.h:80] Terminating process because the JAX \
distributed service detected fatal errors. This most likely indicates that another \
task died; see the other task logs for more details.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7fdf7fa72104  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
TWICE = """\
E1130 09:46:03.419782    5485 coordination_service.cc:517] [124] 1 unexpectedly tried \
to connect with a different incarnation. It has likely restarted.
"""
CLOSED = """\
W1130 09:45:53.091038    5411 preemption_sync_manager.cc:146] Failed to retrieve \
preemption notice from coordination service: UNAVAILABLE: Socket closed
Additional GRPC error information from remote target coordination_service
"""
OTHER = "W1130 09:45:53.091038    5411 cpu_client.cc:12] something else\nand more\n"


def shown(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(replaced(lines, "process 0 of 2", "7"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEARTBEATS + FATAL, "process 1 has ended, or gave no sign of life for 7 s"),
        (TWICE + FATAL, "process 1 was started twice, or again"),
        (CLOSED + FATAL, "process 0 has ended"),
        (
            FATAL.replace("PollForError", "RegisterTask"),
            "not all processes have started within 7 s",
        ),
        (FATAL, "another process has ended"),
    ],
)
def test_one_line_with_the_reason(text: str, reason: str):
    found = shown(text)
    assert found.startswith(f"error: process 0 of 2 ends: {reason}. Start all of them")
    assert found.count("\n") == 1
    # Other lines stay, in their place.
    assert shown(OTHER + text) == OTHER + found


def test_the_first_error_alone():
    said = "error: process 0 of 2 ends: the disk is full.\n"
    assert shown(said + "error: again\n" + CLOSED + FATAL) == said


def test_a_run_that_ends_well_is_silent():
    assert shown(CLOSED) == ""
    assert shown(OTHER) == OTHER
