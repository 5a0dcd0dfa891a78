"""The teacher of a training run: checks against the mesh and the data, and its line on the start screen."""

from __future__ import annotations

from vit_static.common.errors import ConfigError
from vit_static.common.text import flops_text
from vit_static.config.distill_schema import DistillConfig
from vit_static.model import flops
from vit_static.model.variants import model_name, num_parameters, shape_of
from vit_static.train.run_spec import RunSpec
from vit_static.weights.teacher import TeacherSource, require_mesh


def check_teacher(teacher: TeacherSource | None, spec: RunSpec) -> None:
    """Raise ConfigError if the teacher can't be split over the mesh, or its classes are in another order."""
    if teacher is None:
        return
    config = spec.config
    require_mesh(teacher, config.parallel, spec.mesh_shape, config.data.global_batch_size)
    names = None if teacher.weights is None else teacher.weights.class_names
    ours = spec.train_images.class_names
    if names is None or config.distill.kind == "features":
        return
    if names != ours and set(names) == set(ours):
        number = next(index for index, (one, other) in enumerate(zip(names, ours, strict=True)) if one != other)
        raise ConfigError(
            f"distill.teacher = {teacher.path}: has the classes in another order: class {number} is {names[number]!r} "
            f"there, and {ours[number]!r} in {config.data.root}; use a teacher that was trained on these classes"
        )


def describe_teacher(teacher: TeacherSource, distill: DistillConfig) -> str:
    """Return the start screen's line: the loss, the model, and what it costs."""
    kind = f"token, {distill.token_label} labels" if distill.kind == "token" else distill.kind
    kind += f" at temperature {distill.temperature:g}" if distill.has_soft_labels else ""
    height, width = teacher.model.image_size
    num_flops = 2 * flops.forward_macs(shape_of(teacher.model))
    return (
        f"{kind}, weight {distill.weight:g}; {model_name(teacher.model)} for images of {height}x{width}, "
        f"{num_parameters(teacher.model) / 1e6:.2f} M parameters, {flops_text(num_flops)} per image, "
        f"from {teacher.path}"
    )
