"""The decoder and the checkpoint loader, held against transformers' own models and a float64 reference.

On a CPU bfloat16 goes through stock operators: Triton's interpreter multiplies it wrongly.
"""

import json
import re
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.rope import RopeScaling
from lab.check import same_bits
from lab.checkpoint import (
    CheckpointError,
    Layer,
    LlamaConfig,
    Weights,
    load_weights,
    named_tensors,
    read_config,
    save_checkpoint,
)
from lab.device import current_device
from lab.llama import CONFIGS, Llama, llama_ref, make_operators, random_weights
from lab.timing import relative_error

DEVICE = current_device().torch_device
SMALL = LlamaConfig(
    "small", vocab=96, hidden=64, layers=2, heads_q=4, heads_kv=2, head_dim=64, ffn=96, rope_theta=10_000.0,
    max_positions=256,
)  # fmt: skip
SCALED = replace(SMALL, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), tied=True)
QWEN = replace(SMALL, qk_norm=True, eps=1e-6, rope_theta=1e6)
KINDS = {"llama": SMALL, "llama tied, scaled": SCALED, "qwen3": QWEN}
TOKENS = torch.randint(0, 96, (37,), generator=torch.Generator().manual_seed(7))


def widened(weights):
    """The same weights in float64."""

    def wide(x):
        return None if x is None else x.double()

    layers = [Layer(*(wide(getattr(layer, f.name)) for f in fields(Layer))) for layer in weights.layers]
    return Weights(wide(weights.embed), layers, wide(weights.norm), wide(weights.lm_head))


def reference(config, weights, tokens=TOKENS):
    return llama_ref(config, widened(weights), tokens.to(weights.embed.device)[None])[0]


def lively(config, dtype, device="cpu", seed=0):
    """Random weights, larger than at the start of training, so that every part of the model shows in its logits."""
    weights = random_weights(config, seed, torch.float32, device)
    for name, tensor in named_tensors(config, weights):
        if not name.endswith("norm.weight"):
            tensor.mul_(5)
    for f in fields(Weights):
        if f.name != "layers":
            setattr(weights, f.name, getattr(weights, f.name).to(dtype))
    if config.tied:
        weights.lm_head = weights.embed
    cast = [{f.name: getattr(x, f.name) for f in fields(Layer)} for x in weights.layers]
    weights.layers = [Layer(**{k: None if v is None else v.to(dtype) for k, v in x.items()}) for x in cast]
    return weights


# ----------------------------------------------------------------------------------------- transformers


