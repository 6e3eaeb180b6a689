"""JSON and TOML that is not what it should be: one message, whatever it is, in whichever file of a run."""

from pathlib import Path

import pytest
import studies

from onehour.sidefile import COUNT, NUMBER, object_of, read_lines, read_toml
from onehour.study.results import read_paths
from onehour.training.record import Run

ODD = {
    "nothing": b"",
    "an array": b"[]",
    "null": b"null",
    "text": b'"x"',
    "a number": b"3",
    "cut": b'{"outcome": "fin',
    "deep": b"[" * 100_000,
    "deep in an object": b'{"sessions": ' + b"[" * 100_000,
    "a huge number": b'{"outcome": ' + b"9" * 5000 + b"}",
    "twice": b'{"outcome": "finished", "outcome": "finished"}',
    "UTF-16": '{"outcome": "finished"}'.encode("utf-16"),
    "no UTF-8": b'{"outcome": "\xff"}',
    "of other kinds": b'{"outcome": 3, "recipe": 3, "sessions": 3}',
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", ["summary.json", "environment.json", "metrics.jsonl"])
def test_a_file_of_a_run_that_is_not_what_it_should_be_is_one_message(tmp_path: Path, name: str, content: bytes):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    (run / name).write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        read_paths([run])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["1e400", "NaN", '"x"', "[]", "null", "9" * 40])
def test_a_number_that_is_none_is_named(value: str):
    with pytest.raises(ValueError, match=r"epoch is .*; expected a number"):
        object_of(f'{{"epoch": {value}}}', {"epoch": NUMBER})


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    for name in ("summary.json", "metrics.jsonl", "recipe.toml"):
        (run / name).write_bytes(b"\xef\xbb\xbf" + (run / name).read_bytes().replace(b"\n", b"\r\n"))
    assert Run(run).recipe == studies.BASE
    assert Run(run).final_error == pytest.approx(3.5, abs=0.5)
    assert Run(run).finished


def test_a_line_is_named_and_one_without_its_end_is_left_out(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"recipe": {}}\n{"iteration": 1}\n{"iteration": 2')
    assert read_lines(path, {"iteration": COUNT}, ["iteration"], head=["recipe"])[1:] == [{"iteration": 1}]
    path.write_text('{"recipe": {}}\n{"iteration": 1.5}\n')
    with pytest.raises(ValueError, match=r"line 2: iteration is 1\.5; expected a whole number"):
        read_lines(path, {"iteration": COUNT}, head=["recipe"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a = 1".encode("utf-16"), "is not UTF-8"),
        ('a = "é"'.encode("latin-1"), "is not UTF-8: byte 5 is 0xe9"),
        (b"a = 1\na = 2\n", "Cannot overwrite a value"),
        (b"a.b = 1\na = 2\n", "Cannot overwrite a value"),
        (b"a = " + b"[" * 10_000, "recursion"),
        (b"a = \0", "Invalid value"),
    ],
)
def test_toml_that_is_none_is_one_message(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
