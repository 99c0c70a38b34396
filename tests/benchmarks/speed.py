"""What sampling and a training step cost, ours beside the plain loop and, where they are installed, other libraries:

python tests/benchmarks/speed.py [--json FILE] [--peers PYTHON] [--rounds 15]

PYTHON is that of an environment with ebmkit and torchebm (ebmkit's import name is ours). Everything of a row runs turn
by turn in one process (the peers in theirs, beside the plain loop), and a ratio is one of medians.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn

STEPS = 20  # SGLD steps a measurement


def network(hidden=32, channels=1, flat=2):
    """The tutorial's, for those that do not have ours."""
    h, sizes = hidden, (channels, hidden // 2, hidden, 2 * hidden, 2 * hidden)
    layers = []
    for i in range(4):
        layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3 if i else 5, 2, 1 if i else 4), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * h * flat**2, 2 * h), nn.SiLU(), nn.Linear(2 * h, 1))


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x).squeeze(-1)


def plain_loop(energy, x, steps):
    """The tutorial's sampler, as its text describes it."""
    was_training = energy.training
    energy.eval()
    for parameter in energy.parameters():
        parameter.requires_grad = False
    x = x.detach().requires_grad_(True)
    noise = torch.randn_like(x)
    for _ in range(steps):
        noise.normal_(0, 0.005)
        x.data.add_(noise)
        x.data.clamp_(-1, 1)
        energy(x).sum().backward()
        x.grad.data.clamp_(-0.03, 0.03)
        x.data.add_(-10 * x.grad.data)
        x.grad.detach_()
        x.grad.zero_()
        x.data.clamp_(-1, 1)
    for parameter in energy.parameters():
        parameter.requires_grad = True
    energy.train(was_training)
    return x.detach()


def side_by_side(calls, rounds, clock=time.perf_counter):
    """{name: seconds of each round}; the calls take turns."""
    taken = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:  # the first warms up
                taken[name].append(clock() - start)
    return taken


def row(taken, ours, scale):
    """Medians in ms with quartiles, divided by `scale`, and their ratios to `ours`."""
    middle = {name: median(seconds) for name, seconds in taken.items()}
    return {
        name: {
            "ms": round(1e3 * middle[name] / scale, 3),
            "quartiles": [round(1e3 * q / scale, 3) for q in quantiles(seconds, n=4)[::2]],
            "ratio": round(middle[name] / middle[ours], 2),
        }
        for name, seconds in taken.items()
    }


def peers(batch, rounds):
    from ebm.samplers.langevin import LangevinDynamics as Ebmkit
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics as Torchebm

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x).squeeze(-1)

    energy, model = Energy().requires_grad_(False), Model().requires_grad_(False)
    x = torch.rand(batch, 1, 28, 28) * 2 - 1
    theirs = Ebmkit(step_size=10.0, steps=STEPS, noise_scale=0.005, grad_clip=0.03, clamp=(-1, 1))
    other = Torchebm(model, step_size=10.0, noise_scale=0.005, clamp=(-1, 1))
    calls = {
        "plain loop": lambda: plain_loop(energy, x, STEPS),
        "ebmkit": lambda: theirs.sample(energy, x),
        "torchebm": lambda: other.sample(x, n_steps=STEPS),
    }
    return row(side_by_side(calls, rounds), "plain loop", STEPS)


def sampling(batch, rounds):
    from ebm.energies import ConvEnergy
    from ebm.sampling.sgld import SGLD

    energy, plain = ConvEnergy().to(memory_format=torch.channels_last), Energy()
    x, g = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.Generator().manual_seed(0)
    ours, eager = SGLD(STEPS), SGLD(STEPS, backend="eager")
    calls = {
        "ours": lambda: ours(energy, x, g),
        "ours, eager": lambda: eager(energy, x, g),
        "plain loop": lambda: plain_loop(plain, x, STEPS),
    }
    return row(side_by_side(calls, rounds), "ours", STEPS)


def training_step(rounds, steps=60, batch=128):
    from ebm.batches import Batches
    from ebm.energies import ConvEnergy
    from ebm.losses import ContrastiveDivergence
    from ebm.optim import adam
    from ebm.sampling.buffer import ReplayBuffer
    from ebm.sampling.sgld import SGLD

    g = torch.Generator().manual_seed(0)
    data = torch.randint(256, (4096, 1, 28, 28), dtype=torch.uint8)
    energy, plain = ConvEnergy().to(memory_format=torch.channels_last), Energy()
    sampler, loss_of, batches = SGLD(steps), ContrastiveDivergence(), Batches(data, batch, g)
    buffer = ReplayBuffer((1, 28, 28), g, initial=8192)
    optimizer, theirs = adam(energy.parameters()), torch.optim.Adam(plain.parameters(), lr=1e-4, betas=(0.0, 0.999))
    examples = [torch.rand(1, 1, 28, 28) * 2 - 1 for _ in range(8192)]

    def ours():
        chains, places, ages, labels = buffer.draw(batch, g)
        x = sampler(energy, chains, g)
        buffer.put(x, places, ages + steps, labels)
        loss, _ = loss_of(energy, batches.next()[0], x, g)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(energy.parameters(), 0.1)
        optimizer.step()

    def tutorial():
        nonlocal examples
        fresh = sum(random.random() < 0.05 for _ in range(batch))
        chains = torch.cat([torch.rand(fresh, 1, 28, 28) * 2 - 1, *random.choices(examples, k=batch - fresh)])
        x = plain_loop(plain, chains, steps)
        examples = (list(x.chunk(batch)) + examples)[:8192]
        real = data[torch.randint(len(data), (batch,))].float() / 127.5 - 1
        real = (real + 0.005 * torch.randn_like(real)).clamp(-1, 1)
        e_real, e_fake = plain(torch.cat([real, x])).chunk(2)
        loss = e_real.mean() - e_fake.mean() + 0.1 * (e_real**2 + e_fake**2).mean()
        theirs.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        theirs.step()

    return row(side_by_side({"ours": ours, "plain loop": tutorial}, rounds), "ours", 1)


