"""A bad training image is replaced by its worker's next sample: which, how often, and by what name."""

import hashlib
import json
import resource
from contextlib import closing
from pathlib import Path

import images
import pytest
import torch
from torch import Tensor

from onehour.data.dataset import FaultError
from onehour.data.images import ImageOptions, Images, image_folder
from onehour.data.loader import Feed, Skipped
from onehour.data.samples import IN_A_ROW, Keyed, following
from onehour.data.sources import Look, load_data, look
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream
from onehour.training.feeds import name_skipped, too_many
from onehour.training.record import BAD_IMAGES

CPU = torch.device("cpu")
STREAM = SampleStream(samples=24, minibatch=Minibatch(per_worker=2, workers=3), seed=1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """24 images to train on."""
    return images.tree(tmp_path / "data")


def train_of(tree: Path) -> Images:
    return image_folder(tree, ImageOptions(bad_images="skip"))[0]


def at(position: int) -> tuple[int, int]:
    """(epoch, index) of a position of the stream."""
    epochs, indices = STREAM.epochs_and_indices(position // 6)
    return int(epochs[position % 6]), int(indices[position % 6])


def damage(train: Images, *indices: int) -> None:
    for index in indices:
        Path(train.source.name(index)).write_bytes(b"damaged")


def batches(train: Images, loaders: int = 0, seen: Look | None = None) -> tuple[list[tuple[Tensor, Tensor]], Skipped]:
    with closing(Feed(train, seed=1, loaders=loaders, device=CPU, stream=STREAM, look=seen)) as given:
        return list(given.passes([range(3)], start=0, stop=4)), given.skipped


def same(a: Tensor, b: Tensor) -> bool:
    return hashlib.sha256(a.numpy().tobytes()).digest() == hashlib.sha256(b.numpy().tobytes()).digest()


def test_a_worker_goes_on_along_its_own_samples():
    found = following(STREAM, 7)
    assert [next(found) for _ in range(12)] == [at(position) for position in range(10, 46, 3)]


@pytest.mark.parametrize(
    ("bad", "substitute"), [((8,), 11), ((8, 11, 14), 17), ((23,), 26)], ids=["one", "several", "into the next epoch"]
)
def test_a_bad_image_is_replaced_by_its_workers_next_and_all_others_stay(
    tree: Path, bad: tuple[int, ...], substitute: int
):
    """k = 3; each is replaced once, and being looked at on the way to another counts nothing."""
    train = train_of(tree)
    clean, _ = batches(train)
    damage(train, *(at(position)[1] for position in bad))
    found, skipped = batches(train)
    places = {position: divmod(position, 6) for position in range(24)}
    for position, (iteration, row) in places.items():
        if position not in bad:
            assert same(clean[iteration][0][row], found[iteration][0][row])
            assert clean[iteration][1][row] == found[iteration][1][row]
    image, label = train.keyed(at(substitute)[1], seed_for(1, "substitute", bad[0]))
    iteration, row = places[bad[0]]
    assert same(found[iteration][0][row], train.prepare(image[None])[0])
    assert found[iteration][1][row] == label
    if substitute in places:  # it is the next sample, in another crop
        iteration, other = places[substitute]
        assert not same(found[places[bad[0]][0]][0][row], clean[iteration][0][other])
    indices = {at(position)[1] for position in bad}
    assert (skipped.indices, skipped.take(), skipped.take()) == (indices, len(bad), 0)


@pytest.mark.parametrize("loaders", [0, 2])
def test_loaders_tell_what_they_skipped(tree: Path, loaders: int):
    train = train_of(tree)
    damage(train, 3, 5)
    Path(train.source.name(7)).unlink()
    found, skipped = batches(train, loaders=loaders)
    assert len(found) == 4
    assert skipped.indices == {3, 5, 7}
    assert skipped.take() == 3


def test_without_skip_the_first_one_is_an_error(tree: Path):
    train, _ = image_folder(tree)
    damage(train, 3)
    with pytest.raises(FaultError, match=r"cat/0003\.JPEG is not a readable image"):
        batches(train)


def test_validation_never_skips(tree: Path):
    validation = image_folder(tree, ImageOptions(bad_images="skip"))[1]
    assert not validation.skips
    damage(validation, 1)
    with pytest.raises(FaultError, match=r"val/cat/0001\.JPEG is not a readable image"):
        list(Feed(validation, seed=0, loaders=0, device=CPU).chunks(range(1)))


def test_other_errors_are_not_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(image: object, key: int, size: int) -> Tensor:
        raise ValueError("a bug")

    monkeypatch.setattr("onehour.data.images.training_crop", broken)
    with pytest.raises(ValueError, match="a bug"):
        batches(train_of(tree))


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_disk_that_is_gone_ends_at_once(tree: Path, loaders: int):
    train = train_of(tree)
    seen = look("training", train)
    tree.rename(tree.parent / "unmounted")
    expected = rf"JPEG cannot be read: No such file .* \({IN_A_ROW} samples after it cannot be read either: is the disk"
    with pytest.raises(ValueError, match=expected) as raised:
        batches(train, loaders, seen)
    assert "\n" not in str(raised.value)


def test_a_bad_first_image_does_not_stop_a_run_that_skips(tree: Path):
    damage(train_of(tree), 0)
    assert load_data(str(tree), bad_images="skip").channels == 3
    with pytest.raises(FaultError, match=r"cat/0000\.JPEG is not a readable image"):
        load_data(str(tree))


def test_a_stream_is_needed_to_skip(tree: Path):
    train = train_of(tree)
    damage(train, 0)
    with pytest.raises(FaultError, match=r"cat/0000\.JPEG is not a readable image"):
        Keyed(train, seed=1).batch([(0, 0, 0)])


def test_how_many_are_too_many():
    samples = 1_281_167
    one = pytest.approx(0.001 * samples)
    assert too_many(0, 256, samples) == too_many(0, samples, samples) == one
    assert (
        too_many(0, samples + 1, samples)
        == too_many(samples - 1, samples + 1, samples)
        == pytest.approx(0.002 * samples)
    )
    assert too_many(samples, samples + 1, samples) == one


def test_the_allowed_share_never_ends_a_run_wherever_it_began():
    """One image in a thousand is bad: each epoch meets it once, at any place."""
    for at_first, at_second in ((0, 0), (999, 0), (0, 999), (500, 100)):
        met = [at_first, 1000 + at_second]
        for first in (0, 300, 999):
            for position in range(first + 1, 2001):
                replaced = sum(first <= place < position for place in met)
                assert replaced <= too_many(first, position, 1000)


def test_each_is_named_once_whoever_found_it(tree: Path, tmp_path: Path):
    train, skipped, folder = train_of(tree), Skipped(), tmp_path / "run"
    folder.mkdir()
    damage(train, 2, 9)
    others = torch.zeros(24, dtype=torch.int32)
    others[[9, 4]] = 1  # what another process found; 4 is readable here
    skipped.add([2, 2])
    name_skipped(folder, train, skipped, lambda mine: mine + others)
    skipped.add([2])
    name_skipped(folder, train, skipped, lambda mine: mine)
    name_skipped(None, train, skipped, lambda mine: mine)
    lines = [json.loads(line) for line in (folder / BAD_IMAGES).read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == [2, 4, 9]
    assert lines[0]["image"] == train.source.name(2)
    assert lines[0]["problem"] == "is not a readable image"
    assert lines[1] == {
        "index": 4,
        "image": train.name(4),
        "problem": "could not be read where it was needed",
        "remedy": "",
    }


def test_names_that_a_full_disk_refuses_are_written_the_next_time(tree: Path, tmp_path: Path):
    train, skipped, folder = train_of(tree), Skipped(), tmp_path / "run"
    folder.mkdir()
    path = folder / BAD_IMAGES
    skipped.add([2])
    name_skipped(folder, train, skipped, lambda mine: mine)
    before = path.read_bytes()
    skipped.add([3, 4])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        name_skipped(folder, train, skipped, lambda mine: mine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    name_skipped(folder, train, skipped, lambda mine: mine)
    assert [json.loads(line)["index"] for line in path.read_text("utf-8").splitlines()] == [2, 3, 4]


def test_a_line_cut_short_is_written_anew(tree: Path, tmp_path: Path):
    train, skipped, path = train_of(tree), Skipped(), tmp_path / BAD_IMAGES
    path.write_text('{"index": 1}\nno line of ours\n{"index": 2, "ima')
    skipped.add([1, 2])
    name_skipped(tmp_path, train, skipped, lambda mine: mine)
    lines = path.read_text("utf-8").splitlines()
    assert lines[:2] == ['{"index": 1}', "no line of ours"]
    assert [json.loads(line)["index"] for line in lines[2:]] == [2]
