"""Output that cannot be written is dropped, and the program goes on."""

import sys

import pytest

from cifar.command import safe_output
from tests.helpers.processes import ROOT, run

HEAD = "import os, sys\nfrom cifar.command import exit_on_error\nwith exit_on_error('prog'):\n"


def shell(redirection, code, **how):
    """Run Python code in `exit_on_error`, and return what it prints; `{}` in the redirection is the command."""
    command = redirection.format(f'{sys.executable} -c "$CODE"') + "; exit ${PIPESTATUS[0]}"
    return run(["bash", "-c", command], ROOT, CODE=HEAD + code, **how).stdout


def test_output_returns_once_a_full_disk_has_room():
    code = "    full, out = os.open('/dev/full', os.O_WRONLY), os.dup(1)\n"
    code += "    os.dup2(full, 1); print('lost'); os.dup2(out, 1); print('seen')"
    assert shell("{}", code) == "seen\n"


@pytest.mark.parametrize("redirection", ["{} | true", "{} >/dev/full 2>/dev/full", "{} >&- 2>&- <&-"])
def test_program_goes_on_without_a_voice(redirection, tmp_path):
    """A file that it opens does not take the place of a closed descriptor."""
    code = f"    file = open({str(tmp_path / 'file')!r}, 'w'); file.write('kept'); file.flush()\n"
    code += "    for _ in range(3): os.system('sleep 0.1'); print('x' * 100_000); print('y', file=sys.stderr)\n"
    assert shell(redirection, f"{code}    sys.exit(7)", status=7) == ""
    assert (tmp_path / "file").read_text() == "kept"


def test_pipe_whose_reader_is_slow():
    code = "    os.set_blocking(1, False)\n    for _ in range(3): print('x' * 100_000)\n    sys.exit(7)"
    shell("{} | (sleep 0.5; cat >/dev/null)", code, status=7)


def test_characters_that_the_encoding_lacks_are_escaped():
    assert shell("{}", "    print('f\\u00fcr')", PYTHONIOENCODING="ascii") == "f\\xfcr\n"


def test_other_errors_are_raised():
    with pytest.raises(BrokenPipeError), safe_output():
        raise BrokenPipeError  # not of the output: gloo's, say
