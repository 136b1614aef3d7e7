"""register_op: the plain function stays, capture sees one node, names lead back to functions, mistakes end in one sentence."""

import hashlib
import sys
from pathlib import Path

import pytest
import sample_ops
import torch
from torch import nn

from seqloom.annotation import Annotation, AnnotationError
from seqloom.errors import UserError
from seqloom.graph import Ref, Value
from seqloom.ops import register_op
from seqloom.ops.flops import flops, local_flops, matmul_side
from seqloom.ops.registry import capturing, choices_of, decode_call, is_call, registered, resolve
from seqloom.ops.rules import bind, starts_of

torch.set_num_threads(1)


# --- outside capture ---------------------------------------------------------------------------------------------------------


def test_function_stays_itself():
    x, scale = torch.randn(2, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    result = sample_ops.scaled(x, scale, power=3)
    assert torch.equal(result, x**3 * scale)
    grads = torch.autograd.grad(result.sum(), (x, scale))
    assert torch.allclose(grads[0], 3 * x**2 * scale) and torch.allclose(grads[1], (x**3).sum(0))
    assert sample_ops.scaled.__name__ == "scaled" and sample_ops.scaled.__module__ == "sample_ops"


def test_function_compiles_without_a_graph_break():
    compiled = torch.compile(lambda x, s: sample_ops.scaled(x, s) + 1, fullgraph=True, backend="eager")
    x, scale = torch.randn(2, 4), torch.randn(4)
    assert torch.equal(compiled(x, scale), x**2 * scale + 1)


def test_entry():
    entry = resolve("sample_ops:scaled")
    assert entry is registered(sample_ops.scaled)
    assert entry.name == "sample_ops:scaled"
    assert entry.annotation == Annotation.parse("* d^, d^ -> * d^")
    assert entry.saved == ("x", "output")
    assert entry.flops({"d": 4, "power": 2}) == 24
    assert entry.source_digest == hashlib.sha256(Path(sample_ops.__file__).read_bytes()).hexdigest()
    assert registered(sample_ops.plain) is None


def test_source_digest_of_a_function_without_a_file():
    scope = {"register_op": register_op, "__name__": "typed"}
    exec("@register_op('a -> a')\ndef f(x):\n    return x * 2", scope)
    exec("@register_op('a -> a')\ndef g(x):\n    return x + 2", scope)
    digests = [registered(scope[name]).source_digest for name in "fg"]
    assert all(len(digest) == 64 for digest in digests) and digests[0] != digests[1]


# --- capture -----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return sample_ops.scaled(self.proj(x), self.scale, options=(1, 2.5, None, "a")).sum()


def export(module, *args):
    with capturing():
        return torch.export.export(module, args, strict=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_capture_makes_one_opaque_node(frozen):
    with torch.device("meta"):
        module = Model().requires_grad_(not frozen)
    program = export(module, torch.empty(2, 3, 8, device="meta", dtype=torch.float32))
    calls = [node for node in program.graph.nodes if node.op == "call_function" and is_call(node.target)]
    assert len(calls) == 1
    others = [str(node.target) for node in program.graph.nodes if node.op == "call_function" and node not in calls]
    assert others == ["aten.linear.default", "<built-in function getitem>", "aten.sum.default"]
    (value,) = calls[0].meta["val"]
    assert value.shape == (2, 3, 8) and value.dtype == torch.float32
    name, args, kwargs = decode_call(calls[0].args)
    assert name == "sample_ops:scaled"
    assert [arg.name for arg in args] == ["linear", "p_scale"]
    assert kwargs == {"options": (1, 2.5, None, "a")}


def test_captured_outputs_require_grad():
    x = torch.empty(2, 8, device="meta", requires_grad=True)
    with capturing():
        result = sample_ops.scaled(x, torch.empty(8, device="meta"))
        assert result.requires_grad and result.device.type == "meta"
        assert not sample_ops.scaled(x.detach(), torch.empty(8, device="meta")).requires_grad
    with pytest.raises(RuntimeError, match="its backward never runs"):
        result.sum().backward()


def test_capture_ends_with_its_context():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError), capturing():
        raise ValueError
    assert torch.equal(sample_ops.scaled(x, x[0]), x)


def test_several_outputs():
    class Two(nn.Module):
        def forward(self, x, y):
            first, second = sample_ops.two_outputs(x, y)
            return first.sum() + second.sum()

    program = export(Two(), torch.empty(2, 3, device="meta", dtype=torch.bfloat16), torch.empty(2, 5, device="meta", dtype=torch.bfloat16))
    (call,) = [node for node in program.graph.nodes if is_call(node.target)]
    assert [(tuple(x.shape), x.dtype) for x in call.meta["val"]] == [((2, 3, 5), torch.float32), ((2, 3), torch.float32)]


@pytest.mark.parametrize(
    ("call", "shape", "dtype"),
    [
        (lambda x: sample_ops.repeated(x), (2, 4, 3), torch.bfloat16),  # a size from a default
        (lambda x: sample_ops.repeated(x, copies=5), (2, 4, 5), torch.bfloat16),
        (lambda x: sample_ops.repeated(x.long(), 7), (2, 4, 7), torch.int64),
        (lambda x: sample_ops.with_table(x), (2, 4), torch.float64),
        (lambda x: sample_ops.with_table(x, table=x), (2, 4), torch.float64),
        (lambda x: sample_ops.looked_up(x.long(), x), (2, 4), torch.bfloat16),  # the first floating-point input decides
    ],
)
def test_shapes_and_dtypes_in_capture(call, shape, dtype):
    with capturing():
        result = call(torch.empty(2, 4, device="meta", dtype=torch.bfloat16))
    assert (tuple(result.shape), result.dtype) == (shape, dtype)


def test_capture_rejects_what_it_cannot_keep(monkeypatch):
    x = torch.empty(2, 4, device="meta")
    with capturing():
        with pytest.raises(AnnotationError, match="'d' is 4 in input 0, dimension 1, but 5 in input 1, dimension 0"):
            sample_ops.scaled(x, torch.empty(5, device="meta"))
        with pytest.raises(UserError, match="got a tensor as 'power', which its annotation does not describe"):
            sample_ops.scaled(x, x[0], x)
        with pytest.raises(UserError, match="got a dict as 'options'"):
            sample_ops.scaled(x, x[0], options={})
        with pytest.raises(UserError, match="got a tuple as 'options'"):
            sample_ops.scaled(x, x[0], options=(x,))
        main = register_op("a -> a", name="__main__:f")(lambda a: a)
        with pytest.raises(UserError, match="move it to a module"):
            main(x)


# --- binding nodes -----------------------------------------------------------------------------------------------------------


def values(**shapes):
    return {name: Value(name, shape, torch.float32) for name, shape in shapes.items()}


def test_bind_follows_the_order_of_the_node():
    known = values(x=(2, 3, 8), s=(8,))
    bound = bind("sample_ops:scaled", (Ref("x"), Ref("s")), {"power": 3}, known)
    assert bound.inputs == ((("*0",), ("*1",), ("d",)), (("d",),))
    assert bind("sample_ops:scaled", (), {"scale": Ref("s"), "x": Ref("x")}, known).inputs == bound.inputs[::-1]
    assert [split.name for split in bound.splits()] == ["*0", "*1"]


def test_bind_of_arguments_that_are_no_tensors():
    known = values(x=(2, 4), table=(9,))
    assert bind("sample_ops:with_table", (Ref("x"), None), {}, known).inputs == ((("b",), ("d",)),)
    assert bind("sample_ops:with_table", (Ref("x"), Ref("table")), {}, known).inputs == ((("b",), ("d",)), None)
    assert bind("sample_ops:repeated", (Ref("x"),), {"copies": 5}, known).sizes == {"b": 2, "l": 4, "copies": 5}


def test_bind_errors_name_the_operator():
    known = values(x=(2, 8), s=(7,))
    with pytest.raises(AnnotationError, match="operator 'sample_ops:scaled': 'd' is 8") as caught:
        bind("sample_ops:scaled", (Ref("x"), Ref("s")), {}, known)
    assert caught.value.text == "* d^, d^ -> * d^" and caught.value.position == 6
    with pytest.raises(UserError, match="do not fit its signature: missing a required argument: 'scale'"):
        bind("sample_ops:scaled", (Ref("x"),), {"power": 3, "options": ()}, known)
    with pytest.raises(UserError, match="got a tensor as 'power'"):
        bind("sample_ops:scaled", (Ref("x"), Ref("x"), Ref("x")), {}, values(x=(8,)))


# --- names and registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere_at_all:f", "no module nowhere_at_all.*PYTHONPATH"),
        ("nowhere.at.all:f", "no module nowhere.at.all"),
        ("sample_ops:missing", "module sample_ops has no function missing"),
        ("sample_ops:plain", "not a registered operator: decorate it with @register_op"),
        ("sample_ops", "write it as module:function"),
        (":f", "write it as module:function"),
        ("half_written:f", "importing half_written fails with SyntaxError"),
        ("needs_more:f", "its module needs_more imports not_installed_here, which is missing"),
    ],
)
def test_resolve_says_what_is_missing(name, words, tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=words):
        resolve(name)


