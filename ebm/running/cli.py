"""What the three scripts share at the command line: errors and signals in one line, the device, folders and printed
commands.

torch is imported where it is needed: the scripts import this first, so that a signal finds a handler during the seconds
that torch takes."""

import os
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

# torch reads it when it is imported. Its threads otherwise spin for milliseconds where they have nothing to do, on the
# cores that the chains' threads need, or another process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Names that have changed: of keys, and of the options of groups.
RENAMED = {
    "start": "initial_weights",
    "loss.alpha": "loss.contrastive_divergence.alpha",
    "loss.noise_std": "train.data_noise_std",
    "loss.contrast": "loss.twins, with loss=[contrastive_divergence,twins]",
    "loss.classification_weight": "loss.classification.weight, with loss=[contrastive_divergence,classification]",
    "loss.kl_weight": "loss.kl.weight, with loss=[contrastive_divergence,kl]",
    "loss.kl_steps": "loss.kl.steps",
    "loss.entropy_weight": "loss.kl.entropy_weight",
    "loss.energy_clamp": "",
    "train.warmup_sgld_steps": "",
    "energy.attention": "",
    "samples.inception": "",
    "densities": "density",
    "evaluation=densities": "evaluation=density of points in the plane, evaluation=likelihood of images",
    "evaluation.parts=densities": "evaluation.parts=[density] of points in the plane, [likelihood] of images",
    "scheduler=linear": "scheduler=polynomial scheduler.power=1",
    "experiment=density": "experiment=plane",
    "experiment=joint_finish": "experiment=joint, whose last phase it is",
    "experiment=residual_finish": "experiment=residual, whose last phase it is",
    "experiment=residual_settle": "experiment=residual, whose last phase it is",
    "experiment=residual_twins": "experiment=residual, with loss.twins.mix",
    "experiment=residual_clothes": "experiment=clothes",
    "experiment=wide": "experiment=joint",
    "experiment=outliers": "experiment=joint",
    "checkpoint=mnist": "checkpoint=quick, or ./mnist for what is here",
    "checkpoint=mnist_joint": "checkpoint=joint",
    "checkpoint=mnist_joint_finish": "checkpoint=joint",
    "checkpoint=mnist_residual": "checkpoint=residual",
    "checkpoint=mnist_residual_finish": "checkpoint=residual",
    "checkpoint=mnist_outliers": "checkpoint=joint",
    "checkpoint=fashion_mnist": "checkpoint=clothes, or ./fashion_mnist for what is here",
    "checkpoint=fashion_mnist_residual": "checkpoint=clothes",
    **{
        f"data={name}": f"data=plane data.name={name}"
        for name in ("eight_gaussians", "two_moons", "rings", "checkerboard", "pinwheel")
    },
    **{
        f"experiment={name}": "experiment=plane with overrides: see conf/experiment/README.md"
        for name in ("nonconvergent", "hybrid", "convergent")
    },
}


def refuse_old_names(arguments: Iterable[str]) -> None:
    """ValueError for a key=value that has another name now, with the new one."""
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        given = {key, *(f"{key}={choice}" for choice in value.strip("[]").split(","))}  # of a sweep there are several
        for old, new in RENAMED.items():
            if old in given or key.startswith(f"{old}."):
                raise ValueError(f"{old} is now {new}" if new else f"{old} is no more: leave it out")


def end_at_once(number: int, frame: Any = None) -> None:
    """A handler of signals: one line in place of a traceback, exit code 130 for Ctrl-C and 143 for SIGTERM."""
    os.write(2, f"{signal.Signals(number).name}: stopped\n".encode())  # print might be what it interrupts
    os._exit(128 + number)


def unwind(number: int, frame: Any = None) -> None:
    """As `end_at_once`, but what is open is closed and taken away first; a second signal does not wait for that."""
    handle_signals(end_at_once)
    os.write(2, f"{signal.Signals(number).name}: stopped\n".encode())
    sys.exit(128 + number)


