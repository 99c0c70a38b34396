"""Checkpoint files: whole or not there, never a surprise in them, whoever wrote them."""

import io
import os
import pickle
import resource
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor  # noqa: F401 — a name that a hostile file can find here

from ebm.energies import ConvEnergy, MLPEnergy
from ebm.running import allowed, checkpoint
from ebm.running.checkpoint import CheckpointError, build_energy, load, load_energy, save, save_run
from ebm.running.cli import output_folder


def state_of(energy, config, step=0, **more):
    state = {"energy": energy.state_dict(), "energy_config": config, "config": {}, "step": step, "epoch": 0}
    return state | {"healthy": True} | more


def tiny(seed=0, step=0, **more):
    torch.manual_seed(seed)
    config = {"_target_": "ebm.energies.MLPEnergy", "shape": [2], "hidden": 3, "depth": 1}
    chains = torch.rand(4, 2)
    buffer = {"chains": chains, "ages": torch.arange(4), "front": 0, "class_means": None}
    return state_of(MLPEnergy([2], 3, 1), config, step, buffer=buffer) | more


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- written whole, kept, found again


def test_round_trip_keeps_bits_and_plain_values(tmp_path):
    state = tiny(step=7, best=float("inf"), config={"a": [1, None, "x"], "b": {"c": 1e-3}})
    save(tmp_path / "a.pt", state)
    got = load(tmp_path / "a.pt")
    assert got["config"] == state["config"] and got["best"] == float("inf") and got["step"] == 7
    assert all(torch.equal(got["energy"][key], value) for key, value in state["energy"].items())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:  # a zip file like any other, too
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    assert names(tmp_path) == {"a.pt"}


def test_keeps_the_last_healthy_ones_and_the_best(tmp_path):
    for step in range(0, 60, 10):
        save_run(tmp_path, tiny(step=step, healthy=step != 50), keep=2, best=step == 20, numbered=True)
    save_run(tmp_path, tiny(step=50), keep=2, best=False, numbered=False)
    assert names(tmp_path) == {"last.pt", "best.pt", "step_000030.pt", "step_000040.pt"}
    steps = {path.name: load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 50, "best.pt": 20, "step_000030.pt": 30, "step_000040.pt": 40}


def test_other_files_beside_the_checkpoints(tmp_path):
    save_run(tmp_path, tiny(step=3), keep=2, best=False, numbered=True)
    (tmp_path / "step_1x.pt").write_text("")
    (tmp_path / ".last.pt.123.part").write_text("of a process that was killed")
    save_run(tmp_path, tiny(step=4), keep=1, best=False, numbered=True)
    assert names(tmp_path) == {"last.pt", "step_000004.pt", "step_1x.pt"}


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("none here")))
    save_run(tmp_path, tiny(step=3), keep=2, best=True, numbered=True)
    assert names(tmp_path) == {"last.pt", "best.pt", "step_000003.pt"}
    assert load(tmp_path / "best.pt")["step"] == 3


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "zeros at the end"])
def test_a_torn_newest_checkpoint_is_named_and_passed_over(tmp_path, damage):
    for step in (10, 20):
        save_run(tmp_path / "checkpoints", tiny(step=step), keep=3, best=False, numbered=True)
    last = tmp_path / "checkpoints/last.pt"
    content = bytearray(last.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content[-500:] = bytes(500)
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=r"(last|step_000020)\.pt is torn.*passing it over"):
        assert load(tmp_path)["step"] == 10


