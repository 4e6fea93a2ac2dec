"""`anew doctor` on this machine, and where training does not work."""

import json

import pytest

from anew.cli import doctor
from anew.cli.main import main


def test_doctor_trains_and_resumes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert [line.split()[1] for line in lines] == list(facts)
    assert facts["training"]["works"]
    assert "loss 5." in facts["training"]["text"]
    assert "anew" in facts["versions"]["text"]


def test_doctor_reports_a_failed_check_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> doctor.Finding:
        raise RuntimeError("the first line\nmore lines")

    for name in ("_compile", "_training"):
        monkeypatch.setattr(doctor, name, broken)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "--  training  the first line\n" in shown
    assert "more lines" not in shown
    assert "ok  versions" in shown
