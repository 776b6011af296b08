"""What pyproject.toml claims is what `make test-lowest` installs; private names of PyTorch are few and known."""

import re
from pathlib import Path

import bncurv

ROOT = Path(__file__).parent.parent
CODE = {path: path.read_text() for path in (ROOT / "bncurv").rglob("*.py")}

# What PyTorch has no public name for. Each exists in the oldest version that we support: see `make test-lowest`.
PRIVATE = {
    "torch._C._are_functorch_transforms_active",  # what autograd.Function asks before it runs
    "torch._C._autograd",  # whether saved tensors are packed by hooks, which only torch 2.7 and newer tells
    "torch._C._current_graph_task_id",  # whether this thread is in a backward pass
    "torch._C._get_obj_in_tls",  # what a thread hands on to the engine's threads: that autocast is off
    "torch._C._is_key_in_tls",
    "torch._C._stash_obj_in_tls",
    "torch._C._functorch",  # its switch of the warning that vmap has no rule for an operation; transforms to leave
    "torch._C",  # DisableTorchFunction: the recorder's own reads do not come by its mode
    "torch._C._is_torch_function_all_disabled",  # as DisableTorchFunction leaves it where Ctrl-C came inside
    "torch.ops.aten._unsafe_view",  # a linear layer's output that is no view: in-place operations leave its node
    "torch._batch_norm_impl_index",  # the kernels behind F.batch_norm, with the statistics that they found
    "torch.ops.aten._batch_norm_impl_index_backward",
    "torch._dynamo",  # whether the compiler has been imported
    "torch._disable_dynamo",  # torch.compiler.disable, without importing the compiler
    "torch.autograd.Variable._execution_engine",  # its queue_callback: when backward() has ended
    "torch.autograd.graph._engine_run_backward",  # the frame that knows what backward() was called on
    "from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode",  # put back after Ctrl-C
    "from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack",
    "torch_module._global_forward_pre_hooks",  # hooks of all modules act on a loss that is called too; and ours are
    "torch_module._global_forward_hooks",  # found and taken out, also where Ctrl-C came before their handle
    "torch_module._global_forward_hooks_with_kwargs",
    "torch_module._global_forward_hooks_always_called",
}


def lower_bounds(pyproject: str) -> dict[str, str]:
    """Of the dependencies and of the extras that the tests need."""
    lists = re.findall(r"^(?:dependencies|examples) = \[.*?^\]", pyproject, re.MULTILINE | re.DOTALL)
    lists += re.findall(r"^test = .*$", pyproject, re.MULTILINE)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', "".join(lists)))


def test_lowest_versions_are_the_claimed_ones():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    del pinned["torchvision"]  # BackPACK's, no dependency of ours
    assert pinned == lower_bounds((ROOT / "pyproject.toml").read_text())


def test_pythons_claimed_are_those_that_the_suite_runs_on():
    """The lowest by `make test-lowest`, the other one by `make test`."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    lowest = re.search(r"^PYTHON_LOWEST \?= python([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pinned = re.search(r"Python ([\d.]+), November", (ROOT / "constraints.txt").read_text())
    assert re.findall(r"Python :: (3\.\d+)", pyproject) == [lowest[1], pinned[1]]
    assert f'requires-python = ">={lowest[1]}"' in pyproject and f'python_version = "{lowest[1]}"' in pyproject


def test_one_version_everywhere():
    """Of the package, its citation and the newest release in its changelog."""
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")]
    patterns = (r'^version = "(.+)"', r"^version: (.+)", r"^## \[(\d.+)\]")
    found = [re.search(pattern, text, re.MULTILINE) for pattern, text in zip(patterns, texts, strict=True)]
    assert [match and match[1] for match in found] == [bncurv.__version__] * 3


def test_private_names_of_pytorch_are_known():
    pattern = r"\btorch[\w.]*\._(?!_)\w+|\bfrom torch[\w.]* import .*\b_\w+"
    assert {name for text in CODE.values() for name in re.findall(pattern, text)} == PRIVATE


def test_headings_that_messages_point_at_exist():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    joined = [re.sub(r'"\s+f?"', "", text) for text in CODE.values()]  # strings that go on in the next line
    named = [name for text in joined for name in re.findall(r"README[\w.]*,? '([^']+)'", text)]
    assert named and set(named) <= set(headings)
