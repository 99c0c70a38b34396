"""The house as it is meant to be: its size, which way the arrows run, one home for what is said twice."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import get_object

import ebm
import train

SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "sample", "evaluate")]
MODULES = sorted((ROOT / "ebm").rglob("*.py"))
WINGS = ["", "sampling", "evaluation", "running"]  # each may import from those before it: the method is the first
FACE = ["load_energy", "SGLD", "ReplayBuffer", "ContrastiveDivergence", "ConvEnergy", "ResNetEnergy", "MLPEnergy"]
FACE += ["Composed", "uniform_noise"]


def wing_of(file: Path) -> str:
    inside = file.relative_to(ROOT / "ebm").parts
    return inside[0] if len(inside) > 1 else ""


def imported(file: Path) -> set[Path]:
    """The files of ebm that `file` imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "ebm":
            for alias in node.names:
                path = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                found |= {path.with_suffix(".py"), path.parent.with_suffix(".py")}
    return found & set(MODULES)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_run_down_and_in_no_circle(file):
    if file.name == "__init__.py":
        return  # the public face looks its names up when they are used
    assert all(WINGS.index(wing_of(other)) <= WINGS.index(wing_of(file)) for other in imported(file))
    reached, waiting = set(), [file]
    while waiting:
        new = imported(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert file not in reached


def test_hydra_and_wandb_are_known_where_they_belong():
    for file in MODULES:
        names = {
            str(name).partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else getattr(node, "names", []))
        }
        names |= {
            alias.name.partition(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not names & {"hydra", "omegaconf"} or file.name == "sweep.py"
        assert "wandb" not in names or file.name == "tracking.py"


def test_one_reads_it_in_an_evening():
    for script, most in zip(SCRIPTS, (300, 200, 150), strict=True):
        assert len(script.read_text().splitlines()) <= most
    for file in [*SCRIPTS, *MODULES, *(ROOT / "tests").rglob("*.py")]:
        assert "fmt: " + "skip" not in file.read_text()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert int(node.end_lineno or 0) - node.lineno < 60, (file.name, node.name)
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_the_readme_shows_the_training_step():
    source = inspect.getsource(train.training_step)
    body = textwrap.dedent(source.split('"""')[2]).strip()
    shown = body[: body.index("run.optimizer.step()\n") + len("run.optimizer.step()\n")]
    assert f"```python\n{shown}```" in (ROOT / "README.md").read_text()


def test_no_link_of_a_page_leads_nowhere():
    pages = [ROOT / "README.md", *(page for part in ("conf", "ebm", "tests") for page in (ROOT / part).rglob("*.md"))]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def loaded_by(statement: str) -> set[str]:
    """What is imported with it that takes long."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = "torchvision matplotlib scipy sklearn skimage torchmetrics arviz_stats wandb hydra"
    return set(heavy.split()) & set(done.stdout.split())


def test_the_scripts_start_with_little_more_than_torch():
    assert loaded_by("import train, sample") == {"hydra", "skimage"}  # which loads its parts when they are used


def test_the_public_face():
    """It is there, and takes little more than torch: nothing that draws, ranks, logs or configures is imported."""
    assert loaded_by(f"from ebm import {', '.join(FACE)}") == set()
    assert set(FACE) == set(ebm.HOMES)
    with pytest.raises(AttributeError, match="no attribute 'Sampler'"):
        ebm.Sampler  # noqa: B018


WITH_DEFAULTS = ("data", "energy", "sampler", "buffer", "loss", "optimizer", "scheduler", "guard")
GROUPS = [(group, path.stem) for group in WITH_DEFAULTS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_a_default_is_the_same_from_the_command_line_and_from_python(group, option):
    if option == "trained":
        return  # the checkpoint's values
    choice = f"{group}=[{option}]" if group == "loss" else f"{group}={option}"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["~experiment", choice])[group]
    cfg = cfg[option] if group == "loss" else cfg
    parameters = inspect.signature(get_object(cfg._target_)).parameters
    settings = {key: cfg[key] for key in cfg if key not in ("_target_", "augment", "name", "root", "file")}
    given = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    left_out = {"shape", "images", "class_means", "class_shares", "classes", "augment"}
    left_out |= {"image_size", "split"} if option in ("mnist", "fashion_mnist", "cifar10") else set()
    assert given - set(settings) <= left_out
    for key, value in settings.items():
        default = parameters[key].default
        assert (list(value) if key == "bounds" else value) == (list(default) if key == "bounds" else default), key


@pytest.mark.parametrize("script", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(script):
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module and node.module.partition(".")[0] == "ebm"]
    for node in ours:
        if node.module == "ebm.samplers.langevin":  # ebmkit's, whose import name is ebm, too
            continue
        module = importlib.import_module(node.module)
        for name in node.names:
            assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
