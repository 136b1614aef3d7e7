"""Weights reach their pieces: the same random values under every plan, exact slices of safetensors, buffers as in transformers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from seqloom.errors import UserError
from seqloom.runtime.initialize import original_model
from seqloom.runtime.materialize import materialize
from seqloom.runtime.mesh import build_mesh, init_distributed
from seqloom.runtime.parameters import declare, declare_buffers

CPU = torch.device("cpu")
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TINY = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_config(kind):
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    if kind == "llama":
        return LlamaConfig(**TINY, num_key_value_heads=2, rope_parameters={**ROPE, "original_max_position_embeddings": 64})
    if kind == "qwen3":
        return Qwen3Config(**TINY, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return GPT2Config(vocab_size=67, n_positions=32, n_embd=24, n_layer=3, n_head=4)


def tiny_program(config, plan_mesh=None, placements=None, zero=3, sum_grads=()):
    """A program that declares the parameters and buffers of the config's model; nothing runs it."""
    original = original_model(config)
    names = {id(p): name for name, p in original.named_parameters()}
    tied = {n: names[id(p)] for n, p in original.named_parameters(remove_duplicate=False) if names[id(p)] != n}

    class Model(nn.Module):
        def __init__(self, mesh):
            super().__init__()
            declare(self, {name: tuple(p.shape) for name, p in original.named_parameters()})
            declare_buffers(self, {n: (tuple(b.shape), b.dtype) for n, b in original.named_buffers() if "original" not in n})

    sharded = ("dp", *sum_grads) if zero else ()
    fields = {"MESH": plan_mesh or {}, "PLACEMENTS": placements or {}, "ZERO": zero, "SUM_GRADS": sum_grads, "TIED": tied}
    return SimpleNamespace(**fields, SHARDED=sharded, MODEL=Model, BLOCKS=())


PLACEMENTS = {
    "llama": {
        "model.layers.*.self_attn.q_proj.weight": {"tp": Shard(0)},
        "model.layers.*.self_attn.o_proj.weight": {"tp": Shard(1)},
        "model.layers.*.input_layernorm.weight": {"tp": Replicate()},
        "model.embed_tokens.weight": {"tp": Shard(0), "sp": Shard(1)},
    },
    "qwen3": {"model.layers.*.mlp.gate_proj.weight": {"tp": Shard(0)}, "model.embed_tokens.weight": {"tp": Shard(1)}},
    "gpt2": {"transformer.h.*.attn.c_proj.weight": {"tp": Shard(0)}, "transformer.h.*.mlp.c_fc.weight": {"tp": Shard(1)}},
}


def _whole(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()} | dict(model.named_buffers())


def _made(rank, world_size, kind, plan_mesh, dp, zero, sum_grads, weights, seed=1):
    config = tiny_config(kind)
    placements = {n: {a: p for a, p in placed.items() if a in plan_mesh and a not in sum_grads} for n, placed in PLACEMENTS[kind].items()}
    program = tiny_program(config, plan_mesh, {n: p for n, p in placements.items() if p}, zero, sum_grads)
    mesh = build_mesh(plan_mesh, dp, "cpu")
    state = torch.random.get_rng_state()
    model = materialize(program, mesh, config, weights=weights, seed=seed, device=CPU)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    return _whole(model)


def _all_plans(rank, world_size, jobs):
    return [_plans(rank, world_size, kind, weights) for kind, weights in jobs]


def _plans(rank, world_size, kind, weights):
    whole = _made(rank, world_size, kind, {}, world_size, 3, (), weights)
    for plan_mesh, dp, zero, sum_grads in [({"sp": 2, "tp": 2}, 1, 3, ("sp",)), ({"tp": 2}, 2, 0, ()), ({"tp": 2, "sp": 2}, 1, 1, ())]:
        other = _made(rank, world_size, kind, plan_mesh, dp, zero, sum_grads, weights)
        assert whole.keys() == other.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, other[name]), (name, plan_mesh)
    return whole


