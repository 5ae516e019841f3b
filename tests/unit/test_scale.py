"""The arithmetic of the scale model."""

import pytest

from tests.benchmarks import scale
from tests.benchmarks.scale import COUNTS, LINKS, Link, all_reduce_seconds, gradient_bytes, predict
from tests.benchmarks.scale_check import SIZES, fit

LINK = Link("a link", 1e-3, 1e6)


def test_one_process_does_not_communicate():
    assert all_reduce_seconds(1, 1e9, LINK) == 0
    assert predict(0.5, 100, 1e9, LINK, 1, strong=False).efficiency == 1


def test_a_ring_by_hand():
    """4 processes: 6 messages, each of a millisecond and of a quarter of two million bytes at a million a second."""
    assert all_reduce_seconds(4, 2e6, LINK) == pytest.approx(6 * (0.001 + 0.5))


def test_weak_and_strong_scaling_by_hand():
    weak = predict(1.0, 100, 1e6, LINK, 2, strong=False)
    assert weak.step_seconds == pytest.approx(1 + 2 * (0.001 + 0.5))
    assert weak.epoch_seconds == pytest.approx(weak.step_seconds * 250)
    assert weak.efficiency == pytest.approx(1 / weak.step_seconds)
    strong = predict(1.0, 100, 1e6, LINK, 2, strong=True)
    assert strong.step_seconds == pytest.approx(weak.step_seconds - 0.5)
    assert strong.epoch_seconds == pytest.approx(strong.step_seconds * 500)
    assert strong.efficiency == pytest.approx(0.5 / strong.step_seconds)


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_more_processes_are_never_more_efficient(link, strong):
    efficiencies = [predict(0.01, 2000, 8e6, link, count, strong).efficiency for count in COUNTS]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] == 1
    assert efficiencies[-1] > 0


def test_the_fit_finds_the_link_again():
    made_up = [(p, size, all_reduce_seconds(p, size, LINK)) for p in (2, 4) for size in SIZES]
    found = fit(made_up)
    assert (found.alpha, found.bandwidth) == (pytest.approx(LINK.alpha), pytest.approx(LINK.bandwidth))


def test_gradients_are_those_of_the_trained_parameters():
    assert gradient_bytes("net") == 4 * 62_006
    assert gradient_bytes("speed") == 4 * 1_971_352


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
    files = ["--json", str(tmp_path / "scale.json"), "--plot", str(tmp_path / "scale.png")]
    assert scale.main(["--step-ms", "10", "--batch", "1000", "--model", "net", *files]) == 0
    assert "| 1,024 |" in capsys.readouterr().out
    assert (tmp_path / "scale.json").stat().st_size > 1000
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("argv", [["--model", "vgg"], ["--step-ms", "0"], ["--step-ms", "nan"], ["--batch", "-1"]])
def test_a_mistake_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        scale.main(argv)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("tests.benchmarks.scale: error: ")
    assert said.count("\n") == 1
