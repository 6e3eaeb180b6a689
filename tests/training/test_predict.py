"""What a run's weights say of image files: order, names, transform, and what cannot be read."""

import csv
import io
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import images
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import onehour
from onehour.cli import main
from onehour.data.cifar import MEAN, STD, Cifar
from onehour.data.dataset import KeyedDataset
from onehour.data.digits import digits, originals
from onehour.data.images import image_folder
from onehour.data.sources import file_reader
from onehour.training.evaluate import Predictor, find_images
from onehour.training.record import Run
from onehour.training.weights import read_weights

NAMES = ["--model", "images:net", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of a folder of images, which is gone; of its validation images there is a copy in "photos"."""
    place = tmp_path_factory.mktemp("predict")
    data = images.tree(place / "data", train=4, val=2)
    sizes: dict[str, Any] = {"minibatch": 4, "per_worker": 4, "base_minibatch": 4, "epochs": 1, "warmup": "none"}
    options: dict[str, Any] = {"out": place / "run", "device": "cpu", "loaders": 0}
    made = onehour.train("resnet50", model="images:net", data=str(data), **sizes, **options)
    shutil.copytree(data / "val", place / "photos")
    data.rename(place / "gone")
    return made


def test_a_folder_is_predicted_as_validation_images_are(run: Run, capsys: pytest.CaptureFixture[str]):
    """Against the plain network on the validation images themselves, classes by their folders' names."""
    photos = run.folder.parent / "photos"
    _, validation = image_folder(run.folder.parent / "gone")
    plain = images.net().eval()
    plain.load_state_dict(read_weights(run.folder))
    crops = validation.prepare(torch.stack([validation.keyed(index, 0)[0] for index in range(len(validation))]))
    with torch.no_grad():
        expected = plain(crops).softmax(1)
    assert main(["predict", str(run.folder), str(photos), *NAMES, "--top", "3"]) == 0
    said = capsys.readouterr()
    head, *found = csv.reader(io.StringIO(said.out))
    assert said.err == ""
    assert head == ["path", "class_1", "probability_1", "class_2", "probability_2", "class_3", "probability_3"]
    assert [row[0] for row in found] == [
        str(photos / name / f"{n:04d}.JPEG") for name in images.CLASSES for n in (0, 1)
    ]
    for row, probabilities in zip(found, expected, strict=True):
        order = probabilities.argsort(descending=True).tolist()
        assert row[1::2] == [images.CLASSES[label] for label in order]
        assert [float(value) for value in row[2::2]] == pytest.approx(probabilities[order].tolist(), abs=1e-5)


def test_what_cannot_be_read_is_named_and_the_others_go_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any
):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(images.saved(images.picture(), "PNG"))
    (tmp_path / "b.png").write_bytes(b"no image")
    to = tmp_path / "found.jsonl"
    command = ["predict", str(run.folder), str(tmp_path), *NAMES, "--format", "jsonl", "--output", str(to)]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    first, last = said.err.splitlines()
    assert first.startswith(f"onehour: {tmp_path / 'b.png'} is not a readable image")
    assert last == "onehour: 1 of 3 images could not be read"
    lines = [json.loads(line) for line in to.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(tmp_path / name) for name in ("a.png", "c.png")]
    assert lines[0]["classes"] == lines[1]["classes"]
    assert lines[0]["classes"][0]["class"] in images.CLASSES
    before = to.read_bytes()
    assert "exists; choose another name, or give --force" in refused(command)
    to.rename(tmp_path / "linked.jsonl")
    to.symlink_to("linked.jsonl")
    assert main([*command, "--force"]) == 2  # of b.png
    assert to.is_symlink()
    assert to.read_bytes() == before


def test_images_are_found_in_the_order_of_paths_and_names(tmp_path: Path):
    for name in ("z.jpg", "b/2.PNG", "b/10.png", "b/.hidden.png", "b/notes.txt", ".git/a.png", "a/c/x.webp", "one"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    found = find_images([tmp_path / "z.jpg", tmp_path, tmp_path / "one"])
    inside = ["a/c/x.webp", "b/10.png", "b/2.PNG", "z.jpg"]
    assert found == [tmp_path / name for name in ("z.jpg", *inside, "one")]


def test_names_of_classes_that_were_damaged_are_one_message(run: Run, tmp_path: Path):
    copy = Run(shutil.copytree(run.folder, tmp_path / "run"))
    assert copy.class_names == list(images.CLASSES)
    sessions = json.loads((copy.folder / "environment.json").read_text())
    sessions["sessions"][-1]["class_names"] = [1]
    (copy.folder / "environment.json").write_text(json.dumps(sessions))
    with pytest.raises(ValueError, match=r"environment\.json is damaged: class_names is not a list of texts"):
        _ = copy.class_names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.png"], "missing.png does not exist"),
        (["empty"], "empty holds no files that are named as images"),
        (["one.png", "--format", "cvs"], "--format is 'cvs'; expected csv"),
        (["one.png", "--top", "4"], "--top is 4, and the model has 3 classes"),
        (["one.png", "--output", "one.png"], "one.png exists; choose another name"),
    ],
)
def test_bad_input_is_one_message(run: Run, alone: Path, arguments: list[str], said: str, refused: Any):
    Path("empty").mkdir()
    Path("one.png").write_bytes(images.saved(images.picture(), "PNG"))
    assert refused(["predict", str(run.folder), *arguments, *NAMES]).startswith(said)


