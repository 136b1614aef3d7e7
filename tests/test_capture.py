"""Capture: the graph computes what the Hugging Face model computes, in a normal form, the same every time."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from graph_interpreter import run_graph
from models import FAMILIES, batch, original_loss, original_model, state_of
from torch import nn
from torch.nn import functional as F
from transformers import BloomConfig, CohereConfig, FalconConfig, GPT2Config, LlamaConfig, T5Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from seqloom.capture import Captured, capture
from seqloom.capture.float64 import Float64Mode, widen
from seqloom.capture.head import add_loss
from seqloom.capture.hf import ATTENTION, attention_operator, build_model, tied_keys
from seqloom.capture.pipeline import DEFAULT_LOSS, annotate
from seqloom.capture.simplify import simplify, sweep
from seqloom.capture.tracing import trace
from seqloom.errors import UserError
from seqloom.graph import Graph, Node, Ref, Value, verify

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH = 2, 16
FUSED = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"


@functools.cache
def tiny(family: str = "llama", layers: int = 3, dtype: torch.dtype = torch.bfloat16, **options) -> Captured:
    return capture(FAMILIES[family](layers), batch_size=BATCH, seq_len=LENGTH, dtype=dtype, **options)


def everything(graph: Graph) -> list[tuple[Graph, Node]]:
    return [(g, node) for g in (graph, *graph.blocks.values()) for node in g.nodes]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


# --- parity ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_original_model(family):
    config = FAMILIES[family](2)
    model, inputs = original_model(config), batch(BATCH, LENGTH)
    expected = original_loss(model, inputs)
    expected.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()

    captured = capture(config, batch_size=BATCH, seq_len=LENGTH, dtype=torch.float64)
    verify(captured.graph)
    assert_normal_form(captured.graph)
    (loss,) = run_graph(captured.graph, inputs, state_of(model))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for key, parameter in model.named_parameters():
        scale = gradients[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=0, atol=1e-10 * scale + 1e-14, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_every_pass_keeps_the_logits(family):
    config = FAMILIES[family](2)
    model, inputs = original_model(config), batch(BATCH, LENGTH)
    graphs = [widen(trace(build_model(config, torch.float64), BATCH, LENGTH))]
    graphs.append(simplify(graphs[-1]))
    assert len(graphs[1].nodes) < len(graphs[0].nodes)
    graphs.append(simplify(graphs[1]))
    assert graphs[2] == graphs[1], "simplify is not idempotent"
    with Float64Mode():
        logits = model(**{key: inputs[key] for key in ("input_ids", "position_ids")}).logits
    for graph in graphs:
        (result,) = run_graph(graph, {name: inputs[name] for name in graph.inputs}, state_of(model))
        torch.testing.assert_close(result, logits, rtol=1e-10, atol=1e-12)
    with_loss = add_loss(graphs[-1], DEFAULT_LOSS, 5, torch.float64)
    (loss,) = run_graph(with_loss, inputs, state_of(model))
    torch.testing.assert_close(loss, original_loss(model, inputs), rtol=1e-12, atol=0)


def test_half_precision_graph_runs_with_its_own_dtypes():
    """In bf16 every value has the dtype that the graph says: casts inside norms and rotary embedding are kept."""
    config = FAMILIES["llama"](2)
    graph = capture(config, batch_size=BATCH, seq_len=LENGTH, dtype=torch.bfloat16).graph
    model = original_model(config)
    state = {key: t if key.endswith("inv_freq") else t.detach().bfloat16().requires_grad_() for key, t in state_of(model).items()}
    state = {key: t.float() if key.endswith("inv_freq") else t for key, t in state.items()}
    (loss,) = run_graph(graph, batch(BATCH, LENGTH), state)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), original_loss(model, batch(BATCH, LENGTH)), rtol=2e-2, atol=0)


# --- structure -------------------------------------------------------------------------------------------------------------------


def test_llama_is_embedding_rotary_blocks_norm_and_loss():
    captured = tiny(layers=4)
    graph = captured.graph
    assert captured.model_class == graph.name == "LlamaForCausalLM"
    assert captured.tied == {}
    assert graph.inputs == ("input_ids", "position_ids", "labels")
    assert [graph.values[name].shape for name in graph.inputs] == [(BATCH, LENGTH)] * 3
    assert graph.outputs == ("loss",)
    assert graph.values["loss"].shape == ()
    assert graph.values["loss"].dtype == torch.float32
    calls = [node for node in graph.nodes if node.is_block]
    assert [(node.op, node.module, node.module_class) for node in calls] == [
        ("block:LlamaDecoderLayer", f"model.layers.{i}", "LlamaDecoderLayer") for i in range(4)
    ]
    assert list(graph.blocks) == ["LlamaDecoderLayer"]
    block = graph.blocks["LlamaDecoderLayer"]
    assert block.inputs == ("hidden_states", "cos", "sin")
    assert len(block.outputs) == 1
    assert {node.module for node in block.nodes} >= {"", "self_attn", "self_attn.q_proj", "mlp.act_fn", "input_layernorm"}
    assert ops(graph)[-2:] == [FUSED, "aten.sum.default"]
    assert graph.nodes[-2].args == (Ref("norm"), Ref("lm_head_weight"), Ref("labels"), -100, 1024)


def test_llama_block_reads_well():
    block = tiny().graph.blocks["LlamaDecoderLayer"]
    made = [name for node in block.nodes for name in node.outputs]
    for name in ("input_layernorm", "q_proj", "k_proj", "v_proj", "query", "key", "value", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in made
    assert made[-1] == "hidden_states_2"
    assert [block.values[name].fqn for name in block.values if block.values[name].kind == "parameter"][:2] == [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    ]


def test_state_dict_keys_are_the_original_ones():
    for family in ("llama", "qwen3", "gpt2", "llama_tied"):
        captured = tiny(family)
        model = build_model(FAMILIES[family](3), torch.bfloat16)
        parameters = captured.graph.parameters()
        assert parameters.keys() | captured.tied.keys() == model.state_dict().keys()
        assert not parameters.keys() & captured.tied.keys()
        assert {key: v.shape for key, v in parameters.items()} == {key: tuple(p.shape) for key, p in model.named_parameters()}
        assert captured.num_parameters == sum(p.numel() for p in model.parameters())
        assert captured.graph.buffers().keys() <= {key for key, _ in model.named_buffers()}


def test_tied_weights_have_one_canonical_key():
    captured = tiny("llama_tied")
    assert captured.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    uses = captured.graph.consumers()["embed_tokens_weight"]
    assert [node.op for node in uses] == ["aten.embedding.default", FUSED]
    assert tiny("gpt2").tied == {"lm_head.weight": "transformer.wte.weight"}
    shared = nn.Linear(2, 2)
    assert tied_keys(nn.ModuleList([shared, shared])) == {"1.weight": "0.weight", "1.bias": "0.bias"}


def test_alternating_layers_are_two_blocks():
    graph = tiny("gemma2", layers=5).graph
    assert [node.block for node in graph.nodes if node.is_block] == [f"Gemma2DecoderLayer{1 + i % 2}" for i in range(5)]
    attention = [dict(n.kwargs) for block in graph.blocks.values() for n in block.nodes if n.op.endswith(":attention")]
    assert [kwargs.get("window") for kwargs in attention] == [5, None]
    assert [kwargs["softcap"] for kwargs in attention] == [50.0, 50.0]


def test_sizes_follow_batch_and_length():
    graph = capture(FAMILIES["llama"](1), batch_size=3, seq_len=8, dtype=torch.float32).graph
    assert graph.values["hidden_states"].shape == (3, 8, 32)
    assert {v.dtype for v in graph.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_normal_form_of_half_precision(family):
    assert_normal_form(tiny(family).graph)


def assert_normal_form(graph: Graph) -> None:
    """One form for each operation: what the planner and the emitter may count on."""
    gone = {"view", "contiguous", "alias", "clone", "dropout", "detach", "_to_copy", "addmm", "lift_fresh_copy", "_assert_tensor_metadata"}
    for inner, node in everything(graph):
        values, out = inner.values, inner.values[node.outputs[0]]
        assert ":" in node.op or node.op.split(".")[1] not in gone
        assert out.numel > 0
        if node.op == "aten.reshape.default":
            assert node.args[1] == out.shape != values[node.args[0].name].shape
        if node.op == "aten.linear.default":
            assert len(node.args) == 2
        if node.op == "aten.slice.Tensor":
            assert 0 <= node.args[2] < node.args[3] <= values[node.args[0].name].shape[node.args[1]]
        if node.op.startswith("aten.to."):
            assert node.op == "aten.to.dtype"
            assert values[node.args[0].name].dtype != node.args[1] == out.dtype
        constants = list(_constants((node.args, tuple(v for _, v in node.kwargs))))
        assert all(isinstance(c, (int, float, bool, str, torch.dtype, type(None))) for c in constants), node


def _constants(tree):
    if isinstance(tree, tuple):
        for item in tree:
            yield from _constants(item)
    elif not isinstance(tree, Ref):
        yield tree


def test_conv1d_keeps_its_leading_dimensions():
    block = tiny("gpt2").graph.blocks["GPT2Block"]
    products = [node for node in block.nodes if node.op == "aten.matmul.default"]
    assert len(products) == 4
    for node in products:
        assert len(block.values[node.inputs[0]].shape) == len(block.values[node.outputs[0]].shape) == 3
    split = next(node for node in block.nodes if node.op.startswith("aten.split"))
    assert split.outputs == ("c_attn_split_0", "c_attn_split_1", "c_attn_split_2")


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_no_mask_is_ever_built(family):
    raw = trace(build_model(FAMILIES[family](2), torch.bfloat16), 1, 40)
    assert all(value.shape[-2:] != (40, 40) for value in raw.values.values())
    assert not {"aten.diff.default", "aten.cumsum.default", "aten.tril.default"} & set(ops(simplify(raw)))


def test_float64_has_no_float32_left():
    captured = tiny(dtype=torch.float64)
    for graph, node in everything(captured.graph):
        assert {graph.values[name].dtype for name in (*node.inputs, *node.outputs)} <= {torch.float64, torch.int64}
        assert torch.float32 not in node.args


# --- the head --------------------------------------------------------------------------------------------------------------------


def test_a_kept_head_is_said_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="seqloom"):
        graph = tiny.__wrapped__("gemma2").graph
    assert "Gemma2ForCausalLM changes its logits after the last linear" in caplog.text
    assert ops(graph)[-2:] == ["aten.cross_entropy_loss.default", "aten.sum.default"]
    assert graph.values[graph.nodes[-2].outputs[0]].dtype == torch.float32
    assert graph.values["loss"].dtype == torch.float32


def test_the_head_is_checked_not_assumed():
    """The same class: with a scale the logits are kept, with a scale of exactly 1 they are a plain linear."""
    config = FAMILIES["cohere"](1)
    config.logit_scale = 1.0
    assert isinstance(config, CohereConfig)
    assert FUSED in ops(capture(config, batch_size=1, seq_len=8, dtype=torch.float32).graph)
    config.logit_scale = 0.5
    assert FUSED not in ops(capture(config, batch_size=1, seq_len=8, dtype=torch.float32).graph)


def _logits_graph(op: str = "aten.linear.default", weight_kind: str = "parameter") -> Graph:
    hidden, weight = Value("hidden", (2, 6, 4), torch.bfloat16, "input"), Value("w", (9, 4), torch.bfloat16, weight_kind, "w")
    logits = Value("logits", (2, 6, 9), torch.bfloat16, requires_grad=True)
    node = Node(op, (Ref("hidden"), Ref("w")), (), ("logits",), None, "lm_head", "Linear")
    return Graph("g", {v.name: v for v in (hidden, weight, logits)}, (node,), ("hidden",), ("logits",))


def test_loss_of_a_plain_linear_never_makes_logits():
    graph = add_loss(_logits_graph(), DEFAULT_LOSS, 7, torch.float32)
    assert ops(graph) == [FUSED, "aten.sum.default"]
    assert "logits" not in graph.values
    assert graph.nodes[0].args[-1] == 7
    verify(annotate(graph))


@pytest.mark.parametrize("changes", [{"op": "aten.matmul.default"}, {"weight_kind": "buffer"}])
def test_loss_of_anything_else_keeps_the_logits(changes):
    graph = add_loss(_logits_graph(**changes), DEFAULT_LOSS, 7, torch.float32)
    assert ops(graph)[1:] == ["aten.to.dtype", "aten.transpose.int", "aten.cross_entropy_loss.default", "aten.sum.default"]
    assert graph.nodes[-2].args[2:] == (None, 0, -100)


def test_a_loss_in_half_precision_is_summed_in_single(monkeypatch, tmp_path):
    source = "from seqloom.ops import register_op\n@register_op('b l d^, n^ d^, b l -> b l')\ndef loss(x, w, y, ignore, chunk): ...\n"
    (tmp_path / "half_loss_op.py").write_text(
        source + source.replace("b l d^, n^ d^, b l -> b l", "b l+ d^, n^ d^, b l+ -> b").replace("def loss", "def short")
    )
    monkeypatch.syspath_prepend(tmp_path)
    graph = add_loss(_logits_graph(), "half_loss_op:loss", 7, torch.float32)
    assert ops(graph) == ["half_loss_op:loss", "aten.to.dtype", "aten.sum.default"]
    with pytest.raises(UserError, match="half_loss_op:short gives .* where one loss per token"):
        add_loss(_logits_graph(), "half_loss_op:short", 7, torch.float32)


def test_an_unknown_loss_is_named():
    with pytest.raises(UserError, match="no_such_module"):
        tiny(layers=1, loss="no_such_module:loss")


# --- what a trace may contain ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A model whose forward is a function under test."""

    def __init__(self, forward):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.register_buffer("scale", torch.ones(4))
        self._forward = forward

    def forward(self, input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=self._forward(self, self.embed(input_ids)))


