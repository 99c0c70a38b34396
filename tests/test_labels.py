"""Energies with classes: E(x, y) = −f(x)[y], E(x) = −T·log Σ_y exp(f(x)[y]/T), from sampler to scripts."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, kstest
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from ebm.data import mnist5k, scaled
from ebm.energies import ConvEnergy, MLPEnergy, ResNetEnergy, labels_in_proportion
from ebm.evaluation import metrics
from ebm.losses import Classification, ContrastiveDivergence, Sum
from ebm.running import checkpoint
from ebm.sampling.buffer import ReplayBuffer
from ebm.sampling.chains import chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD

JOINT = [
    "energy.classes=10",
    "loss=[contrastive_divergence,classification]",
    "energy.temperature=0.1",
    "energy.hidden=4",
    "sampler.steps=2",
    "buffer.capacity=40",
    "train.batch_size=20",
    "train.max_steps=7",
    "train.sample_steps=4",
    "device=cpu",
    "wandb.mode=disabled",
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Gaussians(nn.Module):
    """E(x, y) = (x − y)²/2 for y in {0, 1, 2}: x | y ~ N(y, 1)."""

    classes = 3

    def forward(self, x, labels=None):
        every = (x - torch.arange(3.0)).square() / 2
        return -(-every).logsumexp(dim=1) if labels is None else every.gather(1, labels.view(len(x), -1)).squeeze(1)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8).filter(any), st.integers(1, 200))
def test_labels_are_as_often_as_in_the_data(counts, count):
    energy = Gaussians()
    energy.classes, energy.class_shares = len(counts), [n / sum(counts) for n in counts]
    labels = labels_in_proportion(energy, count)
    held = [0] * len(counts)
    for label in labels.tolist():  # each is one of those that are furthest behind their shares
        due = {y: Fraction(2 * have + 1, n) for y, (have, n) in enumerate(zip(held, counts, strict=True)) if n}
        assert due[label] == min(due.values())
        held[label] += 1
    assert torch.equal(labels, labels_in_proportion(energy, 200)[:count])
    energy.class_shares = [1 / len(counts)] * len(counts)
    in_turn = labels_in_proportion(energy, count)
    energy.class_shares = None
    assert torch.equal(in_turn, torch.arange(count) % len(counts))
    assert torch.equal(in_turn, labels_in_proportion(energy, count))


@pytest.mark.parametrize("kind", [ConvEnergy, ResNetEnergy, MLPEnergy])
@pytest.mark.parametrize("temperature", [1, 0.1])
def test_energies_by_hand(kind, temperature):
    torch.manual_seed(0)
    energy = kind((1, 8, 8), classes=4, temperature=temperature)
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    f, y = energy.outputs(x), torch.tensor([3, 0, 1, 2, 3])
    assert f.shape == (5, 4)
    torch.testing.assert_close(energy(x), -temperature * (f / temperature).exp().sum(dim=1).log())
    torch.testing.assert_close(energy(x, y), torch.stack([-f[i, y[i]] for i in range(5)]))
    torch.testing.assert_close(energy(x, torch.arange(4).expand(5, 4)), -f)
    # ∇E(x) is the mean of ∇E(x, y) over p(y | x) = softmax(f(x)/T)
    (marginal,) = torch.autograd.grad(energy(x).sum(), x)
    weighted = torch.zeros_like(x)
    for label in range(4):
        (gradient,) = torch.autograd.grad(energy(x, torch.full((5,), label)).sum(), x)
        weighted += (f / temperature).softmax(dim=1)[:, label].detach().view(5, 1, 1, 1) * gradient
    torch.testing.assert_close(marginal, weighted)
    with pytest.raises(ValueError, match=r"labels need an energy with classes \(energy\.classes\)"):
        kind((1, 8, 8))(x, y)
    with pytest.raises(ValueError, match=r"energy\.classes must be"):
        kind((1, 8, 8), classes=1)
    with pytest.raises(ValueError, match=r"energy\.temperature must be a number > 0, got 0"):
        kind((1, 8, 8), classes=4, temperature=0)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(2, 20),
    chains=st.integers(1, 40),
    labelled=st.booleans(),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
    kind=st.sampled_from([ConvEnergy, ResNetEnergy, MLPEnergy]),
    temperature=st.floats(0.01, 10),
)
def test_compiled_steps_are_those_of_autograd(classes, chains, labelled, seed, threads, kind, temperature):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = {"width": 8} if kind is ResNetEnergy else {"hidden": 8}
        energy = kind((1, 8, 8), classes=classes, temperature=temperature, **width).double()
    x = torch.rand(chains, 1, 8, 8, generator=generator(seed), dtype=torch.float64) * 2 - 1
    labels = torch.randint(classes, (chains,), generator=generator(seed)) if labelled else None
    ends = [
        SGLD(5, threads=threads, grad_clamp=clamp, backend=backend)(energy, x, generator(1), labels=labels)
        for clamp in (None, 0.03)
        for backend in ("compile", "eager")
    ]
    assert SGLD(backend="compile").run_as(energy, x)[0] == "compile"
    for compiled, eager in zip(ends[::2], ends[1::2], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-9)


def test_chains_of_a_label_follow_its_law():
    sampler = SGLD(400, step_size=0.05, noise_std="langevin", grad_clamp=None, bounds=None)
    labels = torch.arange(3000) % 3
    x = sampler(Gaussians(), torch.zeros(3000, 1), generator(), labels=labels).squeeze(1)
    for label in range(3):  # the step's own bias is 1 % of the variance
        assert kstest(x[labels == label].numpy(), "norm", (label, 1)).pvalue > 1e-3
    in_batches = [
        trace_in_batches(
            sampler.trace, Gaussians(), torch.zeros(50, 1), chain_generators(0, 50), size, 9, 9, labels[:50]
        )
        for size in (16, 64)
    ]
    assert torch.equal(*in_batches)


@pytest.mark.parametrize("policy", ["fifo", "in_place"])
def test_the_buffer_keeps_labels(policy):
    means = torch.arange(5.0).view(5, 1) / 5
    buffer = ReplayBuffer((1,), generator(), 100, 50, 0.2, policy, "class_means", 0.0, lambda: means, classes=5)
    g = generator(1)
    for _ in range(60):  # a chain of class y is y/5, fresh or stored
        chains, places, ages, labels = buffer.draw(20, g)
        assert torch.equal(chains, means[labels])
        buffer.put(chains, places, ages + 1, labels)
    assert torch.equal(buffer.chains[: buffer.size], means[buffer.labels[: buffer.size]])
    assert buffer.labels.bincount().min() > 0
    again = ReplayBuffer((1,), generator(), 100, 50, 0.2, policy, "class_means", 0.0, lambda: means, classes=5)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.labels[: again.size], buffer.labels[: buffer.size])
    for bad in (torch.full((buffer.size,), 5), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels"):
            again.load_state_dict(buffer.state_dict() | {"labels": bad})


def test_labels_of_fresh_chains():
    shares = [0.5, 0.3, 0.2]
    for expected, more in [([1 / 3] * 3, {}), (shares, {"fresh_labels": "data", "class_shares": shares})]:
        buffer = ReplayBuffer((1,), generator(), 5000, policy="in_place", classes=3, **more)
        _, _, _, labels = buffer.draw(5000, generator(1))
        for drawn in (buffer.labels, labels, buffer.fresh(5000, generator(2))[1]):
            assert chisquare(drawn.bincount(), 5000 * np.array(expected)).pvalue > 1e-3
    with pytest.raises(ValueError, match=r"buffer.fresh_labels=data needs an energy with classes"):
        ReplayBuffer((1,), generator(), fresh_labels="data")
    with pytest.raises(ValueError, match=r"buffer.fresh_labels must be one of alike, data"):
        ReplayBuffer((1,), generator(), classes=3, fresh_labels="some")


def test_the_loss_by_hand():
    torch.manual_seed(0)
    energy = MLPEnergy((2,), hidden=8, classes=3, temperature=0.2)
    x_data, x_model = torch.rand(4, 2), torch.rand(4, 2)
    y_data, y_model = torch.tensor([0, 2, 1, 1]), torch.tensor([1, 1, 0, 2])
    loss_function = Sum({"cd": ContrastiveDivergence(alpha=0.1), "classification": Classification(0.5)})
    loss, logs = loss_function(energy, x_data, x_model, generator(), y_data, y_model)
    e_data, e_model = energy(x_data, y_data), energy(x_model, y_model)
    cross_entropy = -(energy.outputs(x_data) / 0.2).softmax(dim=1)[range(4), y_data].log().mean()
    by_hand = e_data.mean() - e_model.mean() + 0.1 * (e_data**2 + e_model**2).mean() + 0.2 * 0.5 * cross_entropy
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(logs["classification"], 0.2 * 0.5 * cross_entropy.detach())
    torch.testing.assert_close(logs["e_model"], e_model.detach())


def test_classification_against_scikit_learn():
    logits = torch.randn(500, 4, generator=generator(), dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator()).squeeze(1)  # calibrated
    found = metrics.classification(logits, labels)
    p = logits.softmax(dim=1).numpy()
    assert found["accuracy"].mean() == accuracy_score(labels, p.argmax(axis=1))
    np.testing.assert_allclose(found["nll"].mean(), log_loss(labels, p))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (found["confidence"] > low) & (found["confidence"] <= low + 1 / 15)
        error += abs((found["accuracy"] - found["confidence"])[inside].sum()) / 500
    np.testing.assert_allclose(found["calibration_error"], error, atol=1e-6)
    with pytest.raises(ValueError, match="logits are not finite"):
        metrics.classification(logits * torch.nan, labels)


@pytest.mark.slow
def test_joint_training_keeps_labels_and_is_evaluated(tmp_path):
    folder = tmp_path / "run"
    settings_of_buffer = ["buffer.policy=fifo", "buffer.initial=30", "buffer.fresh_labels=data"]
    run("train.py", *JOINT, *settings_of_buffer, f"hydra.run.dir={folder}")
    buffer = checkpoint.load(folder)["buffer"]
    assert buffer["labels"].shape == (40,) and buffer["labels"].max() < 10
    names = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {"train/classification", "train/accuracy"} <= names
    energy = checkpoint.load_energy(folder)
    labels = labels_in_proportion(energy, 20)
    assert labels is not None and torch.equal(labels, torch.arange(20) % 10)
    done = run("evaluate.py", f"checkpoint={folder}", "evaluation=classification", "wandb.mode=disabled", "device=cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "evaluation/classification/metrics.json").read_text())
    digits = mnist5k()
    predicted = energy.outputs(scaled(digits.test)).argmax(dim=1)
    assert found["classification/accuracy"] == (predicted == digits.test_labels).double().mean()
    nll = log_loss(digits.test_labels, (energy.outputs(scaled(digits.test)).detach().double() / 0.1).softmax(dim=1))
    assert found["classification/nll"] == pytest.approx(nll, abs=1e-5)
    assert (folder / "evaluation/classification/reliability.png").is_file()

    # samples of one class are those of E(x, 7), and of all classes a row each
    samples = {}
    for label in ("7", "all", "any"):
        out = tmp_path / label
        done = run("sample.py", f"checkpoint={folder}", f"label={label}", "num_samples=32", "steps=3", f"out={out}")
        assert done.returncode == 0, done.stderr
        samples[label] = np.load(out / "samples.npz")
    sampler = SGLD(**{k: v for k, v in checkpoint.load(folder)["config"]["sampler"].items() if k != "_target_"})
    start, sevens = uniform_noise((32, 1, 28, 28), chain_generators(1, 32)), torch.full((32,), 7)
    x = trace_in_batches(sampler.trace, energy, start, chain_generators(0, 32), every=3, steps=3, labels=sevens)[-1]
    assert np.array_equal(samples["7"]["samples"], x.numpy()) and (samples["7"]["labels"] == 7).all()
    assert (samples["all"]["labels"] == np.arange(32) % 10).all() and "labels" not in samples["any"]
    with Image.open(tmp_path / "all/grid.png") as grid:  # 32 chains: three of each class
        assert grid.width / grid.height == pytest.approx(3 / 10, rel=0.05)
    state = checkpoint.load(folder)
    assert state["class_shares"] == [0.1] * 10
    state["class_shares"] = [0.55] + [0.05] * 9
    checkpoint.save(tmp_path / "uneven.pt", state)
    done = run("sample.py", f"checkpoint={tmp_path / 'uneven.pt'}", "num_samples=20", "steps=1", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert np.bincount(np.load(tmp_path / "samples.npz")["labels"]).tolist() == [11] + [1] * 9
    held, out = int(buffer["labels"][0]), tmp_path / "b"
    done = run("sample.py", f"checkpoint={folder}", f"label={held}", "init=buffer", "num_samples=1", f"out={out}")
    assert done.returncode == 0 and (np.load(out / "samples.npz")["labels"] == held).all(), done.stderr

    for overrides, words in [
        ([f"checkpoint={folder}", "label=10"], "label must be"),
        ([f"checkpoint={folder}", "label=-1"], "label must be"),
        ([f"checkpoint={folder}", "label=seven"], "label must be"),
        (["checkpoint=quick", "label=7"], "label=7 needs an energy with classes"),
        ([f"checkpoint={folder}", "label=7", "init=inpaint"], "label=7 is for init=noise, buffer or images"),
        ([f"checkpoint={folder}", "label=7", "init=buffer", "num_samples=41"], "num_samples must be at most"),
    ]:
        assert_one_line_error(run("sample.py", *overrides, f"out={tmp_path / 'never'}"), words)
        assert not (tmp_path / "never").exists()


def test_labels_out_of_range_leave_nothing(tmp_path):
    (tmp_path / "mine").touch()  # an empty folder would go with the run's
    for name, overrides, words in [
        ("few", ["energy.classes=5"], "energy.classes=5 needs data with labels below it; those of mnist5k: 0 to 9"),
        ("none", ["data=plane", "data.name=two_moons", "energy=mlp", "energy.classes=5"], "those of two_moons: none"),
    ]:
        assert_one_line_error(run("train.py", *overrides, f"hydra.run.dir={tmp_path / name}"), words)
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]
