"""The interpreter itself: rounding, memory, programs that it rejects, collectives between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import paddle
import pytest

from gpu_program.interpreter import Collectives, Rank, Request, decode, run_in_lock_step

BOTH, SUM, AVERAGE = {7: (0, 1)}, int(paddle.distributed.ReduceOp.SUM), int(paddle.distributed.ReduceOp.AVG)


@pytest.fixture(autouse=True)
def static_mode():
    paddle.enable_static()
    yield
    paddle.disable_static()


def build(function: Callable[..., Any], **inputs: tuple[list[int], str]) -> Any:
    """Return a program that computes function(*inputs); its variables are persistable."""
    program = paddle.static.Program()
    with paddle.static.program_guard(program):
        values = [
            paddle._C_ops.data(name, shape, dtype, paddle.base.core.Place()) for name, (shape, dtype) in inputs.items()
        ]
        for value in values:
            value.persistable = True
        function(*values)
    return program


def run(program: Any, **variables: np.ndarray) -> dict[str, np.ndarray]:
    """Run a program on one rank and return its variables."""
    rank = Rank(dict(variables))
    run_in_lock_step([rank.run([(decode(program), 0)], [{}])], [{}])
    return dict(rank.variables)


@pytest.mark.parametrize(("dtype", "tie"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_results_are_rounded_to_nearest_and_ties_to_even(dtype, tie):
    program = build(
        lambda x, out: paddle.assign(x.astype(dtype).astype("float32"), out),
        x=([4], "float32"),
        out=([4], "float32"),
    )
    values = np.float32([1 + tie, 1 + 3 * tie, 1 + 1.01 * tie, 1 - tie / 2])
    out = run(program, x=values, out=np.zeros(4, np.float32))["out"]
    np.testing.assert_array_equal(out, [1, 1 + 4 * tie, 1 + 2 * tie, 1])


def test_an_overflow_in_half_precision_is_infinite():
    program = build(
        lambda x, out: paddle.assign((x.astype("float16") * 2.0).astype("float32"), out),
        x=([1], "float32"),
        out=([1], "float32"),
    )
    assert run(program, x=np.float32([40000]), out=np.zeros(1, np.float32))["out"] == np.inf


def test_an_operator_in_place_changes_what_later_readers_of_its_input_see():
    def add_before_and_after(x, out):
        copy = paddle.assign(x)
        paddle._C_ops.add_(x, x)
        paddle.assign(copy + x, out)

    variables = run(
        build(add_before_and_after, x=([1], "float32"), out=([1], "float32")), x=np.float32([3]), out=np.float32([0])
    )
    assert (variables["x"], variables["out"]) == (6, 3 + 6)


def test_an_unknown_operator_is_rejected():
    with pytest.raises(NotImplementedError, match=r"pd_op\.sin isn't in the table"):
        decode(build(lambda x: paddle.sin(x), x=([1], "float32")))


def test_an_unknown_attribute_is_rejected():
    program = build(lambda x: paddle.tanh(x), x=([1], "float32"))
    program.global_block().ops[-1].set_bool_attr("halves", True)
    with pytest.raises(TypeError, match=r"pd_op\.tanh has attributes that operators.py doesn't know: \['halves'\]"):
        decode(program)


def test_a_value_that_is_read_before_it_is_computed_is_an_error():
    program = build(lambda x: paddle.tanh(paddle.sqrt(x)), x=([1], "float32"))
    *_, sqrt, tanh = program.global_block().ops
    tanh.move_before(sqrt)
    with pytest.raises(RuntimeError, match=r"pd_op\.tanh reads a value that no operator before it computes"):
        run(program, x=np.float32([1]))
    sqrt.move_before(tanh)  # Paddle aborts when it destroys such a program


# Collectives


def request(name: str, value: np.ndarray | None, **attributes: int) -> Request:
    type_ = None if value is None else (value.dtype, value.shape)
    return Request(f"pd_op.{name}", {"ring_id": 7, **attributes}, value, type_)


def ranks(*requests: list[Request], rings: Any = None) -> list[list[Any]]:
    """Return what each rank receives for its requests, one after another."""
    received: list[list[Any]] = [[] for _ in requests]

    def task(rank: int) -> Collectives:
        for one in requests[rank]:
            received[rank].append((yield one))

    run_in_lock_step([task(rank) for rank in range(len(requests))], rings or [BOTH] * len(requests))
    return received


def test_reductions_and_gathers():
    first, second = np.float32([1, 2]), np.float32([10, 20])
    for name, attributes, expected in [
        ("all_reduce", {"reduce_type": SUM}, ([11, 22], [11, 22])),
        ("all_reduce", {"reduce_type": AVERAGE}, ([5.5, 11], [5.5, 11])),
        ("all_gather", {"nranks": 2}, ([1, 2, 10, 20], [1, 2, 10, 20])),
        ("reduce_scatter", {"nranks": 2}, ([11], [22])),
    ]:
        received = ranks(*([request(name, value, **attributes)] for value in (first, second)))
        for (result,), values in zip(received, expected, strict=True):
            np.testing.assert_array_equal(result, values)


def test_each_addition_of_a_reduction_in_half_precision_is_rounded():
    rings = {7: (0, 1, 2)}
    values = [np.array([value], ml_dtypes.bfloat16) for value in (256, 1, 1)]  # 257 isn't a bfloat16
    received = ranks(*([request("all_reduce", value, reduce_type=SUM)] for value in values), rings=[rings] * 3)
    assert [float(result[0]) for (result,) in received] == [256.0] * 3


def test_messages_arrive_in_order_whether_or_not_the_receiver_waits():
    sends = [request("send_v2", np.float32([value]), peer=1) for value in (1, 2)]
    receives = [request("recv_v2", None, peer=0) for _ in range(2)]
    assert [result.item() for result in ranks(sends, receives)[1]] == [1, 2]
    answers = [request("send_v2", np.float32([3]), peer=0)]
    received = ranks([request("recv_v2", None, peer=1), *sends[:1]], [*answers, receives[0]])
    assert (received[0][0].item(), received[1][1].item()) == (3, 1)


def test_ranks_that_wait_forever_are_an_error():
    value = np.float32([1])
    with pytest.raises(RuntimeError, match=r"deadlock: rank 0 in pd_op.all_gather on ring 7$"):
        ranks([request("all_gather", value, nranks=2)], [])
    with pytest.raises(RuntimeError, match=r"deadlock: rank 1 in pd_op.recv_v2 on ring 7$"):
        ranks([], [request("recv_v2", None, peer=0)])


def test_ranks_that_disagree_are_an_error():
    with pytest.raises(RuntimeError, match="ranks of a group disagree"):
        ranks(
            [request("all_reduce", np.float32([1]), reduce_type=SUM)],
            [request("all_reduce", np.float32([1, 2]), reduce_type=SUM)],
        )


def test_groups_with_no_rank_in_common_may_have_the_same_ring_id():
    rings = [{7: (0, 1)}, {7: (0, 1)}, {7: (2, 3)}, {7: (2, 3)}]
    values = [np.float32([value]) for value in (1, 2, 10, 20)]
    received = ranks(*([request("all_reduce", value, reduce_type=SUM)] for value in values), rings=rings)
    assert [result.item() for (result,) in received] == [3, 3, 30, 30]