def toy(forward) -> Graph:
    with torch.device("meta"):
        model = Toy(forward)
    return trace(model, 2, 6)


def run_toy(forward) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the embedding from the graph and from PyTorch itself."""
    torch.manual_seed(0)
    model, gradients = Toy(forward), []
    inputs = {"input_ids": torch.randint(0, 9, (2, 6)), "position_ids": torch.zeros(2, 6, dtype=torch.int64)}
    for result in (lambda: run_graph(simplify(toy(forward)), inputs, state_of(model))[0], lambda: model(*inputs.values(), False).logits):
        model.zero_grad()
        result().sum().backward()
        gradients.append(model.embed.weight.grad.clone())
    return tuple(gradients)


def _no_grad_part(self, x):
    with torch.no_grad():
        factor = x * x
    return x * factor


FORWARDS = {
    "no_grad region": _no_grad_part,
    "detach": lambda self, x: x * x.detach(),
    "detach of a constant": lambda self, x: x * self.scale.detach(),
    "autocast turned off": lambda self, x: _autocast(x, False),
    "view chain": lambda self, x: x.view(-1, 4).view(6, 2, 4).reshape(2, 6, 4) * self.scale,
    "slice of everything": lambda self, x: x[:, :, 0:] + x[:, 1:5].sum(1, keepdim=True).expand(2, 6, 4),
    "negative slice": lambda self, x: F.pad(x[..., -2:], (0, 2)) * x[:, ::1, :],
    "stepped slice": lambda self, x: x[:, ::2].repeat_interleave(2, 1) * x,
    "split in two": lambda self, x: torch.cat([part * i for i, part in enumerate(x.split(2, -1), 1)], -1),
    "unused part": lambda self, x: x.chunk(2, -1)[1].repeat(1, 1, 2),
    "addmm of flat": lambda self, x: torch.addmm(self.scale, x.view(12, 4), self.embed.weight[:4]).view(2, 6, 4),
    "addmm of another shape": lambda self, x: torch.addmm(self.scale, x.reshape(6, 8)[:, :4], self.embed.weight[:4]).view(2, 3, 4),
    "addmm with factors": lambda self, x: torch.addmm(self.scale, x.view(12, 4), self.embed.weight[:4], beta=2, alpha=3).view(2, 6, 4),
    "times one": lambda self, x: x * 1.0 / 1 * 2,
    "floor division by one": lambda self, x: x + torch.div(x, 1, rounding_mode="floor"),
    "integer times one": lambda self, x: x * (torch.arange(4, device=x.device) * 1.0),
    "linear with bias": lambda self, x: F.linear(x, self.embed.weight[:4], self.scale),
    "dropout that is off": lambda self, x: F.dropout(x, 0.0) + F.dropout(x, 0.5, training=False),
    "casts there and back": lambda self, x: x.double().to(torch.float32).type_as(x) * x,
    "nothing at all": lambda self, x: x,
}


def _autocast(x, enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return x @ x.transpose(1, 2)


@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_of_toy_models(name):
    ours, theirs = run_toy(FORWARDS[name])
    torch.testing.assert_close(ours, theirs)


def test_simplify_leaves_only_what_matters():
    assert ops(simplify(toy(FORWARDS["nothing at all"]))) == ["aten.embedding.default"]
    assert ops(simplify(toy(FORWARDS["dropout that is off"]))) == ["aten.embedding.default", "aten.add.Tensor"]
    assert ops(simplify(toy(FORWARDS["view chain"]))) == ["aten.embedding.default", "aten.mul.Tensor"]
    assert ops(simplify(toy(FORWARDS["addmm of flat"])))[-2:] == ["aten.matmul.default", "aten.add.Tensor"]
    assert "aten.addmm.default" in ops(simplify(toy(FORWARDS["addmm with factors"])))
    assert ops(simplify(toy(FORWARDS["linear with bias"])))[-2:] == ["aten.linear.default", "aten.add.Tensor"]
    assert "aten.detach.default" in ops(simplify(toy(FORWARDS["no_grad region"])))


def test_sweep_keeps_inputs_and_parameters():
    graph = toy(FORWARDS["nothing at all"])
    empty = sweep(graph.replace(outputs=()))
    assert empty.nodes == ()
    assert set(empty.values) == {"input_ids", "position_ids", "embed_weight"}


def _in_place(self, x):
    y = x * 2
    y.add_(1)
    return y


REFUSED = {
    "in place": (_in_place, "writes in place with aten.add_"),
    "autocast": (lambda self, x: _autocast(x, True), "turns autocast on inside its forward"),
    "tensor constant": (lambda self, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device), "makes a tensor constant in its forward"),
    "data-dependent branch": (lambda self, x: x if x.sum() > 0 else -x, "torch.export cannot trace Toy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_say_is_refused(name):
    forward, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        toy(forward)


def test_an_operator_without_a_rule_is_named_with_its_module():
    graph = Graph(
        "g",
        {"x": Value("x", (2, 3), torch.float32, "input"), "y": Value("y", (2, 3), torch.float32)},
        (Node("aten.mystery.default", (Ref("x"),), (), ("y",), None, "mlp.odd", "Odd"),),
        ("x",),
        ("y",),
    )
    call = Node("block:Layer", (Ref("x"),), (), ("y",), None, "model.layers.4", "Layer")
    outer = graph.replace(nodes=(call,), blocks={"Layer": graph})
    with pytest.raises(UserError, match=r"aten\.mystery\.default.*model\.layers\.4\.mlp\.odd.*register_op"):
        annotate(outer)


# --- bad input -------------------------------------------------------------------------------------------------------------------

GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BAD_CONFIGS = {
    "attention dropout": (GPT2Config(**GPT2_SIZES), "dropout with p=0.1 .*set resid_pdrop, embd_pdrop, attn_pdrop to 0"),
    "residual dropout": (GPT2Config(**GPT2_SIZES, attn_pdrop=0.0), "in transformer.drop .*set resid_pdrop, embd_pdrop to 0"),
    "llama dropout": (
        LlamaConfig(vocab_size=96, hidden_size=32, num_attention_heads=4, attention_dropout=0.2),
        "set attention_dropout to 0",
    ),
    "not causal": (T5Config(), "cannot build a causal language model"),
    "own attention": (FalconConfig(vocab_size=96, hidden_size=32, num_attention_heads=4, num_hidden_layers=1), "attention code of its own"),
    "hidden attention": (BloomConfig(vocab_size=96, hidden_size=32, n_head=4, n_layer=1), "does not take its attention"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_end_in_one_sentence(name):
    config, message = BAD_CONFIGS[name]
    with pytest.raises(UserError, match=message) as caught:
        capture(config, batch_size=1, seq_len=8, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert ATTENTION not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("kind", ["chunked_attention", "sliding_attention"])
def test_what_only_a_mask_would_say_is_refused(kind):
    config = FAMILIES["llama"](1)
    config.layer_types = [kind]
    with pytest.raises(UserError, match="chunked attention|by a mask only"):
        capture(config, batch_size=1, seq_len=8, dtype=torch.float32)


def test_masks_and_sinks_are_refused():
    x = torch.zeros(1, 2, 3, 4)
    with attention_operator():
        forward = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    with pytest.raises(UserError, match="attention mask of its own"):
        forward(nn.Identity(), x, x, x, torch.ones(3, 3))
    with pytest.raises(UserError, match="passes s_aux"):
        forward(nn.Identity(), x, x, x, None, s_aux=torch.ones(2))
    out, weights = forward(nn.Identity(), x, x, x, None)
    assert out.shape == (1, 3, 2, 4)
    assert weights is None


# --- nothing left behind, the same every time ------------------------------------------------------------------------------------


def test_nothing_global_changes():
    config = FAMILIES["llama"](1)
    before = copy.deepcopy(config.to_dict())
    known = set(ALL_ATTENTION_FUNCTIONS)
    capture(config, batch_size=1, seq_len=8, dtype=torch.bfloat16)
    assert config.to_dict() == before
    assert set(ALL_ATTENTION_FUNCTIONS) == known
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_capture_is_deterministic():
    first, second = tiny.__wrapped__("gemma2"), tiny("gemma2")
    assert first == second
    assert repr(first) == repr(second)


PROGRAM = """
import hashlib, sys, torch
torch.set_num_threads(1)
import seqloom.capture
assert "transformers" not in sys.modules, "importing capture must be quick"
from transformers import LlamaConfig
config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
captured = seqloom.capture.capture(config, batch_size=1, seq_len=131072, dtype=torch.bfloat16)
print(captured.num_parameters, sum(n.is_block for n in captured.graph.nodes), len(captured.graph.blocks))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # ru_maxrss would begin with the parent's
from test_capture import digest, tiny
print(digest(tiny()), digest(tiny("gemma2")))
"""


def digest(captured: Captured) -> str:
    """sha256 of the whole result as text; sets print in an order of their own."""
    text = re.sub(r"frozenset\(\{(.*?)\}\)", lambda m: ",".join(sorted(m[1].split(", "))), repr(captured))
    return hashlib.sha256(text.encode()).hexdigest()


def test_llama3_8b_at_128k_is_small_and_other_processes_agree():
    env = {**os.environ, "PYTHONHASHSEED": "1234", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    parameters, calls, blocks, kib, *digests = result.stdout.split()
    assert (parameters, calls, blocks) == ("8030261248", "32", "1")
    assert int(kib) < 1_000_000
    assert digests == [digest(tiny()), digest(tiny("gemma2"))]


def test_captured_is_plain_data():
    """No tensor, module or function hides in the graph: it can be printed and compared."""
    text = repr(tiny())
    for word in ("FakeTensor", "object at 0x", "function", "device("):
        assert word not in text
    assert json.loads(json.dumps(dict(tiny("gpt2").tied))) == {"lm_head.weight": "transformer.wte.weight"}
