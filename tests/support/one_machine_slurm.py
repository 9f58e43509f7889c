"""A real Slurm of one node on the loopback interface, for as long as a test needs it."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=5  # also how long a requeued job waits, which is two minutes by default
KillWait=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={other_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why Slurm cannot be started here, or None."""
    programs = [name for name in ("sbatch", "slurmctld", "slurmd", "munged", "mungekey") if shutil.which(name) is None]
    if programs:
        return f"Slurm is not installed: {', '.join(programs)}"
    return None if os.geteuid() == 0 else "slurmd is started by root alone"


@contextmanager
def one_machine_slurm(folder: Path) -> Iterator[Path]:
    """Start munged, slurmctld and slurmd; gives the path of the configuration, for SLURM_CONF."""
    with _munge():
        for name in ("spool", "state"):
            (folder / name).mkdir(parents=True)
        path = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        port, other_port = _free_ports()
        path.write_text(
            CONFIGURATION.format(host=host, port=port, other_port=other_port, folder=folder, cores=len(os.sched_getaffinity(0)))
        )
        environment = os.environ | {"SLURM_CONF": str(path)}
        # In the foreground, so that they end with this process's `terminate`.
        daemons = [subprocess.Popen([name, "-D"], env=environment, stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
        try:
            _until(lambda: "idle" in _output(["sinfo", "-h", "-o", "%T"], environment), what=f"slurmd; see {folder}")
            yield path
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment, check=False)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


@contextmanager
def _munge() -> Iterator[None]:
    if not _output(["munge", "-n"]):
        if not Path("/etc/munge/munge.key").exists():
            subprocess.run(["mungekey", "-c"], check=True)
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True)
        daemon = subprocess.Popen([shutil.which("munged"), "--foreground"], user="munge", group="munge", stderr=subprocess.DEVNULL)
        try:
            _until(lambda: bool(_output(["munge", "-n"])), what="munged")
            yield
        finally:
            daemon.terminate()
            daemon.wait()
    else:
        yield


def _until(condition: Callable[[], bool], *, what: str) -> None:
    for _ in range(150):
        if condition():
            return
        time.sleep(0.2)
    raise RuntimeError(f"{what} did not start")


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