def theirs(kind, folder, dtype, shard="10GB"):
    """A small model of transformers' own, saved in ``folder``."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
        "tie_word_embeddings": "tied" in kind, "initializer_range": 0.1, "attn_implementation": "eager",
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if "scaled" in kind:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 32}  # fmt: skip
    name = "Qwen3" if kind == "qwen3" else "Llama"
    config = getattr(transformers, f"{name}Config")(**sizes, rope_parameters=rope)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data += torch.randn_like(parameter) / 8  # transformers starts them at one
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_transformers(kind, dtype, shard, tmp_path):
    """To the accuracy budget: at most twice the error that transformers' own model makes in this dtype."""
    model = theirs(kind, tmp_path, dtype, shard)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard == "60KB")
    with torch.no_grad():
        want = model(TOKENS[None]).logits[0]
    config, saved = read_config(tmp_path)
    assert saved == dtype
    assert replace(config, name="small", eps=KINDS[kind].eps, rope_theta=KINDS[kind].rope_theta) == KINDS[kind]
    loaded = Llama.load(tmp_path, device="cpu", operators="torch")
    exact = reference(config, loaded.weights)
    limit = max(2 * relative_error(want, exact), torch.finfo(dtype).eps)
    assert relative_error(loaded.logits(TOKENS), exact) <= limit
    assert relative_error(want, exact) < 0.05, "the reference is another model"
    if dtype == torch.float32 and shard == "10GB":
        invariant = Llama.load(tmp_path, device=DEVICE)
        assert relative_error(invariant.logits(TOKENS).cpu(), exact) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_save(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = lively(KINDS[kind], torch.float32)
    save_checkpoint(tmp_path, KINDS[kind], weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert relative_error(model(TOKENS[None]).logits[0], reference(KINDS[kind], weights)) < 1e-5
    config, _ = read_config(tmp_path)
    again = load_weights(tmp_path, config, torch.float32, "cpu")
    pairs = zip(named_tensors(config, again), named_tensors(KINDS[kind], weights), strict=True)
    assert all(a[0] == b[0] and same_bits(a[1], b[1]) for a, b in pairs)


# --------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *[torch.bfloat16] * current_device().is_gpu])
@pytest.mark.parametrize("kind", KINDS)
def test_our_operators_err_no_more_than_twice_stock_ones(kind, dtype):
    weights = lively(KINDS[kind], dtype, DEVICE)
    exact = reference(KINDS[kind], weights)
    errors = [
        relative_error(Llama(KINDS[kind], weights, operators).logits(TOKENS), exact)
        for operators in ("batch_invariant", "torch")
    ]
    assert errors[0] <= max(2 * errors[1], torch.finfo(dtype).eps), errors
    assert errors[1] < 0.05


def test_token_log_probs_are_those_of_the_logits():
    model = Llama(SMALL, lively(SMALL, torch.float16, DEVICE))
    got = model.token_log_probs(TOKENS, rows=10)
    whole = torch.log_softmax(model.logits(TOKENS).double(), -1)[:-1]
    want = whole.gather(1, TOKENS[1:, None].to(whole.device))[:, 0]
    assert got.shape == (len(TOKENS) - 1,)
    assert torch.allclose(got.double(), want, atol=2e-6 if DEVICE.type == "cpu" else 2e-2)
    assert model.token_log_probs(TOKENS[:1]).shape == (0,)


@pytest.mark.parametrize("precision", ["w8a8_int8", "w8a8_fp8"])
def test_eight_bit_projections_stay_close(precision):
    pytest.importorskip("kernels.w8a8")
    config, tokens = replace(SMALL, layers=1), TOKENS[:4]
    weights = lively(config, torch.float16, DEVICE)
    exact = reference(config, weights, tokens)
    error = relative_error(Llama(config, weights, precision=precision).logits(tokens), exact)
    # A rounding to 8 bit costs about 1 % of a row's norm (int8) or 3 % (e4m3); several of them add up.
    assert 1e-3 < error < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_no_sum_is_left_to_stock_operators(kind):
    """Whatever adds up goes through this collection's kernels, on whichever machine: torch only moves numbers."""
    called = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # fp32 attention is torch's
    model = Llama(KINDS[kind], lively(KINDS[kind], dtype, DEVICE))
    batch, cache = model.sequence(TOKENS[:5])
    with Watch():
        model.operators.log_softmax(model.head(model.forward(batch, cache)))
    adding = r"mm$|matmul|linear|softmax|logsumexp|attention|norm|sum|mean|dot|einsum|conv"
    assert called and not [name for name in called if re.search(adding, name)]


def test_gradients_flow_through_the_reference():
    weights = lively(SMALL, torch.float32)
    tensors = dict(named_tensors(SMALL, weights))
    leaves = [weights.embed, weights.lm_head, *(layer.qkv for layer in weights.layers)]
    for leaf in leaves:
        leaf.requires_grad_()
    logits = llama_ref(SMALL, weights, TOKENS[None])
    torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[1:]).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert len(tensors) == 2 * 9 + 3


def test_named_configurations_have_the_published_sizes():
    billions = {"llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "qwen3-0.6b": 0.596}
    for name, count in billions.items():
        assert CONFIGS[name].parameters / 1e9 == pytest.approx(count, abs=0.006)
    weights = random_weights(CONFIGS["tiny"], 0, torch.float32, "cpu")
    assert sum(x.numel() for _, x in named_tensors(CONFIGS["tiny"], weights)) == CONFIGS["tiny"].parameters


def test_random_weights_are_those_of_their_seed():
    first, again, other = (random_weights(SMALL, seed, torch.float16, DEVICE) for seed in (0, 0, 1))
    assert same_bits(first.layers[1].down, again.layers[1].down)
    assert not same_bits(first.layers[1].down, other.layers[1].down)


# ------------------------------------------------------------------------------------------------ errors


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, SMALL, lively(SMALL, torch.float32))
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": "gone"}, "architecture None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks 'factor'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"hidden_size": "gone"}, "lacks 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": ["float32"]}, r"dtype=\['float32'\]"),
        ({"rms_norm_eps": -1}, "eps=-1"),
        ({"rms_norm_eps": True}, "eps=True"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x'"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            r"rope_scaling\.factor=0",
        ),
        ({"num_attention_heads": 0, "head_dim": "gone"}, "heads_q=0"),
        ({"tie_word_embeddings": "false"}, "tied='false'"),
        ({"num_key_value_heads": 3}, "heads_q=4"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors.*model\.layers\.2\.input_layernorm"),
        ({"num_hidden_layers": 1}, r"holds 9 tensors.*layers\.1"),
        ({"intermediate_size": 128}, r"mlp\.gate_proj\.weight has shape \(96, 64\), .* needs \(128, 64\)"),
        ({"tie_word_embeddings": "gone", "vocab_size": 95}, r"embed_tokens.* \(96, 64\), .* needs \(95, 64\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(changes, message, saved):
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        Llama.load(saved, device="cpu")


def test_the_older_spelling_of_rope_is_read(saved):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    rewrite(
        saved, rope_parameters="gone", rope_theta=123.0, rope_scaling=scaling, dtype="gone", torch_dtype="float16"
    )
    config, dtype = read_config(saved)
    assert (config.rope_theta, config.rope_scaling, dtype) == (123.0, SCALED.rope_scaling, torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(dtype, saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight has dtype {dtype}"):
        Llama.load(saved, device="cpu")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1.9]), r"dtype=torch\.float32"),
        (torch.tensor([[1]]), r"\(1, 1\)"),
        (torch.tensor([1, 96]), "tokens hold 96, outside the vocabulary of 96"),
        (torch.tensor([-1, 2]), "tokens hold -1"),
    ],
)
def test_tokens_outside_the_vocabulary_are_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        Llama(SMALL, lively(SMALL, torch.float32), "torch").logits(tokens)


