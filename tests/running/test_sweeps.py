"""Sweeps of ten steps by every launcher and sweeper, read back from their summaries and from W&B."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from test_resume import SMALL, go, images  # noqa: F401

import train
from ebm.evaluation import features
from ebm.running import checkpoint, tracking
from ebm.running.state import check_settings

FEW = [
    o for o in SMALL if o.partition("=")[0] not in ("wandb.mode", "train.log_every", "sampler.steps", "optimizer.lr")
]
FEW += ["train.max_steps=10", "train.log_every=5"]


def sweep(folder: Path, *overrides: str) -> int:
    """`python train.py -m …` in this process; its exit code."""
    before = sys.argv
    sys.argv = [
        "train.py",
        "--config-path",
        str(ROOT / "conf"),
        "--multirun",
        f"hydra.sweep.dir={folder}",
        *FEW,
        *overrides,
    ]
    try:
        train.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return 0


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def wandb_records(run_dir: Path, kind: str) -> list[dict]:
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def assert_two_jobs(folder: Path) -> None:
    jobs = summary(folder)
    assert [job["job"] for job in jobs] == ["0", "1"] and [job["error"] for job in jobs] == ["", ""]
    assert [job["sampler.step_size"] for job in jobs] == ["1", "30"]
    for i, job in enumerate(jobs):
        assert checkpoint.load(folder / str(i))["config"]["sampler"]["step_size"] == float(job["sampler.step_size"])
        assert float(job["objective"]) == float(job["val/cd"]) == tracking.objective(folder / str(i), "val/cd")
    assert {file.suffix for file in folder.iterdir() if file.is_file()} >= {".csv", ".html", ".png"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, images) -> tuple[Path, int]:  # noqa: F811
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(
        folder,
        images,
        "optimizer.lr=1e-3,10,2e-3",
        "guard.warmup_steps=0",
        "guard.action=stop",
        "guard.patience=1",
        "wandb.checkpoint=true",
    )


def test_a_sweep_and_its_summary(swept):
    folder, code = swept
    jobs = summary(folder)
    assert code == 1 and [bool(job["error"]) for job in jobs] == [False, True, False]
    assert "diverged at step 5" in jobs[1]["error"] and jobs[1]["objective"] == ""
    assert jobs[2]["optimizer.lr"] == "0.002" and jobs[2]["data.image_size"] == "8"
    assert float(jobs[2]["objective"]) == tracking.objective(folder / "2", "val/cd")
    page = (folder / "summary.html").read_text()
    assert page.count("data:image/png;base64") == 2 and "diverged" in page and "3 jobs, 1 failed" in page
    assert "Traceback" in json.loads((folder / "1/job.json").read_text())["traceback"]


def test_each_job_is_a_run_of_its_own_in_wandb(swept):
    folder, _ = swept
    runs = [wandb_records(folder / job, "run")[0] for job in "02"]
    assert runs[0]["run_id"] != runs[1]["run_id"]
    assert {run["run_group"] for run in runs} == {"/".join(folder.parts[-2:])}
    for run, lr in zip(runs, (0.001, 0.002), strict=True):
        assert run["config"]["update"]["optimizer"]["lr"] == lr and run["job_type"] == "train"
        assert f"optimizer.lr={lr}" in run["display_name"] and run["project"] == "plain-ebm"
    metrics = {metric.get("name"): metric.get("summary") for metric in wandb_records(folder / "0", "metric")}
    assert metrics["val/cd"] == {"min": True, "last": True} and metrics["chain/ess"] == {"max": True, "last": True}
    numbers = {key: value for item in wandb_records(folder / "0", "summary") for key, value in item["update"].items()}
    assert numbers["objective"] == numbers["val/cd"]["last"] == tracking.objective(folder / "0", "val/cd")
    assert "energy/buffer.bins" in numbers or "energy/buffer._type" in numbers
    (artifact,) = wandb_records(folder / "0", "artifact")  # best.pt and last.pt are one file
    assert sorted(artifact["aliases"]) == ["best", "latest"]
    (entry,) = artifact["manifest"]["contents"]
    assert Path(entry["local_path"]).is_relative_to(folder / "0/checkpoints")  # no copy


def test_started_again_a_sweep_does_what_is_left(swept, tmp_path, images):  # noqa: F811
    """The complete job is left alone, the one that was cut off goes on, and another job is not written over."""
    overrides = [images, "wandb.mode=disabled", "seed=1,2"]
    assert sweep(tmp_path, *overrides, "train.save_every_steps=4") == 0
    job = json.loads((tmp_path / "1/job.json").read_text())
    (tmp_path / "1/job.json").write_text(json.dumps(job | {"objective": None, "error": "it was cut off"}))
    os.replace(tmp_path / "1/checkpoints/step_000004.pt", tmp_path / "1/checkpoints/last.pt")
    before = [(tmp_path / f"{i}/checkpoints/last.pt").stat().st_mtime_ns for i in range(2)]
    assert sweep(tmp_path, *overrides, "train.save_every_steps=4") == 0
    after = [(tmp_path / f"{i}/checkpoints/last.pt").stat().st_mtime_ns for i in range(2)]
    assert before[0] == after[0] and before[1] != after[1]
    assert json.loads((tmp_path / "1/job.json").read_text()) == job
    assert sweep(tmp_path, images, "wandb.mode=disabled", "seed=3,4") == 2
    assert [checkpoint.load(tmp_path / f"{i}")["config"]["seed"] for i in range(2)] == [1, 2]


def test_objectives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "own_classifier", lambda data, *_: features.Classifier(data.shape, 2).eval())
    for i in range(200):
        (tmp_path / f"classes/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 99).save(tmp_path / f"classes/{i % 2}/{i}.png")
    small = [*SMALL, f"data.root={tmp_path}/classes", "data.test_fraction=0.5", "train.max_steps=1"]
    for name in ("frechet", "val/frechet", "train/loss"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", [*small, f"objective={name}"])
        (tmp_path / name.replace("/", "_")).mkdir()
        value = train.launch(cfg, tmp_path / name.replace("/", "_"))
        logged = tracking.last_values(tmp_path / name.replace("/", "_"))
        assert value == logged["val/frechet" if name == "frechet" else name] > 0
    for name, message in (("cd", "must be frechet or"), ("val/c", "was never logged"), ("frechet", "labels")):
        with pytest.raises(SystemExit):
            folder = tmp_path / message.replace(" ", "_")
            go(folder, *SMALL, f"data.root={tmp_path}/classes/0", "train.max_steps=1", f"objective={name}")
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(tmp_path, images):  # noqa: F811
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sampler.step_size=1,30", "wandb.mode=disabled"]
    assert sweep(tmp_path, images, *overrides) == 0
    assert_two_jobs(tmp_path)
    again = joblib.Parallel(n_jobs=2, backend="loky", max_nbytes=None)  # the same workers: how many threads they have
    assert again(joblib.delayed(torch.get_num_threads)() for _ in range(2)) == [max(joblib.cpu_count() // 2, 1)] * 2


def test_optuna_tolerates_failures_and_goes_on_from_its_storage(tmp_path, images):  # noqa: F811
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    storage = f"sqlite:///{tmp_path}/study.db"
    overrides = ["hydra/sweeper=tpe", "hydra.sweeper.n_trials=2", f"hydra.sweeper.storage={storage}", "energy.hidden=2"]
    overrides += ["hydra.sweeper.study_name=s", "sampler.steps=choice(1,x)", "wandb.mode=disabled"]
    study = optuna.create_study(study_name="s", storage=storage)
    study.enqueue_trial({"sampler.steps": "x"})
    study.enqueue_trial({"sampler.steps": 1})
    for name in ("first", "second"):
        sweep(tmp_path / name, images, *overrides)
    trials = optuna.load_study("s", storage).trials
    states = [trial.state.name for trial in trials if "sampler.step_size" in trial.params]
    assert len(states) == 4 and states[:2] == ["FAIL", "COMPLETE"]
    for folder, part in ((tmp_path / "first", trials[:2]), (tmp_path / "second", trials[2:])):
        for job, trial in zip(summary(folder), part, strict=True):
            assert float(job["sampler.step_size"]) == trial.params["sampler.step_size"]
            assert (float(job["objective"]) if job["objective"] else None) == trial.value


@pytest.mark.slow
def test_submitit_preempted_it_goes_on_by_itself(tmp_path, images):  # noqa: F811
    """SIGUSR2, as Slurm sends it before a job's time is up, in mid-training: saved, requeued, resumed, complete."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = [*FEW, images, "hydra/launcher=submitit_local", "train.max_steps=200", "train.save_every_steps=null"]
    overrides += ["sampler.steps=1", "train.validate_every_epochs=100000", "train.log_every=1"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", f"hydra.sweep.dir={tmp_path}/sweep", *overrides]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "sweep/0/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    (task,) = [
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if f"submitit.core._submit\0{tmp_path}" in entry.read_text()
    ]
    os.kill(task, signal.SIGUSR2)
    assert process.wait() == 0
    (job,) = summary(tmp_path / "sweep")
    assert float(job["objective"]) == tracking.objective(metrics.parent, "val/cd")
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in line]
    assert steps == list(range(1, 201))
    names = [run.name for run in (tmp_path / "sweep/0/wandb").glob("offline-run-*")]
    assert len(names) == 2 and len({name.rpartition("-")[2] for name in names}) == 1  # one run, in two parts


