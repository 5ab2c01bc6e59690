"""With what a study is carried out: an engine and its devices, as the options of the command say."""

from dataclasses import dataclass
from enum import StrEnum

from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.studies.loggers import check
from spectreg_lab.studies.worker import Engine
from spectreg_lab.training.devices import DeviceError, shape


class EngineName(StrEnum):
    """Who starts the processes of the runs."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Means:
    """What was asked for; None where nothing was."""

    engine: EngineName = EngineName.LOCAL
    address: str | None = None
    processes: int | None = None
    threads: int | None = None
    per_gpu: int | None = None
    cpus_per_run: int | None = None
    accelerator: str = "auto"
    devices: int | None = None
    nodes: int | None = None
    log: tuple[str, ...] = ()

    def shape(self) -> tuple[int, int]:
        """Devices of a machine and machines, of one run.

        Raises:
            DeviceError: options that have no effect beside others, or devices that cannot be had.
        """
        check(self.log)
        local, machines = shape(self.devices, self.nodes)
        side_by_side = ["engine", "processes", "threads", "per_gpu", "cpus_per_run", "address", "log"]
        if local * machines > 1:
            self._refuse(
                side_by_side,
                f"for runs side by side, but each run is to have {local * machines} devices, one run after the other",
            )
        if self.engine is EngineName.LOCAL:
            self._refuse(["address", "cpus_per_run"], "for --engine ray (here: --processes and --threads)")
        else:
            self._refuse(["processes", "threads"], "for --engine local (with Ray: --cpus-per-run and --per-gpu)")
        return local, machines

    def start(self) -> Engine:
        """The engine for runs of one device each.

        Raises:
            DeviceError: it cannot be had.
        """
        if self.engine is EngineName.LOCAL:
            return LocalEngine.for_machine(self.processes, self.threads, self.accelerator, self.per_gpu)
        from spectreg_lab.studies.ray_engine import RayEngine

        return RayEngine(self.address, self.cpus_per_run or 1, self.per_gpu, self.accelerator)

    def _refuse(self, options: list[str], why: str) -> None:
        given = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name) != getattr(Means, name)]
        if given:
            verb = "are" if len(given) > 1 else "is"
            raise DeviceError(f"{' and '.join(given)} {verb} {why}: leave {'them' if len(given) > 1 else 'it'} out")
