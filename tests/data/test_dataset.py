"""A fault is one line that any terminal prints, and survives its way between processes."""

import os
import pickle

from onehour.data.dataset import FaultError


def test_a_fault_is_an_error_with_parts():
    fault = FaultError("a/b.jpg", "is an empty file", "replace or remove it")
    assert isinstance(fault, ValueError)
    assert str(fault) == "a/b.jpg is an empty file; replace or remove it"
    assert not fault.note


def test_it_survives_pickling():
    fault = pickle.loads(pickle.dumps(FaultError("a", "b", "c", note=True)))
    assert (fault.path, fault.problem, fault.remedy, fault.note, str(fault)) == ("a", "b", "c", True, "a b; c")


def test_names_of_any_bytes_are_one_printable_line():
    name = os.fsdecode(b"a\n\x1b[31m\xff\xc3\xa9.jpg")
    text = str(FaultError(name, "is odd", "look at it"))
    assert text == r"a\n\x1b[31m\udcffé.jpg is odd; look at it"
    text.encode("utf-8")
