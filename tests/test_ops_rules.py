"""Rules of PyTorch's operators: truth (check-op), coverage of real models, reshapes, what backward keeps, FLOPs."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_samples import SAMPLES, b, i, sample, t
from torch.fx import map_arg
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seqloom.annotation import Annotation
from seqloom.errors import UserError
from seqloom.graph import Ref, Value, refs
from seqloom.ops.attention import attention
from seqloom.ops.check import check_rule, format_report
from seqloom.ops.flops import flops
from seqloom.ops.registry import capturing, decode_call, is_call
from seqloom.ops.rules import RULES, bind
from seqloom.ops.saved import is_view, saved_for_backward
from seqloom.ops.views import reshape_text, with_output_shape

torch.set_num_threads(1)


def bound_of(call):
    return bind(call.op, call.args, call.kwargs, call.values)


def lettered(call):
    """The bound annotation written with its marks, `*` resolved."""
    bound = bound_of(call)
    reduced, frozen = bound.reduced, bound.frozen
    mark = lambda name: name + ("^" if name in frozen else "+" if name in reduced else "")  # noqa: E731
    words = lambda dims: "?" if dims is None else " ".join("*".join(map(mark, dim)) for dim in dims) or "()"  # noqa: E731
    return ", ".join(map(words, bound.inputs)) + " -> " + ", ".join(map(words, bound.outputs))


# --- truth -------------------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_sample():
    assert {call.op.rpartition(".")[0] for call in SAMPLES} == set(RULES)


@pytest.mark.parametrize("call", SAMPLES, ids=repr)
def test_rule_is_true(call):
    bound = bound_of(call)
    assert [bound.shape(dims) for dims in bound.outputs] == [tuple(x.shape) for x in call.run()]
    report = check_rule(call.op, call.args, call.kwargs, call.inputs)
    assert report.ok, format_report(report)
    assert [split.name for split in report.splits] == [split.name for split in bound.splits()]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (sample("linear.default", t(2, 4, 6), t(8, 6)), "*0 *1 i+, o i+ -> *0 *1 o"),
        (sample("linear.default", t(2, 4, 6), t(8, 6), t(8)), "*0 *1 i^, o i^, o -> *0 *1 o"),
        (sample("addmm.default", t(8), t(4, 6), t(6, 8)), "n, m k^, k^ n -> m n"),
        (sample("matmul.default", t(2, 4, 6), t(6, 8)), "a y x+, x+ z -> a y z"),
        (sample("add.Tensor", t(2, 1, 6), t(4, 1)), "a 1 c, b 1 -> a b c"),
        (sample("embedding.default", t(9, 6), i(9, 2, 4)), "n^ d, *0 *1 -> *0 *1 d"),
        (sample("layer_norm.default", t(2, 6), [6], t(6), t(6)), "a b^, b^, b^ -> a b^"),
        (sample("mean.dim", t(4, 6), [-1], True), "a b^ -> a 1"),
        (sample("sum.dim_IntList", t(4, 6), [-1]), "a b+ -> a"),
        (sample("sum.default", t(4, 6)), "a+ b+ -> ()"),
        (sample("softmax.int", t(4, 6), -1), "a b^ -> a b^"),
        (sample("cat.default", [t(4, 6), t(4, 2)], -1), "a 6, a 2 -> a 8"),
        (sample("slice.Tensor", t(4, 6), 1, 0, 3), "a 6 -> a 3"),
        (sample("slice.Tensor", t(4, 6), 1, 0, 6), "a b -> a b"),
        (sample("split.Tensor", t(4, 6), 2, 1), "a 6 -> a 2, a 2, a 2"),
        (sample("transpose.int", t(2, 4, 6), 1, 2), "a b c -> a c b"),
        (sample("unsqueeze.default", t(4, 6), 1), "a b -> a 1 b"),
        (sample("expand.default", t(4, 1, 6), [4, 8, 6]), "a 1 c -> a b c"),
        (sample("view.default", t(1, 8, 12), [1, 8, 4, 3]), "1 a b*c^ -> 1 a b c^"),
        (sample("view.default", t(2, 8, 12), [16, 12]), "a b^ c -> a*b^ c"),
        (sample("where.self", b(4, 6), t(4, 6), t()), "a b, a b, () -> a b"),
        (sample("repeat_interleave.self_int", t(4, 6), 2, 1), "a b -> a b*2"),
        (sample("cross_entropy_loss.default", t(4, 6), i(6, 4), None, 0), "a b^, a -> a"),
        (sample("cross_entropy_loss.default", t(4, 6), i(6, 4), None, 2), "a+ b^, a+ -> ()"),
        (sample("cross_entropy_loss.default", t(4, 6), i(6, 4)), "a^ b^, a^ -> ()"),
        (sample("type_as.default", t(4, 6), t(2)), "a b, ? -> a b"),
    ],
    ids=lambda x: x if isinstance(x, str) else repr(x),
)
def test_annotations(call, text):
    assert lettered(call) == text


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (sample("linear.default", t(4, 6), t(8, 6), t(8)), "* i+, o i+, o -> * o"),  # the bias is added twice
        (sample("mean.dim", t(4, 6), [-1]), "a b+ -> a"),
        (sample("softmax.int", t(4, 6), -1), "a b -> a b"),
        (sample("cumsum.default", t(4, 6), -1), "a b -> a b"),
        (sample("mul.Tensor", t(4, 6), t(6)), "a b, 6 -> a b"),
    ],
)
def test_check_finds_a_false_rule(call, wrong, monkeypatch):
    shapes = [tuple(x.shape) for x in call.inputs.values()]
    lie = Annotation.parse(wrong) if "6" not in wrong else None
    if lie is None:
        with pytest.raises(UserError):  # the piece does not even fit
            Annotation.parse(wrong).bind([(4, 3), (3,)])
        return
    monkeypatch.setattr("seqloom.ops.check.bind", lambda *_: lie.bind(shapes))
    report = check_rule(call.op, call.args, call.kwargs, call.inputs)
    assert not report.ok
    assert "WRONG" in format_report(report) and "the annotation lies about" in format_report(report)


# --- coverage ----------------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"vocab_size": 512, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "olmo2": {**SMALL, "num_key_value_heads": 2},
    "phi3": {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
}


class Base(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids):
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def exported(model_type):
    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        return attention(query, key, value, scaling).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("seqloom_rules_test", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("seqloom_rules_test", lambda *_, **__: None)
    extra = {"attn_pdrop": 0} if model_type == "gpt2" else {}
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], **extra)
    config._attn_implementation, config.use_cache = "seqloom_rules_test", False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).base_model.train()
    ids = torch.zeros(2, 128, dtype=torch.long, device="meta")
    with capturing():
        program = torch.export.export(Base(model), (ids, ids), strict=False)
    for module in program.graph_module.modules():
        yield from getattr(getattr(module, "graph", None), "nodes", ())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_real_models_have_only_operators_with_rules(model_type):
    calls = attentions = 0
    for node in exported(model_type):
        target = str(node.target)
        if node.op != "call_function" or "_assert" in target or not (target.startswith("aten.") or is_call(node.target)):
            continue
        values = {n.name: Value(n.name, tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in node.all_input_nodes}
        op, args, kwargs = decode_call(node.args) if is_call(node.target) else (target, node.args, node.kwargs)
        args, kwargs = map_arg((tuple(args), dict(kwargs)), lambda n: Ref(n.name))
        bound = bind(op, args, kwargs, values)
        outputs = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        assert [bound.shape(dims) for dims in bound.outputs] == [tuple(x.shape) for x in outputs], node.format_node()
        assert len(bound.inputs) == len(list(refs((args, tuple(kwargs.values())))))
        saved_for_backward(op, args, kwargs, values)
        calls, attentions = calls + 1, attentions + is_call(node.target)
    assert calls > 50 and attentions == 2


# --- errors ------------------------------------------------------------------------------------------------------------------


def test_operator_without_a_rule_says_how_to_register_it():
    values = {"x": Value("x", (4,), torch.float32)}
    with pytest.raises(UserError) as caught:
        bind("aten.fft_fft.default", (Ref("x"),), {}, values, module="model.layers.0.mixer")
    message = str(caught.value)
    for word in ("'aten.fft_fft.default'", "'model.layers.0.mixer'", "@seqloom.ops.register_op", "'aten.fft_fft' to seqloom/ops"):
        assert word in message
    with pytest.raises(UserError, match="no annotation rule"):
        saved_for_backward("aten.fft_fft.default", (Ref("x"),), {})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (sample("dropout.default", t(4), 0.1, True), "p=0.1.*set the model's dropout to 0"),
        (sample("max.other", t(4), t(4)), "torch.maximum"),
        (sample("einsum.default", "ij,jk", [t(2, 2), t(2, 2)]), "'->'"),
        (sample("cross_entropy_loss.default", t(4, 6), t(4, 6)), "class indices"),
        (sample("cross_entropy_loss.default", t(4, 6), i(6, 4), t(6)), "class weights"),
        (sample("mm.default", t(4, 6), t(5, 8)), "'k' is 6 in input 0, dimension 1, but 5 in input 1, dimension 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.op,
)
def test_calls_that_cannot_be_described(call, words):
    with pytest.raises(UserError, match=words):
        bound_of(call)


# --- reshapes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ((1, 128, 64), (1, 128, 4, 16), "1 a (b c) -> 1 a b c"),
        ((2, 128, 64), (256, 64), "a b c -> (a b) c"),
        ((1, 128, 64), (128, 64), "1 a b -> a b"),
        ((4, 1, 8), (4, 8), "a 1 b -> a b"),
        ((6, 4), (4, 6), "(a 3) 4 -> (a 2) 6"),
        ((3, 4), (4, 3), "(1 3) 4 -> (1 4) 3"),
        ((2, 3, 5), (2, 3, 5), "a b c -> a b c"),
        ((2, 3, 4, 5), (6, 20), "a b c d -> (a b) (c d)"),
        ((24,), (2, 3, 4), "(a b c) -> a b c"),
        ((), (1, 1), "() -> 1 1"),
        ((2, 1, 6), (2, 2, 1, 3), "a 1 (b c) -> a b 1 c"),
    ],
)
def test_reshape_text(source, target, text):
    assert reshape_text(source, target).text == text


@st.composite
def reshapes(draw):
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), max_size=5))

    def grouped():
        shape = [1] * draw(st.integers(0, 1))
        for factor in factors:
            if shape and draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        return shape

    source, target = grouped(), grouped()
    total = 1
    for factor in factors:
        total *= factor
    fix = lambda shape: tuple(shape) if shape or total == 1 else (total,)  # noqa: E731
    return fix(source), fix(target)


@settings(deadline=None)
@given(reshapes())
def test_reshape_of_a_piece_is_the_piece_of_the_reshape(case):
    source, target = case
    array = torch.arange(float(torch.Size(source).numel())).double().reshape(source)
    call = sample("view.default", array, list(target))
    bound = bound_of(call)
    assert bound.shape(bound.outputs[0]) == target
    for split in bound.splits():
        (cut,), (out,) = split.input_dims, split.output_dims
        pieces = array.chunk(split.size, cut)
        local = dataclasses.replace(bound, named_sizes=tuple((n, 1 if n == split.name else s) for n, s in bound.named_sizes))
        shape = local.shape(bound.outputs[0])
        assert torch.equal(torch.cat([piece.reshape(shape) for piece in pieces], out), array.reshape(target))


def test_nested_factors_are_all_splittable():
    """A split of the heads survives the view that makes them and the one that joins them again."""
    apart = bound_of(sample("view.default", t(2, 8, 12), [2, 8, 4, 3]))
    joined = bound_of(sample("reshape.default", t(2, 8, 4, 3), [2, 8, 12]))
    assert [(s.size, s.input_dims, s.output_dims) for s in apart.splits()] == [(2, (0,), (0,)), (8, (1,), (1,)), (4, (2,), (2,))]
    assert [(s.size, s.input_dims, s.output_dims) for s in joined.splits()] == [(2, (0,), (0,)), (8, (1,), (1,)), (4, (2,), (2,))]


def test_with_output_shape_changes_only_sizes():
    assert with_output_shape("aten.view.default", (Ref("x"), (2, -1)), {}, (1, 6)) == ([Ref("x"), (1, 6)], {})
    assert with_output_shape("aten.view.default", (Ref("x"),), {"size": (2, -1)}, (1, 6)) == ((Ref("x"),), {"size": (1, 6)})
    assert with_output_shape("aten.neg.default", (Ref("x"),), {}, (1, 6)) == ((Ref("x"),), {})


# --- what backward keeps -----------------------------------------------------------------------------------------------------

# These are made of several operators in eager mode, whose intermediates are other tensors; what is kept of inputs and outputs differs.
COMPOSITE = ("aten.rms_norm", "aten.einsum", "aten.var", "aten.log_sigmoid", "aten.square", "aten.logsumexp")
GRADS = [
    call
    for call in SAMPLES
    if any(x.is_floating_point() for x in call.inputs.values())
    and call.op.rpartition(".")[0] not in COMPOSITE
    and not (call.op == "aten.matmul.default" and "(2, 1, 4, 6)" in repr(call))  # broadcast operands are copied first
]


def kept_by_autograd(call):
    """Storages of inputs and outputs that eager autograd saves."""
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in call.inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = call.run(leaves)
    pointers = {x.untyped_storage().data_ptr() for x in saved}
    inputs = [("input", k) for k, x in enumerate(leaves.values()) if x.untyped_storage().data_ptr() in pointers]
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    found = [("output", j) for j, x in enumerate(outputs) if x.untyped_storage().data_ptr() in pointers - own]
    return inputs + found


@pytest.mark.parametrize("call", GRADS, ids=repr)
def test_saved_tensors_are_those_of_eager_autograd(call):
    said = saved_for_backward(call.op, call.args, call.kwargs, call.values)
    real = kept_by_autograd(call)
    # A tensor of a single element or a vector (a bias, a mean) is no matter of memory.
    large = lambda place: place[0] == "output" or list(call.inputs.values())[place[1]].dim() > 1  # noqa: E731
    assert {p for p in said if p[0] != "like_input" and large(p)} == {p for p in real if large(p)}


def test_saved_follows_the_gradients():
    args = (Ref("x"), Ref("table"))
    values = {"x": Value("x", (4,), torch.float32, requires_grad=True), "table": Value("table", (4,), torch.float32)}
    assert saved_for_backward("aten.mul.Tensor", args, {}, values) == (("input", 1),)
    assert saved_for_backward("aten.mul.Tensor", args, {}) == (("input", 0), ("input", 1))
    assert saved_for_backward("aten.mul.Tensor", (Ref("table"), Ref("table")), {}, values) == ()
    assert saved_for_backward("aten.mul.Tensor", (Ref("x"), 2.0), {}, values) == ()
    assert saved_for_backward("aten.linear.default", args, {}, values) == (("input", 1),)


@pytest.mark.parametrize("call", SAMPLES, ids=repr)
def test_views_share_storage(call):
    if not call.inputs or not is_view(call.op) or call.op == "aten.reshape.default":
        return
    source = next(iter(call.inputs.values()))
    assert all(x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() for x in call.run())


def test_operators_that_are_no_views():
    for op in ("aten.add.Tensor", "aten.cat.default", "aten.clone.default", "chunk_linear_cross_entropy:chunk_linear_cross_entropy"):
        assert not is_view(op)


def test_saved_of_registered_operators():
    name = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"
    args = (Ref("h"), Ref("w"), Ref("y"))
    assert saved_for_backward(name, args, {"padding_idx": -100}) == (("input", 0), ("input", 1), ("input", 2))
    kept = saved_for_backward("seqloom.ops.attention:attention", args, {"scale": 1.0})
    assert kept == (("input", 0), ("input", 1), ("input", 2), ("output", 0))


# --- FLOPs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (sample("linear.default", t(2, 4, 6), t(8, 6)), 2 * 2 * 4 * 6 * 8),
        (sample("linear.default", t(4, 6), t(8, 6), t(8)), 2 * 4 * 6 * 8),
        (sample("mm.default", t(4, 6), t(6, 8)), 2 * 4 * 6 * 8),
        (sample("matmul.default", t(3, 1, 4, 6), t(5, 6, 8)), 2 * 15 * 4 * 6 * 8),
        (sample("einsum.default", "bij,bjk->bik", [t(2, 4, 6), t(2, 6, 8)]), 2 * 2 * 4 * 6 * 8),
        (sample("add.Tensor", t(4, 6), t(4, 6)), 0),
    ],
    ids=lambda x: "" if isinstance(x, int) else x.op,
)
def test_flops(call, count):
    assert flops(call.op, call.args, call.kwargs, bound_of(call)) == count


@pytest.mark.parametrize(
    ("kwargs", "pairs"),
    [({}, 50), ({"causal": True}, 50), ({"causal": False}, 100), ({"window": 3}, 30), ({"window": 30}, 50)],
)
def test_flops_of_attention(kwargs, pairs):
    values = {name: Value(name, (2, heads, 10, 8), torch.float32) for name, heads in (("q", 6), ("k", 3), ("v", 3))}
    args, kwargs = (Ref("q"), Ref("k"), Ref("v")), {"scale": 0.1, **kwargs}
    name = "seqloom.ops.attention:attention"
    assert flops(name, args, kwargs, bind(name, args, kwargs, values)) == 4 * 2 * 6 * pairs * 8


def test_flops_of_the_loss():
    values = {n: Value(n, s, torch.float32) for n, s in (("h", (2, 4, 8)), ("w", (11, 8)), ("y", (2, 4)))}
    args, name = (Ref("h"), Ref("w"), Ref("y")), "chunk_linear_cross_entropy:chunk_linear_cross_entropy"
    assert flops(name, args, {"padding_idx": 0}, bind(name, args, {"padding_idx": 0}, values)) == 2 * 2 * 4 * 8 * 11
