"""A thousand of the 20,000 damaged files that `make fuzz` reads: pixels or one message, soon, in little memory."""

import json

import pytest

from campaigns import damaged_images
from campaigns import fuzz_images as fuzz


@pytest.mark.parametrize("start", [0, 250, 500, 750])
def test_damaged_files_are_pixels_or_one_message(start: int):
    found = fuzz.chunk(range(start, start + 250))
    assert found["findings"] == []
    assert found["outcomes"]["decoded"] + found["outcomes"]["refused"] == 250
    assert min(found["outcomes"]["decoded"], found["outcomes"]["refused"]) > 25
    assert found["peak_kib"] < fuzz.GIBIBYTE


def test_images_are_the_same_each_time():
    first, second = ([damaged_images.damaged(number) for number in range(50)] for _ in range(2))
    assert first == second
    assert len({damaged_images.damaged(number)[1] for number in range(200)}) > 190


@pytest.mark.parametrize("number", [1886, 5000, 7654, 10712])
def test_what_the_fuzz_once_found_stays_mended(number: int):
    """Frames counted in a damaged directory; an image too long for a JPEG at any size."""
    assert damaged_images.attempt(number)[0] in ("decoded", "refused")


def test_a_hang_a_crash_and_a_traceback_would_be_found(monkeypatch: pytest.MonkeyPatch):
    real = damaged_images.attempt

    def worse(number: int) -> tuple[str, float]:
        if number == 3:
            __import__("time").sleep(60)
        if number == 5:
            __import__("os")._exit(7)
        if number == 7:
            return "KeyError: 'x'", 0.0
        return real(number)

    monkeypatch.setattr(damaged_images, "attempt", worse)
    found = fuzz.chunk(range(10), 1.5)
    assert found["findings"] == [[3, "hangs"], [5, "ended its process with 7"], [7, "KeyError: 'x'"]]
    assert sum(found["outcomes"].values()) == 8


def test_the_committed_result_has_no_findings():
    if not fuzz.RESULT.exists():
        pytest.skip("no result is committed yet: run `make fuzz`")
    result = json.loads(fuzz.RESULT.read_text())
    assert result["images"] == 20_000
    assert result["findings"] == []
    assert result["slowest"][0] < fuzz.SECONDS
    assert result["peak_mib"] < 1024
