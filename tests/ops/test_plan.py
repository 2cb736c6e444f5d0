"""Plans as arguments of a custom operation: the code of a plan is decoded to that plan; places that it tells."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastres.ops.nodes import Conv, Describe, End, Norm, Open, Pool
from fastres.ops.plan import Plan, decode

sizes, flags = st.integers(0, 300), st.booleans()
pads = st.tuples(sizes, sizes, sizes, sizes)
convs = st.builds(Conv, sizes, pads, sizes, flags, flags, flags)
norms = st.builds(Norm, st.floats(0, 1, allow_nan=False), flags)
layers = st.lists(convs | norms, max_size=3).map(tuple)
nodes = st.one_of(
    convs,
    norms,
    st.builds(Open, sizes, flags, layers),
    st.builds(End, flags, flags),
    st.builds(Pool, sizes, sizes, pads),
    st.just(Describe()),
)
groups = st.none() | st.sampled_from(["0", "cn|(o1)", "group 1"])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(nodes, max_size=8).map(tuple), groups, flags)
def test_a_plan_is_what_its_code_says(nodes, group, recompute):
    plan = Plan(nodes, group, recompute)
    code = plan.encode()
    assert decode(code) == plan
    flat = [one for node in nodes for one in ((*node.branch, node) if isinstance(node, Open) else (node,))]
    kinds = [type(node) for node in flat]
    assert code.counts == (kinds.count(Conv), kinds.count(Norm) + kinds.count(Describe))
    assert code.parameters == "".join({Conv: "w", Norm: "gbmv"}.get(kind, "") for kind in kinds)


def test_equal_codes_give_one_plan():
    plan = Plan((Conv(), Norm(), End(adds=False)))
    assert decode(plan.encode()) is decode(plan.encode())


def test_numbers_that_torch_compile_does_not_know():
    """A padding that depends on a dynamic size is symbolic while a graph is traced."""
    plan = Plan((Conv(1, (1, 1, 2, 2)), Norm()))
    structure, integers, numbers = plan.encode()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = mode.from_tensor(torch.empty(7, 5), static_shapes=False).shape[0]
    code = plan.encode()._replace(integers=[symbolic, *integers[1:]])
    assert decode(code).nodes[0].stride == 7


def test_shapes_of_the_convolutions():
    branch = (Conv(2), Norm())
    nodes = (Open(branch=branch), Conv(2, (1, 1, 1, 1)), Norm(), Conv(), Norm(), End(), Pool(2, 2, (0, 0, 0, 0)))
    found = list(Plan(nodes).convolutions((2, 8, 6, 3), [(5, 1, 1, 3), (4, 3, 3, 3), (5, 1, 1, 4)]))
    assert [out for _, _, out in found] == [(2, 4, 3, 5), (2, 4, 3, 4), (2, 4, 3, 5)]
    assert Plan(nodes).readers_of_x == {0, 1}
    assert Plan((Norm(), Conv())).readers_of_x == set()
    assert Plan((Open(given=True), Conv(), Norm(), End())).readers_of_x == {0}