def test_a_run_without_a_whole_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match="passing it over"), pytest.raises(CheckpointError, match="no whole"):
        load(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """RLIMIT_FSIZE makes write() fail midway, as a full disk does."""
    save_run(tmp_path, tiny(step=1), keep=2, best=True, numbered=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt cannot be written \(File too large\)"):
            save_run(tmp_path, tiny(step=2), keep=2, best=True, numbered=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save(tmp_path / "file" / "last.pt", tiny())


# --- hostile files


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_payload_is_not_executed(tmp_path):
    proof = tmp_path / "executed"
    for i, content in enumerate([Payload(proof), tiny() | {"config": Payload(proof)}]):
        file = tmp_path / f"{i}.pt"
        torch.save(content, file)
        with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
            load(file)
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
            load(file)
    assert not proof.exists()


def rezipped(content, change):
    """The zip file with its entries passed through change(name, data) → (data, compression)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data, compression = change(name, old.read(name))
            new.writestr(name, data, compression)
    return out.getvalue()


def test_zip_bombs(tmp_path):
    save(tmp_path / "a.pt", tiny())
    content = (tmp_path / "a.pt").read_bytes()
    bomb = rezipped(content, lambda name, data: (data + bytes(10**7) * ("data/" in name), zipfile.ZIP_DEFLATED))
    (tmp_path / "bomb.pt").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="compressed"):
        load(tmp_path / "bomb.pt")
    stored = bytearray(rezipped(content, lambda name, data: (data, zipfile.ZIP_STORED)))
    at = stored.rfind(b"PK\x01\x02")  # the last entry of the directory: its sizes lie
    stored[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "lie.pt").write_bytes(stored)
    with pytest.raises(CheckpointError, match=r"declares \d+ bytes"):
        load(tmp_path / "lie.pt")


def conv(**config):
    energy = ConvEnergy((1, 8, 8), 2, config.get("classes"))
    return state_of(energy, {"_target_": "ebm.energies.ConvEnergy", "shape": [1, 8, 8], "hidden": 2} | config)


def with_weights(**weights):
    state = conv()
    return state | {"energy": state["energy"] | {name.replace("__", "."): value for name, value in weights.items()}}


def nested(depth):
    """A list of a list twice, of which … : it has 2^depth numbers and takes the room of `depth`."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


HOSTILE = {
    "not finite": lambda: with_weights(layers__11__bias=torch.tensor([float("nan")])),
    "float64": lambda: with_weights(layers__11__bias=torch.zeros(1, dtype=torch.float64)),
    r"is float32 \(2,\), not float32 \(1,\)": lambda: with_weights(layers__11__bias=torch.zeros(2)),
    "extra is unknown": lambda: with_weights(extra=torch.zeros(1)),
    "missing": lambda: conv() | {"energy": {}},
    "no plain tensor": lambda: with_weights(layers__11__bias=[0.0]),
    "claims more than is in the file": lambda: with_weights(layers__0__weight=torch.zeros(1).expand(10**6, 10**6)),
    "energy is list": lambda: conv() | {"energy": [1]},
    "holds no energy": lambda: {"config": {}},
    "format 99": lambda: conv() | {"format": 99},
    "config is str": lambda: conv() | {"config": "os.system"},
    "shape is": lambda: conv(shape=[1, -8, 8]),
    "shape is None": lambda: conv(shape=None),
    "larger than": lambda: conv(hidden=10**9),
    "another architecture": lambda: conv(hidden=30000),
    "unexpected keyword": lambda: conv(code="print()"),
    "os.system, is none of ebm's": lambda: conv(_target_="os.system"),
    "antigravity.fly, is none of ebm's": lambda: conv(_target_="antigravity.fly"),
    "SGLD, is none of ebm's": lambda: conv(_target_="ebm.sampling.sgld.SGLD"),
    "Linear, is none of ebm's": lambda: conv(_target_="torch.nn.Linear"),
    "Observed, is none of ebm's": lambda: conv(_target_="ebm.composition.Observed"),
    "write_text, is none of ebm's": lambda: conv(_target_="ebm.running.checkpoint.Path.write_text"),
    "torch is not defined in": lambda: conv(_target_=f"{__name__}.torch"),
    "Tensor is not defined in": lambda: conv(_target_=f"{__name__}.Tensor"),
    "Payload is not an energy": lambda: conv(_target_=f"{__name__}.Payload"),
    "nothing cannot be imported": lambda: conv(_target_=f"{__name__}.nothing"),
    "plain values.*_args_": lambda: conv(_args_=[1]),
    "plain values.*_partial_": lambda: conv(_partial_=True),
    "plain values.*_convert_": lambda: conv(_convert_="all"),
    "plain values.*_recursive_": lambda: conv(_recursive_=False),
    "plain values.*_target_": lambda: conv(hidden={"_target_": "os.getpid"}),
    "plain values.*in a list": lambda: conv(hidden=[{"_target_": "in a list"}]),
    "plain values.*tensor": lambda: conv(hidden=torch.ones(())),
    "too many values": lambda: conv(hidden=nested(60)),
    "a key that is neither": lambda: conv() | {"config": {(1, 2): 3}},
    "a Size, which is no plain value": lambda: conv(shape=torch.Size([1, 8, 8])),
    "a complex, which is no plain value": lambda: conv(hidden=1j),
    "a bytearray|other things": lambda: conv(hidden=bytearray(8)),
    "a size in": lambda: conv(shape=[1, 2**60, 2**60]),
    "plain values.*oc.env": lambda: conv(hidden="${oc.env:HOME}"),
    "config.data is list": lambda: conv() | {"config": {"data": ["os.system"]}},
    "config.sampler is str": lambda: conv() | {"config": {"sampler": "os.system"}},
    "data_hashes are no dict": lambda: conv() | {"data_hashes": 3},
    "buffer.chains": lambda: conv() | {"buffer": {"chains": torch.zeros(3, 2), "ages": torch.zeros(3)}},
    "buffer.ages": lambda: conv() | {"buffer": {"chains": torch.zeros(3, 1, 8, 8), "ages": torch.zeros(3)}},
    "class_shares are no": lambda: conv(classes=2) | {"class_shares": [0.5, float("nan")]},
    "3 class_shares for 2 classes": lambda: conv(classes=2) | {"class_shares": [0.2, 0.3, 0.5]},
    "2 class_shares for None classes": lambda: conv() | {"class_shares": [0.5, 0.5]},
    "buffer is no dict": lambda: conv() | {"buffer": 1},
}


class WithItems:
    """Unpickled, it is a dict with a method of the file's own."""

    def __init__(self, weights):
        self.weights = weights

    def __reduce__(self):
        return OrderedDict, (list(self.weights.items()),), {"items": torch.Size}


def test_attributes_that_a_file_gives_its_dicts_do_not_hide_what_is_in_them(tmp_path):
    state = with_weights(layers__11__bias=torch.tensor([float("nan")]))
    state["energy"] = WithItems(state["energy"])
    torch.save({"format": checkpoint.FORMAT} | state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not finite"):
        load_energy(tmp_path / "a.pt")


def test_torch_and_python_read_the_same_entries(tmp_path):
    """A zip file with a second directory, in which an entry is compressed: the last one counts, for both."""
    save(tmp_path / "a.pt", tiny())
    content = (tmp_path / "a.pt").read_bytes()
    bomb = rezipped(content, lambda name, data: (data, zipfile.ZIP_DEFLATED))
    (tmp_path / "b.pt").write_bytes(bomb + content)
    try:
        assert load(tmp_path / "b.pt")["step"] == 0
    except CheckpointError as error:
        assert "torn or not a checkpoint" in str(error)
    assert torch.load(io.BytesIO(checkpoint._stored(content)), weights_only=True)["step"] == 0


def test_tied_weights_are_in_the_file_once(tmp_path):
    weight = torch.ones(1000)
    save(tmp_path / "a.pt", tiny(more=[weight, weight, weight]))
    assert [x.sum() for x in load(tmp_path / "a.pt")["more"]] == [1000] * 3


def test_the_format_before_zip_files_is_the_tutorials_alone(tmp_path):
    torch.save({"format": checkpoint.FORMAT} | tiny(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format before 1\.6"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("reason", HOSTILE)
def test_refuses_with_the_reason(tmp_path, reason):
    torch.save({"format": checkpoint.FORMAT} | HOSTILE[reason](), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=reason):
        load_energy(tmp_path / "a.pt")


def test_an_energy_of_ones_own_is_taken_from_a_module_that_is_named_or_imported(tmp_path, monkeypatch):
    proof = tmp_path / "imported"
    source = f"import ebm.energies\nopen({str(proof)!r}, 'w')\nclass Mine(ebm.energies.MLPEnergy):\n    pass\n"
    (tmp_path / "my_own_energy.py").write_text(source)
    state = tiny()
    state["energy_config"] |= {"_target_": "my_own_energy.Mine"}
    save(tmp_path / "a.pt", state)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for modules in ((), ("my_own", "energy"), "my_own_energy_of_another"):
        with pytest.raises(CheckpointError, match=r"name it: modules=\[my_own_energy\]"):
            load_energy(tmp_path / "a.pt", modules=modules)
    assert not proof.exists()
    assert type(load_energy(tmp_path / "a.pt", modules=["my_own_energy"])).__name__ == "Mine"
    assert type(load_energy(tmp_path / "a.pt")).__name__ == "Mine"  # it has been imported now


def hostile_parts(proof):
    """Configurations of a part that would make the file `proof`, were they built."""
    write = {
        "_target_": "ebm.running.checkpoint.Path.write_text",
        "_args_": [{"_target_": "ebm.data.Path", "_args_": [proof]}, ""],
    }
    system = {"_target_": "os.system", "_args_": [f"touch {proof}"]}
    return [
        write,
        system,
        {"_target_": "ebm.data.torch.load", "f": proof, "weights_only": False},
        {"_target_": "ebm.data.image_folder", "root": write},
        {"_target_": "ebm.data.image_folder", "root": [system]},
        {"_target_": "ebm.data.image_folder", "root": ".", "_args_": [system]},
        {"_target_": "ebm.data.image_folder", "root": ".", "_partial_": True},
        {"_target_": "ebm.data.image_folder", "root": ".", "_convert_": "all"},
        {"_target_": "ebm.densities.dataset", "name": "rings", "nothing": 1},
        {"_target_": "ebm.sampling.sgld.SGLD", "steps": write},
        {"_target_": ["os.system"]},
        {"_target_": None, "root": "."},
    ]


@pytest.mark.parametrize("which", range(12))
@pytest.mark.parametrize("key", ["data", "sampler"])
def test_the_scripts_build_nothing_that_a_checkpoint_dreams_up(tmp_path, key, which):
    proof = tmp_path / "executed"
    state = conv() | {"config": {key: hostile_parts(str(proof))[which]}}
    save(tmp_path / "a.pt", state)
    common = (f"checkpoint={tmp_path / 'a.pt'}", "device=cpu", f"out={tmp_path / 'out'}")
    for script, *more in (("sample.py", "init=denoise", "num_samples=2"), ("evaluate.py", "evaluation=scores")):
        assert_one_line_error(run(script, *common, *more))
    assert not proof.exists() and names(tmp_path) == {"a.pt"}


def test_data_that_lay_elsewhere_are_not_downloaded_there(tmp_path):
    root = tmp_path / "elsewhere"
    data = {"_target_": "ebm.data.torchvision_dataset", "name": "MNIST", "root": str(root)}
    save(tmp_path / "a.pt", conv() | {"config": {"data": data}})
    result = run("sample.py", f"checkpoint={tmp_path / 'a.pt'}", "init=denoise", "device=cpu")
    assert_one_line_error(result, "elsewhere", "data.root")
    assert not root.exists()


@pytest.mark.parametrize(
    ("group", "value", "reason"),
    [
        ("data", {"_target_": "os.system"}, "neither ships"),
        ("data", {"_target_": "ebm.data.torch.load", "f": "x"}, "neither ships"),
        ("data", {"_target_": "ebm.data.image_folder", "root": {"_target_": "os.getpid"}}, "plain values"),
        ("loss", {"twins": {"_target_": "ebm.losses.Twins", "flip": {"_target_": "os.getpid"}}}, "plain"),
        ("loss", {"mine": {"_target_": "os.getpid"}}, "loss.mine._target_=os.getpid neither ships"),
        ("loss", "os.getpid", "terms by name"),
        ("loss", {"_target_": "os.getpid"}, "terms by name"),
        ("loss", {"_args_": {"_target_": "ebm.losses.Twins"}}, "terms by name"),
        ("optimizer", {"_target_": "ebm.optim.adam", "_args_": [1]}, "plain values"),
        ("guard", {"_target_": "ebm.running.guard.Guard", "_partial_": True}, "plain values"),
        ("sampler", {"_target_": "ebm.running.guard.Guard"}, "neither ships"),
        ("energy", {"_target_": "antigravity.fly"}, "neither ships"),
        ("scheduler", {"_target_": "train.launch"}, "neither ships"),
        ("scheduler", {"_target_": "my_own_parts.os"}, "is not defined in"),
        ("scheduler", {"_target_": "my_own_parts.Path"}, "is not defined in"),
        ("scheduler", {"_target_": "my_own_parts.Path.home"}, "cannot be imported"),
        ("wandb", {"notes": "${oc.env:HOME}"}, "plain values"),
        ("objective", "${oc.env:HOME}", "plain values"),
    ],
)
def test_a_runs_configuration_names_what_ships_or_lies_in_pythonpath(tmp_path, monkeypatch, group, value, reason):
    (tmp_path / "my_own_parts.py").write_text(
        "import os\nfrom pathlib import Path\ndef constant(): return lambda *_: 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.syspath_prepend(str(tmp_path))
    allowed.check_config({"seed": 0, "scheduler": {"_target_": "my_own_parts.constant"}})
    with pytest.raises(ValueError, match=reason):
        allowed.check_config({group: value})


def test_what_is_no_checkpoint_gets_no_advice_to_trust_it(tmp_path):
    torch.save(Payload(tmp_path / "executed"), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps([Payload(tmp_path / "executed")]))
    (tmp_path / "c.pt").write_text("not a checkpoint")
    torch.save(ConvEnergy(hidden=2), tmp_path / "d.pt")
    for name in "abcd":
        result = run("sample.py", f"checkpoint={tmp_path / name}.pt", "device=cpu")
        assert_one_line_error(result, f"{name}.pt is torn or not a checkpoint")
        assert "weights_only" not in result.stderr


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A file to write mutants to, the checkpoint's content without its checksum, and the whole energy's values."""
    file = tmp_path_factory.mktemp("fuzz") / "a.pt"
    contents = []  # no checksum: mutants get to the parsers behind it; and the format before zip files
    for zipped in (True, False):
        torch.save({"format": checkpoint.FORMAT} | tiny(), file, _use_new_zipfile_serialization=zipped)
        contents.append(file.read_bytes())
    x = torch.linspace(-1, 1, 8).view(4, 2)
    return file, contents, x


mutations = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, 2**20), st.integers(0, 0)),
        st.tuples(st.just("drop"), st.integers(0, 2**20), st.integers(1, 64)),
        st.tuples(st.just("zero"), st.integers(0, 2**20), st.integers(1, 64)),
        st.tuples(st.just("copy"), st.integers(0, 2**20), st.integers(1, 64)),
        st.tuples(st.just("directory"), st.integers(0, 2**20), st.integers(1, 255)),
        st.tuples(st.just("pickle"), st.integers(0, 2**20), st.integers(1, 255)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content, changes):
    data = bytearray(content)
    for kind, at, size in changes:
        at %= max(len(data), 1)
        if kind == "directory":  # the end: entries' sizes and offsets
            at = max(len(data) - 1 - at % 600, 0)
        if kind == "pickle":  # the opcodes, their checksum mended below
            start, stop = data.find(b"\x80\x02"), data.find(b"PK", data.find(b"\x80\x02"))
            at = start + at % max(stop - start, 1)
        if kind in ("flip", "directory", "pickle") and data:
            data[at] ^= size
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            del data[at : at + size]
        elif kind == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == "copy":
            data[at:at] = data[at : at + size]
    try:  # CRCs that fit, so that the mutants are not all refused for these
        if any(kind == "pickle" for kind, _, _ in changes):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                entries = archive.infolist()
            for entry in entries:
                start = entry.header_offset + 30 + struct.unpack("<H", content[entry.header_offset + 28 :][:2])[0]
                start += len(entry.filename)
                crc = struct.pack("<I", zlib.crc32(bytes(data[start : start + entry.file_size])))
                for old in (struct.pack("<I", entry.CRC),):
                    data = data.replace(old, crc)
    except (zipfile.BadZipFile, struct.error):
        pass
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 3), mutations)
def test_two_thousand_mutants(fuzzed, which, changes):
    """Each is refused with CheckpointError, or loads as a whole, finite energy."""
    file, contents, x = fuzzed
    file.write_bytes(mutated(contents[which == 0], changes))
    try:
        energy = build_energy(load(file), file)
    except CheckpointError as error:
        assert str(file) in str(error) and len(str(error)) < 1000
    else:
        assert energy(x).shape == (4,) and bool(
            torch.isfinite(torch.cat([p.flatten() for p in energy.parameters()])).all()
        )


def test_weights_that_ship_are_shadowed_by_a_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load("quick")["step"]
    for thing in (Path("quick"), Path("quick/other")):
        thing.mkdir()
        assert load("quick")["step"] == shipped
    with pytest.raises(CheckpointError, match="not a run"):
        load("./quick")
    assert output_folder(None, "quick", "sampling") == Path("sampling")
    save(Path("quick/checkpoints/last.pt"), load("quick") | {"step": 7})
    assert load("quick")["step"] == load("./quick")["step"] == 7 != shipped
    assert output_folder(None, "quick", "sampling") == Path("quick/sampling")
