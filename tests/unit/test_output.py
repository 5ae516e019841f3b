"""Output that cannot be written is dropped, and the program goes on."""

import subprocess
import sys

import pytest

from cifar.command import safe_output
from tests.helpers.processes import ROOT, clean_environment

HEAD = "import os, sys\nfrom cifar.command import safe_output\nwith safe_output():\n"


def shell(redirection, code, **variables):
    """Run Python code in `safe_output`; `{}` in the redirection is the command."""
    command = redirection.format(f'{sys.executable} -c "$CODE"') + "; exit ${PIPESTATUS[0]}"
    environment = clean_environment(PYTHONPATH=str(ROOT), CODE=HEAD + code, **variables)
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=60)


def test_output_returns_once_a_full_disk_has_room():
    code = "    full, out = os.open('/dev/full', os.O_WRONLY), os.dup(1)\n"
    code += "    os.dup2(full, 1); print('lost'); os.dup2(out, 1); print('seen')"
    assert shell("{}", code).stdout == b"seen\n"


def test_pipe_whose_reader_is_slow():
    code = "    os.set_blocking(1, False)\n    for _ in range(3): print('x' * 100_000)\n    sys.exit(7)"
    done = shell("{} | (sleep 0.5; cat >/dev/null)", code)
    assert done.returncode == 7


def test_characters_that_the_encoding_lacks_are_escaped():
    assert shell("{}", "    print('f\\u00fcr')", PYTHONIOENCODING="ascii").stdout == b"f\\xfcr\n"


def test_other_errors_are_raised():
    with pytest.raises(BrokenPipeError), safe_output():
        raise BrokenPipeError  # not of the output: gloo's, say
