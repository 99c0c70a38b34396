import pytest
import torch
from torch import nn

from ebm.energies import ConvEnergy, MLPEnergy, ResNetEnergy
from ebm.running.checkpoint import load_energy


def test_cnn_has_the_published_shapes(published):
    theirs = torch.load(published, map_location="cpu", weights_only=True)["state_dict"]
    theirs = {name.replace("cnn.cnn_layers", "layers"): value.shape for name, value in theirs.items()}
    assert {name: value.shape for name, value in ConvEnergy().state_dict().items()} == theirs
    assert sum(p.numel() for p in ConvEnergy().parameters()) == 76_993


def test_cnn_layer_sizes():
    sizes, x = [], torch.zeros(1, 1, 28, 28)
    for layer in ConvEnergy().layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2)]


@pytest.mark.parametrize("kind", [ConvEnergy, ResNetEnergy, MLPEnergy])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 40), (1, 8, 8)])
@pytest.mark.parametrize("batch", [1, 5])
def test_any_image_gives_one_energy(kind, shape, batch):
    energy = kind(shape, **({} if kind is MLPEnergy else {"width": 4} if kind is ResNetEnergy else {"hidden": 4}))
    x = torch.rand(batch, *shape, requires_grad=True)
    e = energy(x)
    assert e.shape == (batch,)
    (gradient,) = torch.autograd.grad(e.sum(), x)
    assert bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
    others = torch.cat([x, torch.rand(3, *shape)])
    torch.testing.assert_close(energy(others)[:batch], e)  # no image sees its batch
    with pytest.raises(ValueError, match="takes a batch of"):
        energy(torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize(
    "build, key",
    [
        (lambda: ConvEnergy(hidden="wide"), "energy.hidden"),  # type: ignore[arg-type]
        (lambda: ConvEnergy(shape=(28, 28)), "energy.shape"),
        (lambda: ResNetEnergy(levels=9), "energy.levels"),
        (lambda: ResNetEnergy(width=0), "energy.width"),
        (lambda: ResNetEnergy(stem=-1), "energy.stem"),
        (lambda: MLPEnergy(depth=0), "energy.depth"),
    ],
)
def test_bad_settings_name_their_key(build, key):
    with pytest.raises(ValueError, match=f"{key} must be"):
        build()


@pytest.mark.parametrize("stem", [0, 4])
def test_a_stem_lets_the_residual_network_see_pixels_noise(stem):
    """A checkerboard of single pixels, away from the border, where zeros are what is around."""
    energy = ResNetEnergy(width=4, stem=stem)
    checkerboard = (-1.0) ** (torch.arange(28)[:, None] + torch.arange(28)).expand(1, 1, -1, -1)
    level = energy.networks[0][: 2 + 2 * bool(stem)]  # up to the first average
    with torch.no_grad():
        difference = (level(checkerboard) - level(torch.zeros_like(checkerboard)))[..., 1:-1, 1:-1]
    assert (difference.abs().max().item() > 1e-3) == bool(stem), difference.abs().max()


def test_published_scores(published, data_root):
    """The table of the tutorial: −E of test image 0, rotated and at half size; of noise; of training digits."""
    from ebm.data import scaled, torchvision_dataset

    energy, data = load_energy(published), torchvision_dataset("MNIST", str(data_root))
    x = scaled(data.test[:1])
    tiny = torch.full_like(x, -1)
    tiny[..., 14:, 14:] = x[..., ::2, ::2]
    noise = torch.empty(1024, 1, 28, 28).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert -energy(x).item() == pytest.approx(0.0304, abs=5e-4)
        assert -energy(x.rot90(2, (2, 3))).item() == pytest.approx(-0.0004, abs=5e-4)
        assert -energy(tiny).item() == pytest.approx(-0.0153, abs=5e-4)
        assert -energy(noise).mean().item() == pytest.approx(-17.88, abs=0.05)
        assert -0.01 < -energy(scaled(data.train[:2000])).mean().item() < 0.005
