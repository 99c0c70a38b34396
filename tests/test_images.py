"""Images as people have them: data=folder, images= and ood.sets= of folders with what else lies there."""

import os
import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run
from omegaconf import OmegaConf
from PIL import Image, TiffImagePlugin

import sample
from ebm.data import Dataset, image_folder
from ebm.energies import ConvEnergy
from ebm.evaluation import figures, outliers
from ebm.evaluation.restoration import hidden_pixels
from ebm.files import image_files, opened, read_image
from ebm.running import allowed, checkpoint

GREY = Dataset("grey", torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def fill(folder, count, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def classes(folder, names="abc"):
    for letter in names:
        fill(folder / letter, 5)


def given(path, shape=(1, 8, 8), data=None):
    """What sample.py makes of images=path."""
    cfg = OmegaConf.create({"images": str(path), "data": {"_target_": None}})
    return sample.images_of(cfg, {"energy_config": {"shape": list(shape)}, "config": {"data": data or {}}})


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(file):
    """The head of a PNG of 400 million pixels: who decodes it, fails otherwise."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))


def corrupt(file):
    fill(file.parent, 1, (32, 32))
    file.write_bytes((file.parent / "000.png").read_bytes()[:1500])


def plain(folder):
    fill(folder, 7)


def halflink(folder):
    fill(folder / "a", 5)
    fill(folder.parent / "elsewhere", 4)
    (folder / "b").symlink_to(folder.parent / "elsewhere")


def hidden(folder):
    classes(folder)
    fill(folder / ".ipynb_checkpoints", 5)
    (folder / "a/._000.png").write_bytes(b"\0\x05\x16\x07")


def stray(folder):
    classes(folder)
    (folder / "preview.png").write_bytes((folder / "a/000.png").read_bytes())


def flatmix(folder):
    fill(folder, 7)
    fill(folder / "sub", 2)


def other(folder):
    fill(folder, 7)
    (folder / "000.png").rename(folder / "000.PNG")
    for name in ("license.pdf", "labels.h5", "clip.mpg"):
        (folder / name).write_bytes((folder / "001.png").read_bytes())
    (folder / "stuff.png").mkdir()


def single(folder):
    fill(folder / "only", 7)


CASES = [(plain, 7, None, 7), (halflink, 9, ["a", "b"], 9), (hidden, 15, ["a", "b", "c"], 15)]
CASES += [(stray, 15, ["a", "b", "c"], 16), (flatmix, 9, None, 9), (other, 7, None, 7), (single, 7, ["only"], 7)]


@pytest.mark.parametrize(("make", "count", "names", "below"), CASES, ids=[case[0].__name__ for case in CASES])
def test_which_files_are_images_and_which_folders_classes(make, count, names, below, tmp_path, capsys):
    make(tmp_path / "images")
    data = image_folder(str(tmp_path / "images"), 8, 1)
    assert len(data.train) + len(data.validation) + len(data.test) == count and data.class_names == names
    if names is None:
        assert data.train_labels is None
    else:
        labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
        assert labels.unique().tolist() == list(range(len(names)))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (make is stray) and all("1 of 16 images" in line and "preview.png" in line for line in told)
    assert len(given(tmp_path / "images")) == below
    assert len(outliers.outliers(f"{tmp_path}/images", GREY, "")) == below


def test_links_that_lead_nowhere_or_in_circles(tmp_path):
    fill(tmp_path / "a", 3)
    for link, target, words in [("a/up", tmp_path, "loop of links"), ("gone", tmp_path / "x", "leads nowhere")]:
        (tmp_path / link).symlink_to(target)
        for read in (image_folder, given, lambda path: outliers.outliers(path, GREY, "")):
            with pytest.raises(ValueError, match=f"{link} .*{words}"):
                read(f"{tmp_path}/")
        (tmp_path / link).unlink()


def images_in(x):
    """Images (N, C, H, W), whatever their order."""
    return Counter(image.numpy().tobytes() for image in x)


@pytest.mark.parametrize("validation", ["val", "Valid", "validation"])
def test_folders_called_train_test_and_val_are_the_splits(validation, tmp_path, capsys):
    for split, count in (("train", 6), ("test", 40), (validation, 3)):
        for letter in "ab":
            fill(tmp_path / split / letter, count)
    fill(tmp_path / "beside", 2)
    data = image_folder(str(tmp_path), 8)
    assert data.class_names == ["a", "b"]
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6 and data.validation_labels.tolist() == [0] * 3 + [1] * 3
    for split, x in (("train", data.train), (validation, data.validation), ("test", data.test)):
        files = (tmp_path / split).glob("*/*.png")
        assert images_in(x) == images_in(read_image(file, (3, 8, 8)) for file in files)
    assert data.test_labels.bincount().tolist() == [40, 40] and 0 < data.test_labels[:40].sum() < 40  # shuffled
    (told,) = capsys.readouterr().err.splitlines()
    assert "2 of 100 images" in told and "beside/000.png" in told
    fill(tmp_path / "test/c", 1)
    with pytest.raises(ValueError, match=r"train has the classes \['a', 'b'\].*test \['a', 'b', 'c'\]"):
        image_folder(str(tmp_path), 8)


def test_a_train_without_a_test_is_split_and_a_class_may_be_called_train(tmp_path):
    classes(tmp_path / "one/train", "ab")
    data = image_folder(str(tmp_path / "one"), 8, test_fraction=0.2)
    assert data.class_names == ["a", "b"]
    assert (len(data.train), len(data.validation)) == (7, 1)
    assert sorted(data.test_labels.tolist()) == [0, 1]
    for name in ("bus", "car", "train"):
        fill(tmp_path / "traffic" / name, 3)
    assert image_folder(str(tmp_path / "traffic"), 8).class_names == ["bus", "car", "train"]


@pytest.mark.parametrize("spoil", [bomb, corrupt])
def test_a_file_that_cannot_be_read_is_named_or_left_out(spoil, tmp_path, capsys):
    fill(tmp_path, 7)
    spoil(tmp_path / "999.png")
    for read in (image_folder, given, lambda path: outliers.outliers(path, GREY, "")):
        with pytest.raises(ValueError, match=r"999\.png is not a readable image: .*(exceeds limit|truncated)"):
            read(str(tmp_path))
    data = image_folder(str(tmp_path), 8, skip_unreadable=True)
    assert len(data.train) + len(data.validation) + len(data.test) == 7
    assert "1 unreadable images left out" in capsys.readouterr().err
    for i in range(7):
        (tmp_path / f"{i:03d}.png").unlink()
    with pytest.raises(ValueError, match="holds 0 images that can be read"):
        image_folder(str(tmp_path), 8, skip_unreadable=True)


def test_what_is_in_a_file_decides_no_reader(tmp_path):
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"eps\.png is not a readable image: cannot identify"):
        opened(tmp_path / "eps.png", "L")


RAMP = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4)  # of bytes, 0 to 255 by 17
BYTES = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm", "float.tif", "float.pfm"])
def test_deep_images_are_scaled_by_the_range_of_their_format(name, tmp_path):
    pixels = (BYTES / 255).astype(np.float32) if "float" in name else RAMP
    Image.fromarray(pixels).save(tmp_path / name)
    assert np.array_equal(opened(tmp_path / name, "L"), BYTES)
    assert np.array_equal(opened(tmp_path / name, "RGB"), np.stack([BYTES] * 3, axis=-1))


def test_a_tiff_says_whether_white_is_zero(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(RAMP).save(tmp_path / "inverted.tif", tiffinfo=tags)
    assert np.array_equal(opened(tmp_path / "inverted.tif", "L"), 255 - BYTES)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.float32([[0, 255.0]]), r"floats in \[0, 1\].*it has \[0, 255\]"),
        (np.float32([[-0.1, 1]]), r"floats in \[0, 1\].*it has \[-0.1, 1\]"),
        (np.float32([[0, np.nan]]), r"floats in \[0, 1\]"),
        (np.int32([[0, 70_000]]), "32-bit integers cannot be told"),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(pixels, words, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif is not a readable image: .*" + words):
        opened(tmp_path / "x.tif", "L")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "16.png", "16.tif"])
def test_images_are_turned_as_they_say(name, orientation, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = orientation
    pixels = RAMP if "16" in name else BYTES
    Image.fromarray(pixels).save(tmp_path / name, exif=tags, lossless=True)
    turns = [np.asarray, np.fliplr, lambda x: x[::-1, ::-1], np.flipud, np.transpose]
    turns += [lambda x: np.rot90(x, -1), lambda x: x[::-1, ::-1].T, np.rot90]
    assert np.array_equal(opened(tmp_path / name, "L"), turns[orientation - 1](BYTES))


@pytest.mark.parametrize("name", ["RGBA.png", "RGBA.webp", "RGBA.tif", "LA.png", "P.png", "P.gif", "16.png"])
def test_hidden_colours_of_transparent_pixels_do_not_show(name, tmp_path):
    transparent = np.arange(16).reshape(4, 4) % 2 == 0
    mode = name.partition(".")[0]
    if mode in ("P", "16"):  # a value stands for transparency
        values = np.where(transparent, 40, 90).astype(np.uint8)
        image = Image.fromarray(values if mode == "P" else values * np.uint16(257))
        image.save(tmp_path / name, transparency=40 if mode == "P" else 40 * 257)
    else:
        alpha = np.where(transparent, 0, 255).astype(np.uint8)
        grey = np.where(transparent, np.random.default_rng(0).integers(0, 256, (4, 4)), 90).astype(np.uint8)
        image = Image.fromarray(np.stack([grey] * (len(mode) - 1) + [alpha], axis=-1), mode)
        image.save(tmp_path / name, lossless=True)
    for name_of_other in ("opaque", "another"):
        Image.new("L", (4, 4), 1).save(tmp_path / f"{name_of_other}.png")
    for background, seen in (("black", 0), ("white", 255), ("#0a0a0a", 10)):
        assert np.array_equal(opened(tmp_path / name, "L", background), np.where(transparent, seen, 90))
        data = image_folder(str(tmp_path), 4, 1, background=background)
        expected = np.where(transparent, seen, 90)
        assert any(np.array_equal(x[0], expected) for x in torch.cat([data.train, data.validation, data.test]))
    # images= and ood.sets= take the background that the checkpoint's data were read with
    read = given(tmp_path / name, (1, 4, 4), {"_target_": "ebm.data.image_folder", "background": "white"})
    np.testing.assert_allclose(read[0, 0], np.where(transparent, 255, 90) / 127.5 - 1, atol=1e-6)
    data = Dataset("x", torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    x = outliers.outliers(f"{tmp_path}/", data, "", background="white")
    assert int(x.max()) == 255 and int((x == 255).sum()) == transparent.sum()
    with pytest.raises(ValueError, match=r"data\.background must be a colour, .*got 'nothing'"):
        image_folder(str(tmp_path), background="nothing")


def test_images_are_cut_to_the_shape_of_the_energy_alone(tmp_path):
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    for read in (
        lambda shape: read_image(tmp_path / "x.png", shape),
        lambda shape: (given(tmp_path, shape)[0] + 1) * 127.5,
    ):
        whole = read((1, 20, 40))
        torch.testing.assert_close(whole[0].float(), torch.from_numpy(ramp).float())
        assert read((1, 10, 20)).shape == (1, 10, 20)
        assert read((1, 10, 20))[0, 5, 0] < 6 < 228 < read((1, 10, 20))[0, 5, -1]  # both ends are there
        assert read((3, 20, 20))[0, 0, [0, -1]].tolist() == pytest.approx([60, 174])  # the middle square
    pair = Dataset("wide", torch.zeros(2, 1, 20, 40), torch.zeros(1, 1, 20, 40))
    Image.fromarray(ramp).save(tmp_path / "y.png")
    assert torch.equal(outliers.outliers(f"{tmp_path}/", pair, "")[1, 0], torch.from_numpy(ramp))


def test_a_mask_is_read_as_other_pictures_are(tmp_path):
    Image.fromarray(np.where(np.eye(8) > 0, 65535, 20_000).astype(np.uint16)).save(tmp_path / "mask.png")
    assert torch.equal(hidden_pixels(str(tmp_path / "mask.png"), (1, 8, 8))[0], torch.eye(8, dtype=torch.bool))


def test_nothing_to_read_is_one_line(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 28, 28), np.float32))
    np.save(tmp_path / "words.npy", np.full((2, 1, 28, 28), "x"))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "empty.npz").mkdir()
    for name, words in [
        ("none.npy", "holds no images"),
        ("words.npy", "must hold numbers"),
        ("torn.npz", "holds no array of images"),
        ("empty.npz", "is a folder without images"),
    ]:
        with pytest.raises(ValueError, match=rf"images={tmp_path / name} {words}"):
            given(tmp_path / name, (1, 28, 28))
    nothing = [f"images={tmp_path / 'empty.npz'}", "init=images", "device=cpu", f"out={tmp_path / 'never'}"]
    assert_one_line_error(run("sample.py", *nothing), "empty.npz is a folder without images")
    found = run("train.py", "data=folder", f"data.root={tmp_path}", f"hydra.run.dir={tmp_path / 'never'}")
    assert_one_line_error(found, f"data.root={tmp_path} holds 0 images")
    assert not list(tmp_path.glob("never/*"))
    with pytest.raises(ValueError, match="holds 0 images"):
        outliers.outliers(f"{tmp_path}/empty.npz", GREY, "")


# --- any number of channels, and names of classes


def test_other_channels_than_one_and_three_are_drawn_one_below_the_other():
    x = torch.stack([torch.full((2, 3), value) for value in (-1.0, 0.0, 1.0, -1.0)])  # (4, 2, 3)
    for channels in (2, 4):
        picture = figures.pixels(x[:channels])
        assert picture.shape == (3 * channels - 1, 3, 3)
        assert picture[:, 0, 0].tolist() == [0, 0, 255, 128, 128, 255, 255, 255, 255, 0, 0][: 3 * channels - 1]
    assert figures.pixels(x[:1]).shape == figures.pixels(x[:3]).shape == (2, 3, 3)


def stripes(channels):
    """Images (channels, 6, 8) of three classes, as a user's own function gives them."""
    labels = torch.arange(60) % 3
    x = torch.sin(torch.arange(8) * (labels.view(-1, 1, 1, 1) + 1) + torch.arange(channels).view(-1, 1, 1))
    x = x.expand(-1, -1, 6, -1).contiguous()
    return Dataset(
        "stripes", x[:40], x[40:], labels[:40], labels[40:], class_names=["slow", "$fast^", "fastest", "none"]
    )


@pytest.mark.parametrize("channels", [2, 4])
def test_any_channels_are_trained_sampled_and_evaluated(channels, tmp_path, monkeypatch):
    monkeypatch.setattr("ebm.data.mnist5k", lambda hold_out: stripes(channels))
    monkeypatch.setitem(allowed.SHIPPED["data"], "ebm.data.mnist5k", lambda hold_out: stripes(channels))
    folder, quiet = tmp_path / "run", ["device=cpu", "wandb.mode=disabled"]
    small = ["energy.hidden=2", "energy.classes=3", "buffer.capacity=48", "sampler.steps=2", "train.batch_size=8"]
    limits = ["train.max_steps=2", "train.sample_steps=4"]
    done = run("train.py", *small, *limits, *quiet, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(folder)["class_names"] == ["slow", "$fast^", "fastest"]
    for overrides in (["num_samples=9"], ["init=interpolate", "num_samples=2"]):
        where = [f"checkpoint={folder}", f"out={folder / 'out'}", "device=cpu", "steps=2"]
        done = run("sample.py", *overrides, *where)
        assert done.returncode == 0, done.stderr
    found = run("sample.py", "init=images", f"images={folder}/samples", *where)
    assert_one_line_error(found, "grey or RGB", f"not as ({channels}, 6, 8)")
    tiny = ["evaluation=scores", "bootstrap=2", f"ood.sets=[blurred,{folder}/samples]"]
    done = run("evaluate.py", f"checkpoint={folder}", *tiny, *quiet, f"out={tmp_path / 'evaluated'}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"skipped +ood/samples: .*grey or RGB", done.stdout)


def test_classes_have_names(tmp_path):
    with pytest.raises(ValueError, match="label 2 has no name, class_names are 2"):
        Dataset("x", torch.zeros(3, 1), torch.zeros(3, 1), torch.arange(3), torch.arange(3), class_names=["a", "b"])
    for bad in ("ab", ["a", 1], ("a", "b")):
        with pytest.raises(ValueError, match="class_names must be a list of strings"):
            Dataset("x", torch.zeros(2, 1), torch.zeros(2, 1), class_names=bad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = ConvEnergy((1, 8, 8), hidden=2, classes=3)
    state = {"energy": energy.state_dict(), "config": {}, "step": 0, "epoch": 0, "class_names": ["cat", "2", "$dog"]}
    kind = {"_target_": "ebm.energies.ConvEnergy", "shape": [1, 8, 8], "hidden": 2, "classes": 3}
    state["energy_config"] = kind
    file, out = tmp_path / "x.pt", tmp_path / "out"
    checkpoint.save(file, state)
    drawn = [f"checkpoint={file}", f"out={out}", "steps=1", "device=cpu"]
    for label, number in [("cat", 0), ("'2'", 1), ("2", 1), ("'$dog'", 2), ("0", 0)]:  # a name goes before a number
        done = run("sample.py", *drawn, f"label={label}", "num_samples=2")
        assert done.returncode == 0, done.stderr
        assert np.load(out / "samples.npz")["labels"].tolist() == [number] * 2
    assert_one_line_error(run("sample.py", *drawn, "label=bird"), "label must be", "cat, 2, $dog", "'bird'")
    sizes = {}
    for names in (["cat"], None):  # of more classes than names, or of none: numbers
        checkpoint.save(file, state | {"class_names": names})
        done = run("sample.py", *drawn, "num_samples=30")
        assert done.returncode == 0, done.stderr
        with Image.open(out / "grid.png") as grid:
            sizes[names is None] = grid.width / grid.height
    assert sizes[False] > sizes[True] == pytest.approx(10 / 3, rel=0.1)  # the names stand beside it
    done = run("sample.py", *drawn, "num_samples=600")
    with Image.open(out / "grid.png") as grid:  # at most 400 of them, of every class
        assert grid.width / grid.height == pytest.approx(133 / 3, rel=0.1)
    for bad, words in [("cat", "no list"), (["a", 1], "no list"), (list("abcd"), "4 class_names for 3 classes")]:
        checkpoint.save(file, state | {"class_names": bad})
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.load(file)


def test_long_names_are_cut_in_pictures(tmp_path):
    figures.histogram(tmp_path / "h.png", {"real": np.ones(3) / 3}, ["a" * 300, "$x^$", "c\nd\udcff"])
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.height < picture.width


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert image_files(tmp_path) == []
    with pytest.raises(ValueError, match=r"a\.png is not a readable image: it is no file"):
        read_image(tmp_path / "a.png", (1, 8, 8))
