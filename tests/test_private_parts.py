"""Private parts of other libraries that we use: all of them, where they are, and what to do when one has changed."""

import ast
from collections.abc import Iterator
from importlib import import_module

import pytest
from test_house import modules

# By library: the name, as an attribute or an import; where a version that we can use has it; what to do without it.
PRIVATE = {
    "Python": {
        "_Unpickler": ("pickle:_Unpickler.load", "read pickled arrays with numpy, in another process"),
    },
    "torch": {
        "_world": ("torch.distributed.distributed_c10d:_world.pg_map", "collect process groups where they are made"),
        "_set_pg_timeout": ("torch.distributed.distributed_c10d:_set_pg_timeout", "give each group its timeout"),
        "_get_default_store": ("torch.distributed.distributed_c10d:_get_default_store", "open a TCPStore of our own"),
        "_foreach_lerp_": ("torch:_foreach_lerp_", "average tensor by tensor with lerp_"),
        "_cdata": ("torch:UntypedStorage._cdata", "tell storages apart by data_ptr()"),
        "torch._subclasses.FakeTensorMode": ("torch._subclasses:FakeTensorMode", "count on the meta device"),
        "torch.utils._python_dispatch.TorchDispatchMode": (
            "torch.utils._python_dispatch:TorchDispatchMode", "torch.utils.flop_counter has a mode of its own to copy"),
        "torch.utils._pytree.tree_leaves": ("torch.utils._pytree:tree_leaves", "torch.utils.pytree, once it is public"),
    },
    "DeepSpeed": {
        "_partition_all_parameters": (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
            "partition each parameter by its own ds_tensor methods"),
        "_reassign_or_swap_out_partitioned_parameters": (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
            "copy the float32 partitions into the bf16 ones"),
    },
}  # fmt: skip
PUBLIC = {"_asdict", "_replace", "_fields", "_exit"}  # documented, in spite of the underscore


def private_names(tree: ast.Module) -> Iterator[str]:
    """What a module uses of others' names that begin with an underscore."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            hidden = node.attr.startswith("_") and not node.attr.startswith("__")
            yield from [node.attr] if hidden and node.attr not in PUBLIC else []
        if isinstance(node, ast.ImportFrom) and node.module:
            hidden = any(part.startswith("_") for part in node.module.split("."))
            yield from (f"{node.module}.{a.name}" for a in node.names if hidden or a.name.startswith("_"))


def test_every_private_part_that_is_used_is_listed() -> None:
    used = {name for tree in modules().values() for name in private_names(tree)}
    assert used == {name for parts in PRIVATE.values() for name in parts}


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, parts in PRIVATE.items() for name in parts])
def test_the_installed_version_has(library: str, name: str) -> None:
    place, remedy = PRIVATE[library][name]
    module, _, path = place.partition(":")
    part = import_module(module)
    for step in path.split("."):
        assert hasattr(part, step), f"{library} has no {name} any more: {remedy}"
        part = getattr(part, step)
