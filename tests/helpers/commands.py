"""Commands run in this process: what they end with, and what they say then."""

from sparselearning.process.script import run_script


def exit_code(main):
    """The exit code of a program whose main function this is."""
    try:
        run_script(main)
    except SystemExit as leaving:
        return leaving.code
    return 0


def one_sentence(err):
    """What went to stderr but for notes: one line, and nothing that looks like a crash."""
    told = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(told) == 1, err
    assert "Traceback" not in err
    return told[0]