def test_digits_are_read_as_their_composites_are_standardised():
    """By the deviation and the mean that make the training samples of the split what they are."""
    values = originals()[0][7] * 255
    file = images.saved(Image.fromarray(values[0].round().numpy().astype(np.uint8)), "PNG")
    reader = file_reader("digits:3")
    image = reader.dataset.from_file(file, "7.png")
    mean, std = reader.dataset.mean, reader.dataset.std  # type: ignore[attr-defined]
    assert torch.equal(image, ((values.round() / 255) - mean) / std)
    assert image.shape == reader.image.shape == digits(3)[0].tensors[0].shape[1:]
    assert abs(float(mean) - float(originals()[0].mean())) < 0.05
    with pytest.raises(ValueError, match=r"x\.png has 61×47 pixels; this run's images have 8×8"):
        reader.dataset.from_file(images.saved(images.picture(), "PNG"), "x.png")


def test_cifars_archive_need_not_be_there():
    reader = file_reader("gone/cifar-10-python.tar.gz")
    picture = images.picture(size=(32, 32))
    image = reader.dataset.from_file(images.saved(picture, "PNG"), "x.png")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
    assert reader.names()[0] == "airplane"
    plain = (image[None].double() / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    assert (Cifar(image[None], [0], augmented=False).prepare(image[None]) - plain).abs().max() < 1e-5


class Bytes(KeyedDataset):
    """Somebody's own, whose file is a byte a pixel."""

    classes = ("no", "yes")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 1, 2), float(index)), index % 2

    def from_file(self, data: bytes, name: str) -> Tensor:
        return torch.tensor([float(value) for value in data]).view(1, 1, -1)

    def prepare(self, images: Tensor) -> Tensor:
        return images / 10


def own() -> tuple[Bytes, Bytes]:
    return Bytes(), Bytes()


def test_someones_data_says_how_it_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: ModuleType):
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    monkeypatch.setattr(tiny, "own", own, raising=False)
    recipe = onehour.Recipe(model="tinytask:flat", data="tinytask:own")
    predictor = Predictor(tmp_path / "net.pt", recipe=recipe, device="cpu")
    (tmp_path / "a.bin").write_bytes(b"\x05\x07")
    (tmp_path / "long.bin").write_bytes(bytes(3))
    good, bad = predictor.predict([tmp_path / "a.bin", tmp_path / "long.bin"], top=4)
    with torch.no_grad():
        expected = model(torch.tensor([[0.5, 0.7]])).softmax(1)[0]
    assert dict(good.classes) == pytest.approx(
        {name: expected[label].item() for label, name in enumerate(["no", "yes", "2", "3"])}
    )
    assert "was read as (1, 1, 3) of torch.float32, and the run's images are (1, 1, 2)" in bad.problem


def test_data_that_reads_no_files_is_refused_with_what_to_define(tmp_path: Path, tiny: ModuleType):
    torch.save(tiny.net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(
        ValueError, match="is a TensorDataset, which does not say how it reads an image file; derive it"
    ):
        Predictor(tmp_path / "net.pt", recipe=tiny.recipe(), device="cpu")


def test_outputs_that_are_not_finite_are_no_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: ModuleType
):
    model = tiny.flat()
    nn.init.constant_(model[1].bias, torch.nan)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    monkeypatch.setattr(tiny, "own", own, raising=False)
    predictor = Predictor(
        tmp_path / "net.pt", recipe=onehour.Recipe(model="tinytask:flat", data="tinytask:own"), device="cpu"
    )
    (tmp_path / "a.bin").write_bytes(bytes(2))
    with pytest.raises(ValueError, match=r"a\.bin: the model's outputs are NaN or infinite"):
        list(predictor.predict([tmp_path / "a.bin"], top=1))


def test_data_that_was_divided_reads_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: ModuleType):
    monkeypatch.setattr(tiny, "alone", Bytes, raising=False)
    reader = file_reader("tinytask:alone", share=0.5)
    assert reader.dataset.from_file(b"\x05\x07", "a.bin").tolist() == [[[5.0, 7.0]]]
    assert reader.names() == ["no", "yes"]
    folder = images.tree(tmp_path / "data") / "train"
    assert file_reader(str(folder), share=0.5).names() == list(images.CLASSES)
    torch.save(tiny.flat().state_dict(), tmp_path / "net.pt")
    recipe = onehour.Recipe(model="tinytask:flat", data="tinytask:alone", validation=0.5)
    assert Predictor(tmp_path / "net.pt", recipe=recipe, device="cpu").names == ["no", "yes"]


def test_a_divided_data_set_that_reads_no_files_is_refused(monkeypatch: pytest.MonkeyPatch, tiny: ModuleType):
    class Mute(Bytes):
        from_file = KeyedDataset.from_file

    monkeypatch.setattr(tiny, "mute", Mute, raising=False)
    with pytest.raises(ValueError, match="is a Mute, which does not say how it reads an image file"):
        file_reader("tinytask:mute", share=0.5)
