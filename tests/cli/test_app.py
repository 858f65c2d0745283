"""The command as a whole: help, version, errors, exit codes."""

import pytest

import hairpin
from hairpin.cli.app import main
from hairpin.errors import CommError, HairpinError, RankFailed


def test_version_goes_to_stdout(run):
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, hairpin.__version__ + "\n", "")


def test_no_command_shows_the_help(run):
    done = run()
    assert done.code == 2
    assert "doctor" in done.out + done.err


@pytest.mark.parametrize("words", [["swich"], ["plan"], ["show", "--jsn"], ["plan", "m:b", "--dp"]])
def test_a_wrong_command_line_is_exit_code_2(run, words):
    done = run(*words)
    assert done.code == 2
    assert not done.out
    assert "Error" in done.err


def test_a_users_error_is_one_message_without_a_traceback(run):
    done = run("show", "nowhere.toml")
    assert done.code == 2
    assert not done.out
    assert done.err.startswith("hairpin: cannot read a plan from nowhere.toml")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("error", [CommError, RankFailed])
def test_a_lost_rank_is_one_message_and_exit_code_1(run, monkeypatch, error):
    def lost(self, path):
        raise error("rank 1 was killed by SIGKILL")

    monkeypatch.setattr("hairpin.planning.plan.Plan.load", classmethod(lost))
    done = run("show", "x.toml")
    assert (done.code, done.err) == (1, "hairpin: rank 1 was killed by SIGKILL\n")


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("HAIRPIN_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["hairpin", "show", "nowhere.toml"])
    with pytest.raises(HairpinError, match="cannot read a plan"):
        main()


def test_ctrl_c_is_exit_code_130(run, monkeypatch):
    def interrupted(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr("hairpin.planning.plan.Plan.load", classmethod(interrupted))
    assert run("show", "x.toml").code == 130


def test_a_defect_is_not_disguised_as_a_users_error(run, monkeypatch):
    def broken(self, path):
        raise ZeroDivisionError

    monkeypatch.setattr("hairpin.planning.plan.Plan.load", classmethod(broken))
    monkeypatch.setattr("sys.argv", ["hairpin", "show", "x.toml"])
    with pytest.raises(ZeroDivisionError):
        main()