# The tasks run the copy: submitit moves its file as soon as sbatch returns.
SBATCH = """#!/bin/sh
cat "$1" > {folder}/script
echo "Submitted batch job 7"
for task in 0 1; do
    SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task sh {folder}/script > /dev/null 2>&1 &
done
"""
SRUN = """#!/bin/sh
while [ "$1" != "-u" ]; do python="$1"; shift; done
exec "$python" "$@"
"""


@pytest.mark.slow
def test_the_script_that_slurm_gets(tmp_path, images, monkeypatch):  # noqa: F811
    """A stand-in for sbatch keeps the script and runs it as a cluster would, in an array of two tasks."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (tmp_path / name).write_text(text.format(folder=tmp_path) if name == "sbatch" else text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    overrides = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "sampler.step_size=1,30",
        "wandb.mode=disabled",
    ]
    assert sweep(tmp_path / "sweep", images, *overrides) == 0
    assert_two_jobs(tmp_path / "sweep")
    lines = (tmp_path / "script").read_text().splitlines()
    for option in (
        "partition=gpu",
        "gpus-per-node=1",
        "array=0-1%2",
        "time=240",
        "signal=USR2@120",
        "requeue",
        "open-mode=append",
        "cpus-per-task=8",
        "mem=32GB",
    ):
        assert f"#SBATCH --{option}" in lines, lines


@pytest.mark.parametrize(
    ("code", "restarts", "shown", "queued", "over"),
    [
        (140, 0, 0, True, False),  # its warning came while it imported
        (140, 20, 20, False, True),  # once more
        (139, 0, 0, False, True),
        (143, 1, 2, False, False),  # submitit has put it back
    ],
)
def test_what_becomes_of_a_job_that_ended_badly(tmp_path, monkeypatch, code, restarts, shown, queued, over):
    pytest.importorskip("submitit")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho " Restarts={shown} "\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SUBMITIT_EXECUTOR": "slurm"}
    for key, value in (job | {"SLURM_RESTART_COUNT": str(restarts)}).items():
        monkeypatch.setenv(key, value)
    (tmp_path / "7_1").mkdir()
    command = [sys.executable, "-m", "ebm.running.slurm", str(code), "20", f"{tmp_path}/%j"]
    assert subprocess.run(command, cwd=ROOT).returncode == code
    assert ("requeue 7_1" in (tmp_path / "calls").read_text()) == queued
    assert (tmp_path / "7_1/7_1_0_result.pkl").exists() == over


def test_a_warning_before_the_start_is_refused(tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert sweep(tmp_path, "hydra/launcher=slurm", "hydra.launcher.timeout_min=2", "seed=0,1") == 2
    assert "hydra.launcher.timeout_min=2 must be more than" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_slurm(tmp_path, images):  # noqa: F811
    """One job is warned and one dies while they import: the first goes back into the queue (Slurm lets it wait there
    for two minutes) and is complete, the other is named, and the command ends."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm answers here")
    overrides = [*FEW, images, "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=2"]
    overrides += ["hydra.launcher.cpus_per_task=1", f"hydra.launcher.name={tmp_path.name}", "wandb.mode=disabled"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", f"hydra.sweep.dir={tmp_path}", *overrides, "seed=0,1"]
    process = subprocess.Popen([*command, "device=cpu"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    signals = {0: "USR2", 1: "11"}  # SIGSEGV
    while signals and process.poll() is None:
        squeue = subprocess.run(["squeue", "--steps", "--noheader", "--format=%i"], capture_output=True, text=True)
        for file in tmp_path.glob(".submitit/*/*_submission.sh"):
            for number, name in list(signals.items()):
                job = f"{file.name.partition('_')[0]}_{number}"
                if f"{job}.0" in squeue.stdout.split():  # its Python has just started
                    subprocess.run(["scancel", f"--signal={name}", job], check=True)
                    del signals[number]
        time.sleep(0.1)
    assert process.communicate()[0] and process.returncode == 1
    jobs = summary(tmp_path)
    assert [job["seed"] for job in jobs] == ["0", "1"]
    assert [job["error"] for job in jobs] == ["", "it ended before it began"]
    assert float(jobs[0]["objective"]) == tracking.objective(tmp_path / "0", "val/cd")


def test_ray_runs_a_sweep(tmp_path, images):  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="the extra [ray] is not installed")
    overrides = ["hydra/launcher=ray", "sampler.step_size=1,30", "wandb.mode=disabled"]
    assert sweep(tmp_path, images, *overrides) == 0
    assert_two_jobs(tmp_path)


def test_the_command_line_of_a_wandb_sweep():
    """What W&B's agent would run composes, and is one of its own settings' runs."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    file = yaml.safe_load((ROOT / "conf/wandb_sweep.yaml").read_text())
    values = {
        key: {"value": range_["values"][0] if "values" in range_ else range_["min"]}
        for key, range_ in file["parameters"].items()
    }
    arguments = create_sweep_command_args({"args": values})["args_no_hyphens"]
    command = create_sweep_command(list(file["command"]))
    assert command[:3] == ["${env}", "${interpreter}", "${program}"] and command[-1] == "${args_no_hyphens}"
    assert (ROOT / file["program"]).is_file()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*command[3:-1], *arguments])
    assert cfg.sampler.steps == 8 and cfg.energy.hidden == 16 and cfg.wandb.mode == "online"
    assert file["metric"]["name"] == "objective"
    check_settings(OmegaConf.to_container(cfg, resolve=True))
    train.instantiate(cfg.sampler, _convert_="all")