def test_missing_and_broken_files_are_named(saved):
    for wrong in (["x"], {"x": 1}):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="weight_map must name a file for every tensor"):
            Llama.load(saved, device="cpu")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks 21 tensors"):
        Llama.load(saved, device="cpu")
    names = [name for name, _ in named_tensors(SMALL, random_weights(SMALL, 0, torch.float32, "cpu"))]
    index = dict.fromkeys(names, "gone.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        Llama.load(saved, device="cpu")
    (saved / "model.safetensors.index.json").unlink()
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        Llama.load(saved, device="cpu")
    (saved / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        read_config(saved)
    with pytest.raises(CheckpointError, match=r"nowhere.config\.json does not exist"):
        read_config(saved / "nowhere")


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="operators='cuda'"):
        make_operators("cuda")
    with pytest.raises(ValueError, match="precision='int4'"):
        make_operators("batch_invariant", "int4")
    with pytest.raises(ValueError, match=r"w8a8_int8.*batch_invariant"):
        make_operators("torch", "w8a8_int8")
    with pytest.raises(ValueError, match="config='llama-9'"):
        Llama.random("llama-9", device="cpu")
    model = Llama(SMALL, lively(SMALL, torch.float16), "torch", max_positions=16)
    with pytest.raises(ValueError, match="1 to 16 tokens, got 37"):
        model.logits(TOKENS)
    with pytest.raises(ValueError, match="max_positions=300"):
        Llama(SMALL, model.weights, max_positions=300)
    with pytest.raises(ValueError, match="heads_kv=3"):
        replace(SMALL, heads_kv=3)
    with pytest.raises(ValueError, match="layers=0"):
        replace(SMALL, layers=0)