def handle_signals(handler: Any) -> None:
    """Give SIGINT and SIGTERM a handler. SIGUSR1, Slurm's, asks to save: until there is something, nothing happens."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def run_main(main: Callable[[], Any]) -> None:
    """Run the `main` of a script; a signal unwinds it, so that nothing is left half."""
    handle_signals(unwind)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of ASCII's has no σ
    try:
        with one_line_errors():
            refuse_old_names(sys.argv[1:])
        main()
    finally:
        handle_signals(end_at_once)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a user can mend become one line on stderr and exit code 2; a traceback with HYDRA_FULL_ERROR=1."""
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        no_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "allocate memory" in str(error)
        missing = type(error).__name__ == "MissingMandatoryValue"  # a key whose value is ??? in the config
        cause = cause_of(error)
        if cause is error and not (isinstance(error, (ValueError, OSError)) or missing or no_memory):
            raise
        line = "".join(c if c.isprintable() else "?" for c in " ".join(str(cause).split()))  # files' names are in it
        print(f"error: {line[:2000]} (HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        sys.exit(2)


def cause_of(error: BaseException) -> BaseException:
    """What a constructor raised lies under Hydra's own exception."""
    while type(error).__name__ == "InstantiationException":
        error = error.__cause__ or ValueError(str(error))
    return error


def pick_device(name: str) -> "torch.device":
    """The torch device for `device` in the config: auto (CUDA, MPS or CPU, whichever is there first) or a name."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise TypeError("no such device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, and be there; got {name!r}: {why}") from error
    torch.backends.cudnn.deterministic = True  # same seed, same bits
    return device


def writable(key: str, folder: str | Path) -> None:
    """Make the directory `folder` that `key` names. Raises ValueError where it cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key}={folder} must be a directory that can be written to: {error.strerror}") from error


def from_here(path: Path) -> Path:
    """As it is called from the working directory, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command(script: Path, **settings: Path) -> str:
    """`python SCRIPT key=PATH …` for a shell in the working directory, quoted for Hydra and for the shell."""
    words = ["python", str(from_here(script))]
    for key, path in settings.items():
        value = str(from_here(path))
        if not re.fullmatch(r"[a-zA-Z_./][\w./-]*", value, re.ASCII):
            value = '"' + value.replace('"', '\\"') + '"'
        words.append(f"{key}={value}")
    return shlex.join(words)


def output_folder(out: str | None, checkpoint: str, name: str) -> Path:
    """The directory `out`; by default `name` in the run directory `checkpoint`, or here."""
    if out is not None and not isinstance(out, str):
        raise ValueError(f"out must be a directory, got {out!r}")
    is_run = (Path(str(checkpoint)) / "checkpoints").is_dir()
    folder = Path(out) if out is not None else Path(str(checkpoint) if is_run else "") / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a directory, got the file {folder}")
    return folder


class Signals:
    """SIGTERM and SIGINT ask to stop, SIGUSR1 (Slurm's, before a job's time is up) to save; a second request to
    stop ends the process at once, but for torchrun's ranks. Where a launcher waits for SIGUSR2 to requeue the job, as
    submitit does, that one asks to stop, to be raised again afterwards, and SIGTERM, which the launcher ignores, to
    save.

    A context manager. `stop` is the signal's number, 0 for none; `save` is for the reader to reset.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self.before: dict[int, Any] = {}
        self.stops = {signal.SIGTERM, signal.SIGINT}

    def handle(self, number: int, frame: Any) -> None:
        if number not in self.stops:
            self.save = True
        elif not self.stop:
            self.stop = number
            os.write(2, f"\n{signal.Signals(number).name}: finishing and saving; once more ends at once\n".encode())
        elif "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun passes on to its ranks what they may have got already
            os._exit(128 + number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals are not for a sweep's worker thread
            if callable(signal.getsignal(signal.SIGUSR2)):
                self.stops = {signal.SIGINT, signal.SIGUSR2}
            numbers = self.stops | {signal.SIGTERM, signal.SIGUSR1}
            self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
