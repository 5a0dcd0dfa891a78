"""Starting point of a run: a checkpoint, else the weights of init.from, else fresh weights."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from vit_static.checkpoint.folder import CONFIG, open_shards
from vit_static.checkpoint.progress import KernelRecord, LoraBase, Progress, TeacherRecord
from vit_static.checkpoint.resume import (
    check_same_images,
    check_same_run,
    check_same_teacher,
    read_kernels,
    read_progress,
    read_teacher,
    resolve_resume,
    suggest_fallback,
    verify_files,
)
from vit_static.checkpoint.sharded_state import ShardedReader
from vit_static.common.errors import WeightsError
from vit_static.config.describe import changed_settings
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.class_balance import require_weight_files
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, choose_device
from vit_static.program.precision import choose_precision
from vit_static.train.run_dir import RunDir
from vit_static.train.run_spec import RunSpec
from vit_static.train.trackers import check_trackers
from vit_static.weights.infer import shape_of_config, with_shape
from vit_static.weights.load import LoadReport, init_from
from vit_static.weights.loaded import Weights
from vit_static.weights.lora import lora_base
from vit_static.weights.source import find_lora_base, load_lora_base, load_weights, require_weights, with_model_of_init


def check_settings(config: Config, resume: str) -> None:
    """Raise UserError for every mistake that can be found without the data set, before one is created.

    `resume` as in `StartPoint.find`. Called before the processes connect.
    """
    check_trackers(config)
    device = choose_device(config.device)
    choose_precision(config.amp, device, config.kernels, config.parallel)
    require_weight_files(config.loss)
    if resolve_resume(config.run_dir, resume) is None and config.init.from_ is not None:
        require_weights(Path(config.init.from_))


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that a run resumes from, if any, and how it treats older checkpoints in its folder."""

    checkpoint: Path | None
    is_own: bool  # the checkpoint is one of this run's
    archives: bool  # older checkpoints of the folder are moved away rather than continued

    @classmethod
    def find(cls, config: Config, run: RunDir, resume: str, teacher: TeacherRecord | None = None) -> StartPoint:
        """Find the checkpoint to resume from, before the processes connect. `resume`: auto, never, or a path.

        Raises WeightsError for a path without a checkpoint, ConfigError where the config or the teacher isn't that of
        the checkpoint.
        """
        checkpoint = resolve_resume(run.path, resume)
        if checkpoint is None:
            return cls(None, is_own=False, archives=resume != "auto")
        verify_checkpoint(checkpoint)
        check_same_teacher(checkpoint, read_teacher(checkpoint), teacher)
        check_same_run(checkpoint, config)
        if config.lora.rank > 0:
            find_lora_base(checkpoint, config.init.from_)
        return cls(checkpoint, run.contains(checkpoint), archives=resume != "auto")

    def load(self, spec: RunSpec, mesh: Mesh, model: VisionTransformer) -> Start:
        """Verify the checkpoint on all ranks and read its progress; without one, fill the model from init.from.

        With LoRA the model is filled in any case, because the checkpoint doesn't hold the frozen weights. Raises
        WeightsError, the same on all ranks, for a damaged checkpoint or other frozen weights, ConfigError for other
        training images.
        """
        run_id = mesh.first_non_none(secrets.token_hex(8))
        config = spec.config
        if self.checkpoint is not None:
            checkpoint_run_id = verify_checkpoint(self.checkpoint, mesh)
            progress, position = read_progress(self.checkpoint)
            check_same_images(self.checkpoint, position, spec.data_position(progress))
            run_id = checkpoint_run_id if self.is_own else run_id
            changes = changed_settings(load_config(self.checkpoint / CONFIG), config, ("name", "output_dir"))
            notes = () if changes is None else (f"settings that differ from those at the checkpoint: {changes}",)
            start = Start(progress, run_id, f"resumed from {self.checkpoint}", True, None, notes)
            start = replace(start, kernels=read_kernels(self.checkpoint))
            if config.lora.rank == 0:
                return start
            weights = load_lora_base(self.checkpoint, config.init.from_)
            new = tuple(_fill(model, weights, config).reinitialized)
            description = f"{start.description}, its frozen weights from {weights.source}"
            return replace(start, description=description, lora_base=lora_base(weights), new=new)
        if config.init.from_ is not None:
            weights = load_weights(Path(config.init.from_))
            report = _fill(model, weights, config)
            description = f"weights from {weights.source}, {report.format}: {report.describe()}"
            base = lora_base(weights) if config.lora.rank > 0 else None
            return Start(Progress(step=0), run_id, description, False, report, (), base, tuple(report.reinitialized))
        return Start(Progress(step=0), run_id, "fresh weights", False, None)

    def archive_after(self, progress: Progress) -> int | None:
        """Return the step whose later checkpoints are moved out of the way; -1 for all of them, None for none."""
        if not self.archives:
            return None
        return progress.step if self.is_own else -1

    def open(self) -> ShardedReader | None:
        """Open the checkpoint's tensors, if there is a checkpoint."""
        return None if self.checkpoint is None else open_shards(self.checkpoint)


def resolve_model(config: Config, resume: str) -> Config:
    """Return the config with the model's shape from its weights if it has ``model.from: init``.

    They are those of the checkpoint that the run resumes from, if there is one (`resume` as in `StartPoint.find`), else
    those of init.from. Raises ConfigError or WeightsError if they don't determine it.
    """
    if config.model.from_ == "config":
        return config
    checkpoint = resolve_resume(config.run_dir, resume)
    if checkpoint is None:
        return with_model_of_init(config)
    verify_checkpoint(checkpoint)
    return with_shape(config, shape_of_config(load_config(checkpoint / CONFIG)), str(checkpoint), with_head=True)


@dataclass(frozen=True)
class Start:
    """The progress and weights that a run starts with."""

    progress: Progress
    run_id: str  # shared by all checkpoints of a run
    description: str
    is_resumed: bool
    init_report: LoadReport | None  # how the arrays of init.from were used
    changed_settings: tuple[str, ...] = ()  # a line about what a resumed run does differently, if it does
    lora_base: LoraBase | None = None  # the frozen weights, with LoRA
    new: tuple[str, ...] = ()  # parameters that init.from doesn't have
    kernels: KernelRecord | None = None  # of the checkpoint


def _fill(model: VisionTransformer, weights: Weights, config: Config) -> LoadReport:
    return init_from(model, config.model, weights.external, str(weights.source), config.init, weights.grid)


def verify_checkpoint(path: Path, mesh: Mesh | None = None) -> str:
    """Verify a checkpoint, each rank a share of its files (without a mesh, the manifest alone); return its run's id.

    Raises WeightsError, the same on all ranks, which says what can be resumed instead.
    """
    share = slice(0) if mesh is None else slice(mesh.rank, None, mesh.world_size)
    problem, run_id = None, ""
    try:
        run_id = verify_files(path, share).run_id
    except WeightsError as error:
        problem = str(error)
    if mesh is not None:
        problem = mesh.first_non_none(problem)
    if problem is not None:
        raise WeightsError(f"{problem}; {suggest_fallback(path)}")
    return run_id