def test_resolve_imports_the_module(tmp_path, monkeypatch):
    (tmp_path / "fresh_ops.py").write_text("from seqloom.ops import register_op\n@register_op('a -> a')\ndef f(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "fresh_ops" not in sys.modules
    assert resolve("fresh_ops:f").name == "fresh_ops:f"
    del sys.modules["fresh_ops"]


@pytest.mark.parametrize(
    ("annotation", "options", "function", "words"),
    [
        ("a b, c -> a b c", {}, lambda x: x, "1 parameters but its annotation 2 inputs"),
        ("a -> a", {}, lambda *x: x, "takes '\\*x': write its parameters out"),
        ("a -> a", {}, lambda x, **k: x, "takes '\\*\\*k'"),
        ("a -> a", {"saved": ("y",)}, lambda x: x, "saved= names 'y'"),
        ("a -> a", {"context_parallel": "b"}, lambda x: x, "context_parallel='b' is not a name"),
        ("a -> b", {}, lambda x: x, "'a' is missing in an output"),
    ],
)
def test_registration_errors(annotation, options, function, words):
    with pytest.raises(UserError, match=words):
        register_op(annotation, **options)(function)


def test_hints_are_kept():
    entry = registered(register_op("a l -> a l", name="m:f", comm=lambda sizes: sizes["l"], context_parallel="l")(lambda x: x))
    assert (entry.name, entry.context_parallel, entry.comm({"l": 7})) == ("m:f", "l", 7)


# --- starts, choices, side ---------------------------------------------------------------------------------------------------


def piecewise(x, table, offset: int = 0, rows: int = 4):
    return x + table[offset : offset + x.shape[1]]


@pytest.mark.parametrize(
    ("annotation", "options", "words"),
    [
        ("b l, m^ -> b l", {"starts": {"q": "offset"}}, "dimension 'q', which is not a name in its annotation: name a dimension without"),
        ("b l, m^ -> b l", {"starts": {"m": "offset"}}, "dimension 'm', which may not be split or is summed over"),
        ("b l m+, m+ -> b l", {"starts": {"m": "offset"}}, "dimension 'm', which may not be split or is summed over"),
        ("b (l h), m^ -> b (l h)", {"starts": {"l": "offset"}}, "dimension 'l', which is part of a group"),
        ("b l, m^ -> b l", {"starts": {"l": "begin"}}, "the start 'begin': write it as a parameter 'begin: int = 0'"),
        ("b l, m^ -> b l", {"starts": {"l": "rows"}}, "the start 'rows': write it as a parameter 'rows: int = 0'"),
        ("b l, m^ -> b l", {"starts": {"l": "table"}}, "the start 'table': write it as a parameter"),
        ("b l, m^ -> b l", {"choices": {"row": (1, 2)}}, "choices= names 'row', which is not a parameter beyond the annotation"),
        ("b l, m^ -> b l", {"choices": {"table": (1, 2)}}, "choices= names 'table', which is not a parameter beyond the annotation"),
        ("b l, m^ -> b l rows^", {"choices": {"rows": (1, 2)}}, "choices= names 'rows', which gives a size or a start"),
        ("b l, m^ -> b l", {"choices": {"offset": (1, 2)}, "starts": {"l": "offset"}}, "choices= names 'offset', which gives a size or"),
        ("b l, m^ -> b l", {"choices": {"rows": ()}}, "choices= names 'rows' with the values \\(\\): give one or more"),
        ("b l, m^ -> b l", {"choices": {"rows": (1, {})}}, "choices= names 'rows' with the values"),
    ],
)
def test_hints_that_fit_neither_annotation_nor_function(annotation, options, words):
    with pytest.raises(UserError, match=words):
        register_op(annotation, **options)(piecewise)


def test_new_hints_are_kept():
    hints = {"starts": {"l": "offset"}, "choices": {"rows": [2, 4]}, "side": lambda sizes: min(sizes["rows"], sizes["l"])}
    entry = registered(register_op("b l, m^ -> b l", **hints)(piecewise))
    assert entry.starts == {"l": "offset"} and entry.choices == {"rows": (2, 4)} and entry.side({"rows": 3, "l": 7}) == 3
    plain = resolve("sample_ops:scaled")
    assert (plain.starts, plain.choices, plain.side) == ({}, {}, None)


def test_hints_are_found_by_the_name_of_the_operator():
    assert starts_of("sample_ops:shifted") == {"l": "first"} and choices_of("sample_ops:shifted") == {"rows": (1, 2, 5)}
    assert starts_of("sample_ops:scaled") == starts_of("aten.mul.Tensor") == {}
    assert choices_of("sample_ops:scaled") == choices_of("aten.mul.Tensor") == {}


def test_flops_and_side_of_a_piece():
    """Local sizes and constants decide; defaults stand in for constants that are not given."""
    args, sizes = (Ref("x"), Ref("table")), {"b": 2, "l": 6, "m": 12}
    known = values(x=(2, 6), table=(12,))
    whole = bind("sample_ops:shifted", args, {}, known)
    assert local_flops("sample_ops:shifted", args, {}, sizes) == flops("sample_ops:shifted", args, {}, whole) == 2 * 6 * 1
    assert local_flops("sample_ops:shifted", args, {"first": 6}, {**sizes, "l": 3}) == 2 * 3 * 7
    assert matmul_side("sample_ops:shifted", args, {"rows": 5}, sizes) == 5
    assert matmul_side("sample_ops:shifted", args, {}, {**sizes, "l": 1}) == 1
    assert matmul_side("sample_ops:scaled", args, {}, {"d": 4}) is None
    assert matmul_side("aten.mm.default", args, {}, {"m": 4, "k": 2, "n": 3}) is None
    assert local_flops("aten.mm.default", args, {}, {"m": 4, "k": 2, "n": 3}) == 48
    assert local_flops("aten.add.Tensor", args, {}, {"m": 4}) == local_flops("sample_ops:repeated", args[:1], {}, {"b": 4}) == 0


def test_modules_of_the_working_directory_are_found(tmp_path, monkeypatch):
    """Also where Python searches the folder of the script instead, as in `python ../train.py`."""
    source = "from seqloom.ops import register_op\n\n@register_op('*, * -> *')\ndef twice(x, y):\n    return x + y\n"
    (tmp_path / "operators_lying_here.py").write_text(source)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    with pytest.raises(UserError, match="there is no module operators_lying_here"):
        resolve("operators_lying_here:twice")
    monkeypatch.chdir(tmp_path)
    assert resolve("operators_lying_here:twice").name == "operators_lying_here:twice"
