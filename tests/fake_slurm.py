"""A Slurm of one machine: sbatch, srun, sacct and scontrol as far as submitit uses them. Jobs are processes here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")

PROGRAM = f"""#!{sys.executable}
import os, re, subprocess, sys, time
from pathlib import Path

STATE = Path(__file__).parent / "state"
JOBS = STATE / "jobs"
name, words = Path(sys.argv[0]).name, sys.argv[1:]


def start(job, script, after=None):
    # In a session of its own, once the process it follows has ended.
    number, _, task = job.partition("_")
    env = {{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}}
    env |= dict(SLURM_JOB_ID=str(int(number) + int(task or 0)), SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1")
    env |= dict(SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0")
    if task:
        env |= dict(SLURM_ARRAY_JOB_ID=number, SLURM_ARRAY_TASK_ID=task)
    wait = f"while kill -0 {{after}} 2>/dev/null; do sleep 0.1; done; " if after else ""
    process = subprocess.Popen(
        ["bash", "-c", wait + "exec bash " + script], env=env, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    (JOBS / job).write_text(f"{{process.pid}} {{script}}")


def alive(pid):
    status = Path(f"/proc/{{pid}}/status")
    return status.exists() and "State:\\tZ" not in status.read_text()


def note(what):
    with (STATE / "log").open("a") as file:
        file.write(what + "\\n")


JOBS.mkdir(parents=True, exist_ok=True)
if name == "sbatch":
    text = Path(words[-1]).read_text()
    number = 100 * (1 + len(list(STATE.glob("*.sh"))))
    script = STATE / f"{{number}}.sh"
    script.write_text(text)
    array = re.search(r"--array=(\\d+)-(\\d+)", text)
    for task in range(int(array[1]), int(array[2]) + 1) if array else [None]:
        start(str(number) if task is None else f"{{number}}_{{task}}", str(script))
    print(f"Submitted batch job {{number}}")
elif name == "srun":
    options, files = {{"--output": 1, "--error": 2}}, {{}}
    while words[0].startswith("--"):
        word = words.pop(0)
        if word in options:
            path = words.pop(0).replace("%t", "0").replace("%j", os.environ["SLURM_JOB_ID"])
            path = path.replace("%A", os.environ.get("SLURM_ARRAY_JOB_ID", ""))
            path = path.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", ""))
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), options[word])
    os.execvp(words[0], words)
elif name == "sacct":
    print("JobID|State|NodeList")
    for job in JOBS.iterdir():
        print(f"{{job.name}}|{{'RUNNING' if alive(job.read_text().split()[0]) else 'COMPLETED'}}|here")
elif name == "scontrol":
    note(" ".join(words))
    pid, script = (JOBS / words[1]).read_text().split()
    start(words[1], script, after=pid)
"""


class FakeSlurm:
    """Install it into a folder, and put that in front of PATH."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        for name in COMMANDS:
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with these commands."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    @property
    def scripts(self) -> list[str]:
        """What was given to sbatch."""
        return [path.read_text() for path in sorted((self.folder / "state").glob("*.sh"))]

    @property
    def told(self) -> list[str]:
        """What scontrol was asked for."""
        log = self.folder / "state" / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def processes(self) -> list[int]:
        """Of the jobs, running or ended."""
        return [int(path.read_text().split()[0]) for path in sorted((self.folder / "state" / "jobs").iterdir())]
