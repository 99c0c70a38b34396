"""Composed energies against exact products, given pixels, restorations and their baselines, and what is refused."""

import math

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, bytes_of, run, tiles
from PIL import Image
from scipy import ndimage
from scipy.stats import kstest, truncnorm
from skimage import filters, restoration
from torch import nn

from ebm.composition import Composed, InterpolationPath, Observed
from ebm.densities import GaussianMixture
from ebm.energies import ConvEnergy
from ebm.evaluation import metrics
from ebm.evaluation import restoration as ours
from ebm.running import checkpoint
from ebm.sampling.chains import chain_generators, trace_in_batches, uniform_noise
from ebm.sampling.sgld import SGLD


class Gaussian(nn.Module):
    """E(x) = ‖x − mean‖²/2·std² over (B, 2)."""

    def __init__(self, shape=(2,), std=1.0):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.zeros(*shape)), std

    def forward(self, x):
        return (x - self.mean).square().flatten(1).sum(dim=1) / (2 * self.std**2)


def gaussian(mean, std):
    energy = Gaussian(std=std)
    energy.mean.data = torch.tensor(mean)
    return energy


def langevin(step_size=1e-3):
    return SGLD(400, step_size, "langevin", grad_clamp=None, bounds=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_law(x, mean, std, step_size=1e-3):
    """`x` (N, 2) is N(mean, std² I), within five standard errors and the sampler's error of the order of its step."""
    n, bias = len(x), step_size / std**2
    assert (x.mean(dim=0) - torch.tensor(mean)).abs().max() < 5 * std / math.sqrt(n)
    assert (x.var(dim=0) / std**2 - 1).abs().max() < 5 * math.sqrt(2 / n) + bias
    for i in range(2):
        assert kstest(x[:, i].double().numpy(), "norm", (mean[i], std)).pvalue > 1e-4


# --- composition


@pytest.mark.parametrize("weights", [None, [1, 1], [2, 0.5], [1, -0.2]])
def test_and_is_the_exact_product_of_gaussians(weights):
    """Precisions add with their weights, a negative one is divided by: NOT."""
    means, stds = [[-0.3, 0.2], [0.5, 0.1]], [0.2, 0.3]
    precisions = [w / std**2 for w, std in zip(weights or [1, 1], stds, strict=True)]
    std = sum(precisions) ** -0.5
    mean = [sum(p * m[i] for p, m in zip(precisions, means, strict=True)) * std**2 for i in range(2)]
    energy = Composed([gaussian(*one) for one in zip(means, stds, strict=True)], weights=weights)
    x = langevin()(energy, torch.zeros(4000, 2), generator())
    assert_law(x, mean, std)


@pytest.mark.parametrize("temperatures", [(0.2, 3.0), (3.0, 0.2)])
def test_and_of_other_temperatures_is_the_exact_product_of_their_laws(temperatures):
    """E = ‖x − μ‖²/2σ² at T is the law N(μ, T·σ²): precisions add, and the sampler's steps are the first one's."""
    means, stds = [[-0.3, 0.2], [0.5, 0.1]], [0.2, 0.3]
    energies = [gaussian(*one) for one in zip(means, stds, strict=True)]
    for energy, temperature in zip(energies, temperatures, strict=True):
        energy.temperature = temperature
    precisions = [1 / (T * std**2) for T, std in zip(temperatures, stds, strict=True)]
    std = sum(precisions) ** -0.5
    mean = [sum(p * m[i] for p, m in zip(precisions, means, strict=True)) * std**2 for i in range(2)]
    energy = Composed(energies)
    assert energy.temperature == temperatures[0]
    step_size = 0.02 * std**2 / temperatures[0]  # of its variance, 2 %
    x = langevin(step_size)(energy, torch.zeros(4000, 2), generator())
    assert_law(x, mean, std, step_size * temperatures[0])


def test_or_of_other_temperatures_is_the_exact_mixture_of_their_laws():
    """log Σ w_i exp(−E_i/T_i), Z_i = 2π·T_i·σ²: shares w_i·Z_i of Gaussians of variance T_i·σ²."""
    means, std, weights, temperatures = torch.tensor([[-0.3, 0.0], [0.3, 0.0]]), 0.2, [0.25, 0.75], [0.5, 2.0]
    energies = [gaussian(mean.tolist(), std) for mean in means]
    for energy, temperature in zip(energies, temperatures, strict=True):
        energy.temperature = temperature
    composed, T = Composed(energies, "or", weights), torch.tensor(temperatures)
    z = torch.tensor(weights) * 2 * math.pi * T * std**2
    x = torch.rand(50, 2, generator=generator()) * 2 - 1
    mixture = GaussianMixture(means, std * T.sqrt(), z, log_z=math.log(z.sum()))
    torch.testing.assert_close(composed(x) / composed.temperature, mixture(x), atol=1e-4, rtol=1e-4)
    assert composed.temperature == 0.5


def test_or_is_the_exact_mixture():
    means, std, weights = torch.tensor([[-0.3, 0.0], [0.3, 0.0]]), 0.2, [0.25, 0.75]
    energy = Composed([gaussian(mean.tolist(), std) for mean in means], "or", weights)
    mixture = GaussianMixture(means, std, torch.tensor(weights))
    x = torch.rand(50, 2, generator=generator()) * 2 - 1
    constant = 2 * math.log(std) + math.log(2 * math.pi)
    torch.testing.assert_close(energy(x), -mixture.log_prob(x) - constant, atol=1e-4, rtol=1e-4)
    start = mixture.sample(4000, generator(1))
    got, want = langevin()(energy, start, generator(2)), mixture.sample(100_000, generator(3))
    assert kstest(got[:, 0].numpy(), want[:, 0].numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([Gaussian()], "xor"), "combine"),
        (([Gaussian()], "and", [1, 2]), "weights must be a number for each of the 1"),
        (([Gaussian()], "or", [-1]), "weights must be a number > 0"),
        (([Gaussian()], "and", ["a"]), "weights"),
        (([],), "weights"),
        (([ConvEnergy(), ConvEnergy((1, 14, 14))],), r"\(1, 14, 14\) and \(1, 28, 28\)"),
    ],
)
def test_compositions_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Composed(*arguments)


