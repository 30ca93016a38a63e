"""tpu/supervise.sh: what each exit code leads to."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

SUPERVISE = Path(__file__).parents[1] / "tpu" / "supervise.sh"


@pytest.fixture
def supervised(tmp_path):
    """supervised(exit codes, options) -> (the supervisor's exit code, how often the command ran, what was said)."""

    def run(codes, *options):
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        script = tmp_path / "command.sh"
        script.write_text(f'cd {tmp_path}; echo x >> ran; exit "$(sed -n "$(wc -l < ran)p" codes)"\n')
        done = subprocess.run([SUPERVISE, "--pause", "0", *options, "--", "bash", script], capture_output=True, text=True, timeout=60)
        ran = tmp_path / "ran"
        return done.returncode, len(ran.read_text().splitlines()) if ran.exists() else 0, done.stdout + done.stderr

    return run


def test_crashes_lost_peers_and_preemptions_are_started_again(supervised):
    code, ran, said = supervised([1, 134, 75, 137, 0, 1])
    assert (code, ran) == (0, 5)
    assert "ended with 134" in said and "preempted" in said


@pytest.mark.parametrize("code, reason", [(2, "wrong configuration"), (65, "not finite")])
def test_what_would_happen_again_stays_down(supervised, code, reason):
    found, ran, said = supervised([code, 0])
    assert (found, ran) == (code, 1) and reason in said


def test_crashes_in_a_row_are_given_up_and_preemptions_are_not_counted(supervised):
    code, ran, said = supervised([1, 75, 75, 75, 1, 1, 0], "--most", "2")
    assert (code, ran) == (1, 6) and "given up" in said


def test_told_to_stop_it_passes_that_on_and_does_not_start_again(tmp_path):
    script = tmp_path / "command.sh"
    script.write_text(f"cd {tmp_path}; trap 'echo stopped >> log; exit 75' TERM; echo up >> log; while true; do sleep 0.05; done\n")
    process = subprocess.Popen([SUPERVISE, "--", "bash", script], stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        if (tmp_path / "log").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "log").read_text() == "up\nstopped\n" and "again" not in said


def test_a_dry_run_runs_nothing_and_wrong_options_say_how(supervised):
    code, ran, said = supervised([0], "--dry-run")
    assert (code, ran) == (0, 0) and "would run" in said and "command.sh" in said
    code, ran, said = supervised([0], "--most", "many")
    assert (code, ran) == (2, 0) and "tpu/supervise.sh [--most N]" in said
