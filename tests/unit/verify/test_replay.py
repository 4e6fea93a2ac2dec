"""When `anew verify` may expect equal bits from steps that are taken again."""

from pathlib import Path

from anew.verify.replay import difference_of

HERE = {
    "device": "cpu (2 threads)",
    "processor": "A (AVX512)",
    "precision": "bf16",
    "compiled": "no",
    "torch": "2.13.0",
    "cuda": "none",
    "python": "3.11.7",
    "system": "Linux",
    "ranks": 1,
}
LOG = "2026-01-01 00:00:00,000 INFO resumed from step-00000008\n"


def test_equal_bits_are_expected_on_the_same_hardware_and_software(tmp_path: Path) -> None:
    assert difference_of(tmp_path, HERE, HERE, first=0) == ""
    other_system = HERE | {"system": "Linux 7", "python": "3.12.0"}
    assert difference_of(tmp_path, other_system, HERE, first=0) == ""
    for key, value in {"processor": "B", "torch": "2.11.0", "ranks": 8}.items():
        found = difference_of(tmp_path, HERE | {key: value}, HERE, first=0)
        assert found == f"{key} {value} in the run, {HERE[key]} here"
    older = {key: value for key, value in HERE.items() if key != "processor"}
    assert "did not record its processor" in difference_of(tmp_path, older, HERE, first=0)


def test_environment_is_that_of_the_steps_since_the_run_was_resumed(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(LOG)
    assert difference_of(tmp_path, HERE, HERE, first=8) == ""
    assert "before the run was resumed" in difference_of(tmp_path, HERE, HERE, first=4)
