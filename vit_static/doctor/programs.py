"""Check of the compiled programs of two blocks: the properties that `program/verify.py` asserts."""

from __future__ import annotations

import paddle

from vit_static.config.schema import ParallelConfig
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.steps import expected_properties, main_program
from vit_static.doctor.subject import Subject
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, make_mesh
from vit_static.program.precision import choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.program.verify import violations

_NUM_SHOWN = 2  # violations in the message; all are in the figures


def check_program(subject: Subject) -> Result:
    """The programs of training, of its evaluation and of the verb `eval` have all properties of program/verify.py."""
    step = main_program(subject)
    evaluation = expected_properties(step.config, step.mesh, step.precision, is_training=False)
    problems = {
        "training": step.problems(),
        "evaluation": violations(step.compiled("eval"), evaluation),
        "eval": _problems_of_eval(subject),
    }
    num_problems, num_ops = sum(map(len, problems.values())), len(step.compiled("train").global_block().ops)
    if num_problems == 0:
        return ok(
            f"{num_ops} operators of a training step; nothing is wrong with it or with evaluation", operators=num_ops
        )
    shown = [f"{name}: {problem}" for name, of_program in problems.items() for problem in of_program][:_NUM_SHOWN]
    more = f"; {num_problems - _NUM_SHOWN} more in the file of --json" if num_problems > _NUM_SHOWN else ""
    return failed(f"{'; '.join(shown)}{more}", problems=problems)


def _problems_of_eval(subject: Subject) -> list[str]:
    """Return the violations in the program of the verb `eval`, in which every rank has the whole model."""
    config, mesh = subject.step_config, subject.mesh
    precision = choose_precision(config.amp, mesh.device, config.kernels)
    attention = choose_attention(config.model, precision, ParallelConfig(), config.kernels, mesh.device)
    try:
        data_parallel = make_mesh(mesh.rank, MeshShape(mesh.world_size, 1, 1), mesh.device, mesh.device_id)
        with paddle.static.scope_guard(paddle.static.Scope()):
            model = VisionTransformer(config.model, attention)
            program = Program.for_eval(config, model, data_parallel, precision, eval_batch_size=mesh.world_size)
            unsharded = config.model_copy(update={"parallel": ParallelConfig()})
            expected = expected_properties(unsharded, data_parallel, precision, is_training=False)
            return violations(program.compiled("eval"), expected)
    finally:  # Paddle's global mesh is again that of the run
        make_mesh(mesh.rank, mesh.shape, mesh.device, mesh.device_id)