KINDS = ("llama", "qwen3", "gpt2")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """This process as a job of one rank."""
    init_distributed("cpu")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per kind, a real model and the folder it is saved in: several files, or one."""
    from transformers import AutoModelForCausalLM

    models = {}
    for kind in KINDS:
        torch.manual_seed(3)
        models[kind] = AutoModelForCausalLM.from_config(tiny_config(kind)), tmp_path_factory.mktemp(kind)
        models[kind][0].save_pretrained(models[kind][1], max_shard_size="1GB" if kind == "qwen3" else "20KB")
    return models


@pytest.fixture(scope="module")
def by_plans(saved):
    """What four ranks make, equal under every plan: (kind, from weights?) -> whole tensors."""
    jobs = [(kind, weights) for kind in KINDS for weights in (None, saved[kind][1])]
    return {(kind, weights is not None): whole for (kind, weights), whole in zip(jobs, run_ranks(_all_plans, 4, jobs)[0], strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_random_values_do_not_depend_on_the_plan(kind, by_plans):
    alone = _single(kind, None)
    for name, tensor in by_plans[kind, False].items():
        assert torch.equal(tensor, alone[name]), name
    config = tiny_config(kind)
    for name, tensor in alone.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if name.endswith("bias") else 1.0)) or "inv_freq" in name, name
        else:
            std = config.initializer_range / (2 * config.n_layer) ** 0.5 if "c_proj" in name else config.initializer_range
            assert tensor.std().item() == pytest.approx(std, rel=0.15), name
            assert abs(tensor.mean().item()) < std / 5, name
    others = [t for name, t in alone.items() if t.dim() == 2]
    assert len({tuple(t.flatten()[:4].tolist()) for t in others}) == len(others)
    again = _single(kind, None, seed=2)
    assert not any(torch.equal(tensor, again[name]) for name, tensor in alone.items() if tensor.dim() == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_equal_those_of_transformers(kind, by_plans, saved):
    buffers = {name: b for name, b in saved[kind][0].named_buffers() if "original" not in name}
    assert (kind == "gpt2") == (not buffers)
    for name, buffer in buffers.items():
        made = by_plans[kind, True][name]
        assert torch.equal(made, buffer) and made.dtype == buffer.dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_folder_reach_every_plan(kind, by_plans, saved):
    real, folder = saved[kind]
    assert (folder / "model.safetensors.index.json").exists() == (kind != "qwen3")
    for name, param in real.named_parameters():
        assert torch.equal(by_plans[kind, True][name], param), name


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved["qwen3"][1], tmp_path, dirs_exist_ok=True)
    return tmp_path


def _single(kind, weights, seed=1):
    return _made(0, 1, kind, {}, 1, 3, (), weights, seed)


def _refused(kind, weights):
    with pytest.raises(UserError) as error:
        _single(kind, weights)
    return str(error.value)


def _edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_tied_weights_are_found_under_their_other_name(folder):
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _edit(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(_single("qwen3", folder)["model.embed_tokens.weight"], before)


def test_headless_gpt2_checkpoint_with_old_buffers(tmp_path):
    from transformers import GPT2Model

    real = GPT2Model(tiny_config("gpt2"))
    save_file({**real.state_dict(), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")
    made = _single("gpt2", tmp_path)
    for name, param in real.named_parameters():
        assert torch.equal(made[f"transformer.{name}"], param)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["lack model.norm.weight"]),
        (lambda t: [t.pop(k) for k in list(t) if "mlp" in k], ["lack model.layers.0.mlp.gate_proj.weight", "and 3 more"]),
        (lambda t: t.update(extra=torch.ones(2)), ["have extra"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), ["model.norm.weight", "shape (3,)", "(24,)"]),
    ],
    ids=["missing", "several missing", "unexpected", "mis-shaped"],
)
def test_weights_that_do_not_fit_are_named(folder, change, words):
    _edit(folder, change)
    message = _refused("qwen3", folder)
    for word in [*words, str(folder)]:
        assert word in message


def test_broken_folders_are_named(folder):
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weights.write_bytes(b"not safetensors")
    assert "model.safetensors is not a whole safetensors file" in _refused("qwen3", folder)
    weights.unlink()
    assert "has no weights that can be read: it holds neither model.safetensors" in _refused("qwen3", folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "the shard model-00001-of-00002.safetensors that its index names is missing" in _refused("qwen3", folder)
    index.write_text("{")
    assert "is not an index" in _refused("qwen3", folder)


def test_a_program_of_another_model_is_refused():
    config = tiny_config("llama")
    mesh = build_mesh({"tp": 1}, 1, "cpu")
    for program, words in [
        (tiny_program(config, {"tp": 1}, {"model.layers.*.nothing": {"tp": Shard(0)}}), r"PLACEMENTS names model\.layers\.\*\.nothing"),
        (tiny_program(tiny_config("gpt2"), {"tp": 1}), r"has no parameter transformer\.h\.0\.attn\.c_attn\.bias"),
    ]:
        with pytest.raises(UserError, match=words):
            materialize(program, mesh, config, weights=None, seed=0, device=CPU)