def test_path_of_images_under_springs_is_linear():
    """Without an energy a path of springs at rest is the linear blend of its ends."""
    ends = uniform_noise((3, 2, 1, 4, 4), generator())
    start = uniform_noise((3, 5, 1, 4, 4), generator(1))
    start[:, [0, -1]] = ends
    mask = torch.zeros(start.shape, dtype=torch.bool)
    mask[:, [0, -1]] = True
    nothing = InterpolationPath(Composed([Gaussian((1, 4, 4))], weights=[0]), spring=0.1)
    x = SGLD(400, step_size=4.0, noise_std=0.0, grad_clamp=None)(nothing, start, generator(), given=(mask, start))
    for i, t in enumerate((0, 0.25, 0.5, 0.75, 1)):
        torch.testing.assert_close(x[:, i], torch.lerp(ends[:, 0], ends[:, 1], t), atol=1e-5, rtol=0)
    assert torch.equal(x[:, [0, -1]], ends)
    energies = InterpolationPath(ConvEnergy(hidden=4), 0.5)(uniform_noise((2, 3, 1, 28, 28), generator()))
    assert energies.shape == (2,)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_observed_is_the_gaussian_posterior(temperature):
    """Prior N(0, T·s²) = N(0, 0.5²), seen with noise of variance T/fidelity = 1/12: precisions add."""
    prior = gaussian([0.0, 0.0], 0.5 / math.sqrt(temperature))
    prior.temperature = temperature
    energy = Observed(prior, lambda x: x, fidelity=12.0 * temperature)
    assert InterpolationPath(prior, 0.1).temperature == temperature
    seen = torch.tensor([0.4, -0.2]).expand(4000, 2)
    start = torch.stack([torch.zeros_like(seen), seen], dim=1)
    mask = torch.tensor([False, True])[None, :, None].expand_as(start)
    x = langevin(1e-3 / temperature)(energy, start, generator(), given=(mask, start))
    assert torch.equal(x[:, 1], seen)
    assert_law(x[:, 0], [0.3, -0.15], 0.25)


