"""Experiment trackers, each in a process of its own: `python -m vit_static.train.tracker_process NAME`.

The process reads JSON lines from standard input: first the run (`RunFacts`), then entries with `step`, `numbers` by
name, and `pictures` (PNG in base64) by name. At the end of the input it finishes. Keys and addresses of servers are
those of the packages' own environment variables.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROJECT = "vit_static"


@dataclass(frozen=True)
class RunFacts:
    """What a tracker knows about a run at its start."""

    name: str
    run_dir: str
    parameters: dict[str, Any]  # the config by dotted key


class Tracker(ABC):
    """An experiment tracker. Its methods may raise anything."""

    @abstractmethod
    def start(self, run: RunFacts, saved_id: str | None) -> str:
        """Start a run, or continue the one with `saved_id` if it still exists; return its id."""

    @abstractmethod
    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, bytes]) -> None:
        """Add numbers and PNG files by name."""

    @abstractmethod
    def finish(self) -> None:
        """Send what is left."""


class WandbTracker(Tracker):
    """Weights & Biases; WANDB_MODE=offline writes to the run's folder, for `wandb sync`."""

    def start(self, run: RunFacts, saved_id: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=saved_id,
            resume="allow",
            dir=run.run_dir,
            config=run.parameters,
            settings=wandb.Settings(console="off"),
        )
        # Not W&B's own step, which refuses to go back: after a rollback it does.
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, bytes]) -> None:
        import wandb

        images = {name: wandb.Image(_open_picture(png)) for name, png in pictures.items()}
        self._run.log({**numbers, **images, "step": step})

    def finish(self) -> None:
        self._run.finish()


class MlflowTracker(Tracker):
    """MLflow; without MLFLOW_TRACKING_URI in a database beside the run's folder."""

    def start(self, run: RunFacts, saved_id: str | None) -> str:
        import mlflow

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        if "MLFLOW_TRACKING_URI" not in os.environ:
            output_dir = Path(run.run_dir).resolve().parent
            mlflow.set_tracking_uri(f"sqlite:///{output_dir / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, (output_dir / "mlflow_artifacts").as_uri())
        mlflow.set_experiment(experiment)
        if saved_id is not None:
            try:
                return str(mlflow.start_run(run_id=saved_id).info.run_id)
            except mlflow.exceptions.MlflowException:  # deleted, or of another server
                traceback.print_exc()
        active = mlflow.start_run(run_name=run.name)
        mlflow.log_params(run.parameters)
        return str(active.info.run_id)

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, bytes]) -> None:
        import mlflow

        if numbers:
            mlflow.log_metrics(numbers, step=step)
        for name, png in pictures.items():
            mlflow.log_image(_open_picture(png), key=name.replace("/", "_"), step=step)

    def finish(self) -> None:
        import mlflow

        mlflow.end_run()


class SwanlabTracker(Tracker):
    """SwanLab; SWANLAB_MODE=local or offline writes to the run's folder."""

    def start(self, run: RunFacts, saved_id: str | None) -> str:
        import swanlab

        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", _PROJECT),
            name=run.name,
            id=saved_id,
            resume="allow" if saved_id else None,
            config=run.parameters,
            log_dir=str(Path(run.run_dir) / "swanlog"),
        )
        return str(self._run.id)

    def log(self, step: int, numbers: dict[str, float], pictures: dict[str, bytes]) -> None:
        import swanlab

        images = {name: swanlab.Image(_open_picture(png)) for name, png in pictures.items()}
        swanlab.log({**numbers, **images}, step=step)

    def finish(self) -> None:
        import swanlab

        swanlab.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "swanlab": SwanlabTracker}


def _open_picture(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def run_tracker(tracker: Tracker, lines: Iterator[bytes], id_file: Path) -> None:
    """Send the run and its entries to a tracker. An entry that fails is reported, and the next one is tried."""
    first = next(lines, None)
    if first is None:
        return
    saved_id = id_file.read_text().strip() if id_file.is_file() else None
    run_id = tracker.start(RunFacts(**json.loads(first)), saved_id or None)
    id_file.write_text(f"{run_id}\n")
    for line in lines:
        entry = json.loads(line)
        pictures = {name: base64.b64decode(text) for name, text in entry["pictures"].items()}
        try:
            tracker.log(entry["step"], entry["numbers"], pictures)
        except Exception:
            traceback.print_exc()
    tracker.finish()


def main() -> None:
    """Run the tracker that the command line names; its run's id is kept in the file that it names."""
    name, id_file = sys.argv[1:]
    run_tracker(TRACKERS[name](), iter(sys.stdin.buffer), Path(id_file))


if __name__ == "__main__":
    main()