def outside_the_energy(batch, rounds):
    """Share of a step's processor time that is not the energy's forward and backward: the same steps of a network with
    next to none, which leaves noise, clamps, update and calls."""
    from ebm.energies import ConvEnergy
    from ebm.sampling.sgld import SGLD

    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))

        def chain(self):
            return self.layers

    energy, nothing, sampler = ConvEnergy(), Nothing(), SGLD(STEPS)
    x, g = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.Generator().manual_seed(0)
    calls = {"ours": lambda: sampler(energy, x, g), "no energy": lambda: sampler(nothing, x, g)}
    return row(side_by_side(calls, rounds, time.process_time), "ours", STEPS)


def memory(which, batch):
    """Peak memory in MiB that a chain run adds to a process that has torch, the network and the chains (Linux)."""
    from ebm.energies import ConvEnergy
    from ebm.sampling.sgld import SGLD

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    energy, x = (ConvEnergy() if which == "ours" else Energy()), torch.rand(batch, 1, 28, 28) * 2 - 1
    run = {
        "ours": lambda: SGLD(STEPS)(energy, x, torch.Generator().manual_seed(0)),
        "plain": lambda: plain_loop(energy, x, STEPS),
    }[which]
    x_all, x = x, x[:1]
    run()  # what is loaded at the first call
    x = x_all
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = resident("VmRSS")
    run()
    return round(resident("VmHWM") - start, 1)


def scaling(rounds):
    """Milliseconds a step and chain count: against K, batch, image side, width; one varies from (20, 128, 28, 32)."""
    from ebm.energies import ConvEnergy
    from ebm.sampling.sgld import SGLD

    g, table = torch.Generator().manual_seed(0), {}
    axes = {
        "steps": (5, 20, 80, 320),
        "batch": (1, 4, 16, 32, 64, 128, 256, 512, 1024),
        "side": (14, 28, 56, 112),
        "width": (8, 16, 32, 64, 128),
    }
    for axis, values in axes.items():
        for value in values:
            of = {"steps": STEPS, "batch": 128, "side": 28, "width": 32} | {axis: value}
            energy = ConvEnergy((1, of["side"], of["side"]), hidden=of["width"]).to(memory_format=torch.channels_last)
            x = torch.rand(of["batch"], 1, of["side"], of["side"]) * 2 - 1
            samplers = {"ours": SGLD(of["steps"]), "ours, eager": SGLD(of["steps"], backend="eager")}
            calls = {name: (lambda s=s, e=energy, x=x: s(e, x, g)) for name, s in samplers.items()}
            measured = row(side_by_side(calls, max(3, rounds // 3)), "ours", of["steps"])
            table[f"{axis}={value}"] = {name: cell["ms"] for name, cell in measured.items()}
    return table


def show(title, measured, unit):
    print(f"\n{title}")
    for name, cell in measured.items():
        low, high = cell["quartiles"]
        print(f"  {name:12} {cell['ms']:9.2f} {unit} [{low:.2f}, {high:.2f}]   {cell['ratio']:.2f}×")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("peers", "memory"), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--which", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=128, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.only:
        print(
            json.dumps(peers(given.batch, given.rounds) if given.only == "peers" else memory(given.which, given.batch))
        )
        return

    def apart(python, *arguments):
        command = [python, __file__, "--rounds", str(given.rounds), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    }
    print(result["machine"])
    for batch in (128, 512):
        result[f"sampling, batch {batch}"] = sampling(batch, given.rounds)
        show(f"an SGLD step, batch {batch}", result[f"sampling, batch {batch}"], "ms")
        if given.peers:
            result[f"peers, batch {batch}"] = apart(given.peers, "--only", "peers", "--batch", str(batch))
            show(f"other libraries, batch {batch}", result[f"peers, batch {batch}"], "ms")
        result[f"outside, batch {batch}"] = outside_the_energy(batch, given.rounds)
        show(f"outside the energy (processor time), batch {batch}", result[f"outside, batch {batch}"], "ms")
    result["training step"] = training_step(given.rounds)
    show("a training step, K = 60, batch 128", result["training step"], "ms")
    result["memory"] = {
        which: apart(sys.executable, "--only", "memory", "--which", which, "--batch", "512")
        for which in ("ours", "plain")
    }
    print("\npeak memory of a chain run, batch 512, MiB:", result["memory"])
    result["scaling"] = scaling(given.rounds)
    print("\nms a step, from K = 20, batch 128, 28×28, width 32")
    for name, cell in result["scaling"].items():
        print(f"  {name:12} " + "   ".join(f"{which} {ms:.2f}" for which, ms in cell.items()))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