# --- given pixels


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_given_pixels_are_exact_and_the_rest_as_in_the_naive_loop(backend):
    energy = ConvEnergy(hidden=8).double()
    start = uniform_noise((20, 1, 28, 28), generator()).double()
    values, mask = torch.full_like(start, 0.1234567891), torch.rand(start.shape, generator=generator(1)) < 0.5
    kept = start.clone()
    got = SGLD(backend=backend, threads=2).trace(energy, start, generator(2), steps=12, every=5, given=(mask, values))
    assert len(got) == 4 and torch.equal(start, kept)
    assert all(torch.equal(x[mask], values[mask]) for x in got)
    x, g = start.where(~mask, values), generator(2)
    for _ in range(12):
        x = (x + 0.005 * torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(-1, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = (x - 10 * gradient.clamp(-0.03, 0.03)).clamp(-1, 1).detach().where(~mask, values)
    torch.testing.assert_close(got[-1], x, rtol=0, atol=1e-9)


def test_given_pixels_in_batches():
    energy, start = ConvEnergy(hidden=4), uniform_noise((37, 1, 28, 28), generator())
    values, mask = uniform_noise(start.shape, generator(1)), torch.rand(start.shape, generator=generator(2)) < 0.5
    traces = [
        trace_in_batches(SGLD().trace, energy, start, chain_generators(0, 37), size, 2, 4, given=(mask, values))
        for size in (16, 128)
    ]
    assert torch.equal(*traces) and torch.equal(traces[0][-1][mask], values[mask])
    with pytest.raises(ValueError, match="given must be"):
        SGLD(1)(energy, start, generator(), given=(mask[:1], values))


# --- degradations and baselines


def digits(count=3):
    x = torch.zeros(count, 1, 28, 28) - 1
    x[:, :, 6:22, 12:16] = 1
    return x + 0.1 * torch.arange(count).view(-1, 1, 1, 1) * (x < 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_that_of_scipy(channels):
    x = uniform_noise((2, channels, 20, 17), generator())
    want = ndimage.gaussian_filter(x.double().numpy(), (0, 0, 1.3, 1.3), mode="nearest")
    np.testing.assert_allclose(ours.blurred(x, 1.3).numpy(), want, atol=1e-5)


def test_denoising_filters_are_the_best_of_direct_calls():
    clean = digits()
    x = ours.noisy(clean, 0.3, generator())
    got = ours.denoised(x, clean)
    footprints = [np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]), np.ones((3, 3)), np.ones((5, 5))]
    medians = [
        torch.from_numpy(np.stack([ndimage.median_filter(image[0].numpy(), footprint=area) for image in x]))[:, None]
        for area in footprints
    ]
    assert any(torch.equal(got["median"], one) for one in medians)
    best = max(metrics.psnr(one, clean).mean() for one in medians)
    assert metrics.psnr(got["median"], clean).mean() == best
    for colour in (0.05, 0.1, 0.25, 0.5):
        direct = [restoration.denoise_bilateral((i[0].double().numpy() + 1) / 2, None, colour, 2) for i in x]
        one = torch.from_numpy(np.stack(direct)).float()[:, None] * 2 - 1
        assert metrics.psnr(got["bilateral"], clean).mean() >= metrics.psnr(one, clean).mean() - 1e-4


def test_sharpening_filters_are_the_best_of_direct_calls():
    clean = digits()
    x = ours.noisy(ours.blurred(clean, 1.0), 0.02, generator())
    got = {name: metrics.psnr(image, clean).mean() for name, image in ours.sharpened(x, clean, 1.0).items()}
    line = torch.exp(-0.5 * torch.arange(-4.0, 5) ** 2)
    kernel = (line[:, None] * line / line.sum() ** 2).double().numpy()
    for name, call in [
        ("unsharp mask", lambda image: filters.unsharp_mask(image, 1.0, 2)),
        ("Richardson–Lucy", lambda image: restoration.richardson_lucy(image, kernel, 30)),
    ]:
        direct = np.stack([call((image[0].double().numpy() + 1) / 2) for image in x])
        one = (torch.from_numpy(direct).float()[:, None] * 2 - 1).clamp(-1, 1)
        assert got[name] >= metrics.psnr(one, clean).mean() - 1e-3 and got[name] > metrics.psnr(x, clean).mean()


def test_inpainting_does_not_see_what_is_hidden():
    clean, hidden = digits(), ours.hidden_pixels("center", (1, 28, 28))
    (a,), (b,) = (ours.inpainted(clean.masked_fill(hidden, value), hidden).values() for value in (-1, 1))
    assert torch.equal(a, b) and torch.equal(a[:, ~hidden], clean[:, ~hidden])
    direct = restoration.inpaint_biharmonic((clean[1, 0].double().numpy() + 1) / 2, hidden[0].numpy()) * 2 - 1
    np.testing.assert_allclose(a[1, 0][hidden[0]].numpy(), direct[hidden[0].numpy()].clip(-1, 1), atol=1e-5)


def test_filters_take_colour():
    x = uniform_noise((2, 3, 12, 12), generator())
    for images in (
        ours.denoised(x, x),
        ours.sharpened(x, x, 0.5),
        ours.inpainted(x, ours.hidden_pixels("top", x[0].shape)),
    ):
        assert all(image.shape == x.shape and image.abs().max() <= 1 for image in images.values())


def test_masks(tmp_path):
    shape = (3, 5, 8)
    left, right, top, bottom, center = (ours.hidden_pixels(place, shape) for place in ours.PLACES)
    assert left.shape == shape and left[:, :, :4].all() and not left[:, :, 4:].any()
    assert torch.equal(right, left.flip(2)) and torch.equal(bottom, top.flip(1))
    assert top[:, :2].all() and not top[:, 2:].any() and center.sum() == 3 * 3 * 4
    np.save(tmp_path / "mask.npy", left[0].numpy())
    Image.fromarray(left[0].numpy().astype(np.uint8) * 255).save(tmp_path / "mask.png")
    for name in ("mask.npy", "mask.png"):
        assert torch.equal(ours.hidden_pixels(str(tmp_path / name), shape), left)


# --- the script


def trained_gaussian(path, mean, std, data="plane"):
    """A checkpoint of an exact energy."""
    checkpoint.save(
        path,
        {
            "energy": gaussian(mean, std).state_dict(),
            "energy_config": {"_target_": f"{__name__}.Gaussian", "shape": [2], "std": std},
            "config": {"data": {"_target_": "ebm.densities.dataset", "name": data}},
            "step": 0,
            "epoch": 0,
        },
    )
    return path


def test_compose_by_config(tmp_path):
    a = trained_gaussian(tmp_path / "a.pt", [-0.3, 0.2], 0.2)
    b = trained_gaussian(tmp_path / "b.pt", [0.5, 0.1], 0.2)
    c = trained_gaussian(tmp_path / "c.pt", [0.0, 0.0], 0.4, data="rings")  # data= says that it is one plane
    result = run(
        "sample.py",
        f"checkpoint={a}",
        f"compose=[{b},{c}]",
        "weights=[1,1,-0.5]",
        "data=plane",
        "steps=200",
        "sampler.step_size=1e-3",
        "sampler.noise_std=langevin",
        "sampler.grad_clamp=null",
        "sampler.bounds=null",
        "num_samples=2000",
        "batch_size=2000",
        f"out={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    precisions = [25, 25, -3.125]
    std = sum(precisions) ** -0.5
    x = torch.from_numpy(np.load(tmp_path / "out/samples.npz")["samples"])
    assert_law(x, [25 * 0.2 * std**2, 25 * 0.3 * std**2], std)


def sheet_rows(figure):
    """The label of each row of a contact sheet of eight images a row, or fewer, and its images."""
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    pixels = axes.images[0].get_array()
    found = tiles(Image.fromarray(pixels), (28, 28), columns=(pixels.shape[1] + 2) // 30)
    return dict(zip(labels, found.reshape(len(labels), -1, *found.shape[1:]), strict=True))


def test_inpaint_keeps_what_is_given_bit_for_bit(tmp_path, figures_saved):
    clean = uniform_noise((3, 1, 28, 28), generator())
    np.save(tmp_path / "images.npy", clean.numpy())
    hidden = np.zeros((28, 28), bool)
    hidden[3:9, 5:20] = True
    np.save(tmp_path / "hole.npy", hidden)
    result = run(
        "sample.py",
        "init=inpaint",
        f"mask={tmp_path / 'hole.npy'}",
        f"images={tmp_path / 'images.npy'}",
        "steps=7",
        f"out={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    x = np.load(tmp_path / "out/samples.npz")["samples"]
    assert np.array_equal(x[:, 0, ~hidden], clean.numpy()[:, 0, ~hidden])
    assert not np.isclose(x[:, 0, hidden], clean.numpy()[:, 0, hidden]).any(axis=1).all()
    assert "mask hole" in result.stdout
    rows = sheet_rows(figures_saved[-1])
    assert [label.split("\n")[0] for label in rows] == ["original", "mask hole", "biharmonic", "energy"]
    shown = list(rows.values())
    assert np.array_equal(shown[0], bytes_of(clean)) and np.array_equal(shown[-1], bytes_of(torch.from_numpy(x)))
    assert np.array_equal(shown[1][:, ~hidden], bytes_of(clean)[:, ~hidden])


def test_inpainting_starts_in_the_hole_as_the_sampler_starts(tmp_path):
    arguments = [
        "checkpoint=quick",
        "init=inpaint",
        "num_samples=64",
        "steps=1",
        "sampler.step_size=1e-9",
        "sampler.noise_std=0",
    ]
    result = run("sample.py", *arguments, "sampler.start=normal", "sampler.bounds=null", f"out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    hole = np.load(tmp_path / "out/samples.npz")["samples"][..., :14]
    inside = hole[np.abs(hole) < 1]  # files are clipped
    assert kstest(inside, truncnorm(-1, 1).cdf).pvalue > 1e-3 and abs(inside.size / hole.size - 0.683) < 0.02


def numbers(stdout, row):
    return [float(word) for word in next(line for line in stdout.splitlines() if line.startswith(row))[20:].split()]


@pytest.mark.parametrize("init, row", [("denoise", "σ 0.4"), ("sharpen", "blur 1, σ 0.05")])
def test_the_energy_restores_better_than_filters(init, row, tmp_path, figures_saved):
    levels = {"denoise": "[0.1,0.4]", "sharpen": "0.05"}[init]
    arguments = ["checkpoint=quick", f"init={init}", f"noise_std={levels}", "num_samples=16", "frames=2"]
    result = run("sample.py", *arguments, f"out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    degraded, *filtered, energy = numbers(result.stdout, row)
    assert len(filtered) == 2 and degraded < max(filtered) < energy - 1
    samples = np.load(tmp_path / "out/samples.npz")["samples"]
    assert samples.shape == ((32 if init == "denoise" else 16), 1, 28, 28)
    rows = sheet_rows(figures_saved[-1])
    (label,) = [label for label in list(rows)[-1:] if label.startswith("energy")]
    assert f"{energy:.2f} dB" in label
    assert np.array_equal(rows[label], bytes_of(torch.from_numpy(samples[-16:][:8])))


def test_interpolate_goes_around_the_barrier(tmp_path, figures_saved):
    arguments = ["checkpoint=quick", "init=interpolate", "num_samples=8", "path_images=6"]
    result = run("sample.py", *arguments, f"out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    x = torch.from_numpy(np.load(tmp_path / "out/samples.npz")["samples"]).view(4, 6, 1, 28, 28)
    t = torch.linspace(0, 1, 6).view(1, 6, 1, 1, 1)
    energy = checkpoint.load_energy("quick")
    blend = torch.lerp(x[:, :1], x[:, -1:], t)
    between, straight = (energy(path[:, 1:-1].flatten(0, 1)).mean() for path in (x, blend))
    assert between < straight - 0.05
    for i in range(4):
        left, right = figures_saved[-1].axes[2 * i : 2 * i + 2]
        shown = tiles(Image.fromarray(left.images[0].get_array()), (28, 28), columns=6)
        assert np.array_equal(shown, bytes_of(torch.cat([blend[i].clamp(-1, 1), x[i]])))
        for line, path in zip(right.lines, (blend, x), strict=True):
            assert line.get_ydata().tolist() == pytest.approx(energy(path[i]).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["init=inpaint", "images={tmp}/dark.npy", "mask={tmp}/mask.npy"], ["mask.npy", "(28, 28)", "(14, 14)"]),
        (["init=inpaint", "images={tmp}/dark.npy", "mask={tmp}/mask.png"], ["mask.png", "(28, 28)", "(14, 14)"]),
        (["init=inpaint", "images={tmp}/dark.npy", "mask={tmp}/bytes.npy"], ["bytes.npy", "bool", "uint8"]),
        (["init=inpaint", "images={tmp}/dark.npy", "mask={tmp}/nothing.npy"], ["nothing.npy", "hide some"]),
        (["init=inpaint", "images={tmp}/dark.npy", "mask={tmp}/outside.npy.txt"], ["outside.npy.txt", "mask"]),
        (["init=inpaint", "images={tmp}/dark.npy", "mask=middle"], ["mask", "center", "middle"]),
        (["init=denoise", "images={tmp}/outside.npy"], ["outside.npy", "[-1, 1]"]),
        (["init=sharpen", "images={tmp}/outside.npy"], ["outside.npy", "[-1, 1]"]),
        (["init=inpaint", "images={tmp}/outside.npy"], ["outside.npy", "[-1, 1]"]),
        (["init=interpolate", "images={tmp}/outside.npy"], ["outside.npy", "[-1, 1]"]),
        (["init=interpolate", "images={tmp}/dark.npy"], ["pairs", "3"]),
        (["init=interpolate", "path_images=2"], ["path_images", "2"]),
        (["init=denoise", "noise_std=[0.1,-1]"], ["noise_std", "-1"]),
        (["init=denoise", "num_samples=501"], ["num_samples", "500"]),
        (["init=sharpen", "images={tmp}/dark.npy", "blur=0"], ["blur", "0"]),
        (["init=sharpen", "images={tmp}/dark.npy", "fidelity=-1"], ["fidelity", "-1"]),
        (["images={tmp}/outside.npy"], ["init=noise"]),
        (["compose={tmp}/plane.pt"], ["images", "plane.pt", "(1, 28, 28)", "(2,)"]),
        (["checkpoint={tmp}/plane.pt", "compose={tmp}/other.pt"], ["data", "plane", "rings"]),
        (["compose=[quick,nowhere.pt]"], ["nowhere.pt", "does not exist"]),
        (["compose=quick", "weights=[1]"], ["weights", "2 energies"]),
        (["compose=quick", "combine=xor"], ["combine", "and, or", "xor"]),
        (["compose=quick", "combine=or", "weights=[1,-1]"], ["weights", "-1"]),
        (["checkpoint={tmp}/plane.pt", "init=inpaint"], ["init=inpaint", "(2,)"]),
    ],
)
def test_refused_in_one_line_with_nothing_written(overrides, words, tmp_path):
    np.save(tmp_path / "mask.npy", np.eye(14, dtype=bool))
    Image.new("L", (14, 14), 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "bytes.npy", np.eye(28, dtype=np.uint8))
    np.save(tmp_path / "nothing.npy", np.zeros((28, 28), bool))
    np.save(tmp_path / "outside.npy", np.full((2, 1, 28, 28), 1.5, np.float32))
    np.save(tmp_path / "dark.npy", np.full((3, 1, 28, 28), -1, np.float32))
    trained_gaussian(tmp_path / "plane.pt", [0.0, 0.0], 0.2)
    trained_gaussian(tmp_path / "other.pt", [0.0, 0.0], 0.2, data="rings")
    arguments = [argument.format(tmp=tmp_path) for argument in overrides]
    result = run("sample.py", "checkpoint=quick", "steps=1", f"out={tmp_path / 'out'}", *arguments)
    assert_one_line_error(result, *words)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
